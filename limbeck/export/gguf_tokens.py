"""A byte-level BPE tokenizer as the fields of a GGUF file.

llama.cpp knows by name how a text is cut before the merges (`tokenizer.ggml.pre`); a tokenizer that cuts in no way it
has a name for is refused, since other ids would come out of the same text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from limbeck.models.fingerprints import backend_rules
from limbeck.prompts.templates import end_token_ids
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# How llama.cpp calls the ways to cut, each as a tuple of steps (see `_steps`).
_NAMES = {
    ("gpt2",): "gpt-2",
    ("digits", "gpt2"): "smollm",
    (_LLAMA3, "bytes"): "llama-bpe",
    (_QWEN2, "bytes"): "qwen2",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokenizer part of a GGUF file.

    Attributes:
        types: of each token, gguf's TokenType.
        special: gguf's name of a role ("bos", "eos", ...) to the token's id.
    """

    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, rows: int, stops: Iterable[int] = ()) -> Vocabulary:
        """Read a tokenizer.

        Args:
            rows: of the embedding; ids from the last token on are padding.
            stops: further tokens at which the model's own generation stops.

        Raises:
            LimbeckError: no byte-level BPE, one that cuts in a way without a name, or more ids than rows.
        """
        rules = _byte_level(tokenizer)
        tokens, types = _tokens(tokenizer, rows)
        text = tokenizer.chat_template
        (inner,) = _codes(tokenizer, "a")
        around = _codes(tokenizer, "a", special=True)
        return cls(
            pre=_pre(tokenizer, rules),
            tokens=tokens,
            types=types,
            merges=tuple(_merge(pair) for pair in rules["model"]["merges"]),
            special=special_ids(tokenizer, stops),
            adds_bos=around[0] != inner,
            adds_eos=around[-1] != inner,
            chat_template=text if isinstance(text, str) else None,
        )

    def write(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        writer.add_token_merges(list(self.merges))
        for role, token in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def _byte_level(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    rules = backend_rules(tokenizer) if tokenizer.is_fast else {"model": {"type": type(tokenizer).__name__}}
    model = rules["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("continuing_subword_prefix"):
        kind = "SentencePiece" if model.get("byte_fallback") else model["type"]
        raise LimbeckError(
            f"the tokenizer is {kind}, expected byte-level BPE (GPT-2, SmolLM2, Llama 3, Qwen2) for GGUF; "
            "export safetensors, or convert those with llama.cpp's own converter"
        )
    return rules


def _codes(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    encoded: Any = tokenizer(text, add_special_tokens=special)
    return encoded["input_ids"]


def _merge(pair: str | list[str]) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _pre(tokenizer: PreTrainedTokenizerBase, rules: dict[str, Any]) -> str:
    steps = tuple(_steps(rules["pre_tokenizer"]))
    name = _NAMES.get(steps)
    if name is None or bool(rules["model"].get("ignore_merges")) != (name == "llama-bpe"):
        raise LimbeckError(
            f"the tokenizer of {tokenizer.name_or_path} cuts text by {' then '.join(steps) or 'nothing'}, expected a "
            f"way that llama.cpp has a name for ({', '.join(_NAMES.values())}); export safetensors"
        )
    return name


def _steps(rule: dict[str, Any] | None) -> list[str]:
    """A pre-tokenizer as steps: "digits" (one by one), "gpt2" (its pattern, then bytes), "bytes", or a pattern."""
    if rule is None:
        return []
    if rule["type"] == "Sequence":
        return [step for one in rule["pretokenizers"] for step in _steps(one)]
    if rule["type"] == "ByteLevel" and not rule["add_prefix_space"]:
        return ["gpt2" if rule.get("use_regex", True) else "bytes"]
    if rule["type"] == "Digits" and rule["individual_digits"]:
        return ["digits"]
    if rule["type"] == "Split" and rule["behavior"] == "Isolated" and not rule["invert"]:
        return [rule["pattern"].get("Regex", "")]
    return [rule["type"]]


def _tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    from gguf import TokenType

    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(by_id) >= rows:
        raise LimbeckError(
            f"the tokenizer has ids up to {max(by_id)} and the model {rows} embeddings, expected one for each id; "
            "export with the tokenizer that belongs to the model"
        )
    types = dict.fromkeys(by_id, TokenType.NORMAL)
    for index, token in tokenizer.added_tokens_decoder.items():
        types[index] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    return (
        tuple(by_id.get(index, f"[PAD{index}]") for index in range(rows)),
        tuple(int(types.get(index, TokenType.UNUSED)) for index in range(rows)),
    )


def special_ids(tokenizer: PreTrainedTokenizerBase, stops: Iterable[int]) -> dict[str, int]:
    """The tokens of a GGUF file that have a role, by gguf's names of these.

    Args:
        stops: further tokens at which the model's own generation stops.

    Raises:
        LimbeckError: none ends a text.
    """
    roles = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    roles |= {"padding": tokenizer.pad_token_id, "unknown": tokenizer.unk_token_id}
    found = {role: index for role, index in roles.items() if isinstance(index, int)}
    if "eos" not in found:
        raise LimbeckError(
            f"the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token, expected one for GGUF; "
            "set tokenizer.eos_token and save it again"
        )
    ends = end_token_ids(tokenizer, "chat") if isinstance(tokenizer.chat_template, str) else ()
    others = [index for index in dict.fromkeys([*ends, *stops]) if index != found["eos"]]
    # The ends of a turn and of a message: llama.cpp stops at either as at the end of sequence.
    return found | dict(zip(("eot", "eom"), others, strict=False))
