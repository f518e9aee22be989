"""Checks of an export against its source: logits on a few sequences, token ids of a few texts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limbeck.models.heads import causal_model
from limbeck.models.vocabulary import real_vocab_size
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Largest difference of a logit, as a share of the largest logit, that the precision of the weights explains. Weights
# keep 24, 11 and 8 bits, and 8 for each block of 32 with a scale of its own. SmolLM2-135M-Instruct is off by 0, 0.001,
# 0.006 and 0.034; random weights drawn wide by up to ten times as much.
BOUNDS = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.08, "q8_0": 0.1}
_TOKENS = 48
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "It's 1984, or 12 345.67 (give or take); they're sure we'll see 3 of 10.",
    "def larger(a, b):\n    return a if a > b else b\n\n\n\t# a tab, and trailing spaces   \n",
    "Größe, naïve, Ελληνικά, русский, 日本語, 한국어, العربية",
    "🙂👍🏽  two  spaces,   three; UPPER lower MiXeD snake_case camelCase",
    'https://example.org/a?b=c&d=%20 <b>bold</b> \\n $x^2 + y_1$ {"k": [1, 2]}',
    " leading space",
    "\n\nlines first",
    "",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitProbe:
    """Sequences with the source's logits and token ids.

    Attributes:
        texts: texts and their ids.
        sequences: token ids that both models read.
        logits: of each sequence, (its tokens, real ids), float32.
    """

    texts: tuple[tuple[str, tuple[int, ...]], ...]
    sequences: tuple[tuple[int, ...], ...]
    logits: tuple[Tensor, ...]


def probe(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> LogitProbe:
    """Logits and token ids of a model for a few texts.

    Raises:
        LimbeckError: logits that are NaN or infinite.
    """
    embeddings: Any = causal_model(model).get_input_embeddings()
    if (ids := real_vocab_size(tokenizer)) > len(embeddings.weight):
        raise LimbeckError(
            f"the tokenizer has ids up to {ids - 1} and the model {len(embeddings.weight)} embeddings, expected one "
            "for each id; export with the tokenizer that belongs to the model"
        )
    texts = [*TEXTS, *_with_added_tokens(tokenizer)]
    coded = tuple((text, encode_text(tokenizer, text)) for text in texts)
    window = getattr(causal_model(model).config.get_text_config(), "max_position_embeddings", None) or _TOKENS
    draws = torch.Generator().manual_seed(0)
    random = torch.randint(0, real_vocab_size(tokenizer), (_TOKENS,), generator=draws).tolist()
    every = [ids for _, ids in coded[:4]] + [tuple(random)]
    sequences = tuple(ids[: min(_TOKENS, window)] for ids in every if ids)
    logits = tuple(_logits(model, ids, real_vocab_size(tokenizer)) for ids in sequences)
    if not all(one.isfinite().all() for one in logits):
        raise LimbeckError(
            f"{type(causal_model(model)).__name__} gives NaN or infinite logits on plain text, expected finite ones; "
            "its weights are damaged: export another checkpoint"
        )
    return LogitProbe(texts=coded, sequences=sequences, logits=logits)


def _with_added_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Each added token amid a text, and a conversation where there is a chat template."""
    texts = [f"one {token}two" for token in map(str, tokenizer.added_tokens_decoder.values())]
    return [*texts, " and ".join(map(str, tokenizer.added_tokens_decoder.values()))]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids of a text, with what the tokenizer puts around it."""
    encoded: Any = tokenizer(text)
    return tuple(encoded["input_ids"])


@torch.inference_mode()
def _logits(model: nn.Module, ids: Sequence[int], vocab_size: int) -> Tensor:
    ids_1T = torch.tensor([list(ids)])
    seen: Any = model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False)
    return seen.logits[0, :, :vocab_size].float()


def digests(model: nn.Module) -> dict[str, str]:
    """sha256 of each weight by name."""
    named = model.named_parameters()
    return {name: hashlib.sha256(weight.detach().contiguous().numpy().data).hexdigest() for name, weight in named}


def require_equal(expected: Mapping[str, str], read_back: Mapping[str, str]) -> None:
    """See that weights that were read back are those that were written, bit for bit.

    Raises:
        LimbeckError: naming the first that is not.
    """
    for name, digest in expected.items():
        if read_back.get(name) != digest:
            raise LimbeckError(
                f"{name} as it was read back is not the weight that was written, expected every bit the same; export "
                "with --dtype float32, and report this model"
            )


def compare_logits(
    probe: LogitProbe, model: nn.Module, tokenizer: PreTrainedTokenizerBase, dtype: str, bound: float
) -> float:
    """The largest difference of a logit, as a share of the source's largest logit.

    Raises:
        LimbeckError: a text becomes other ids, or logits differ by more than the precision explains.
    """
    for text, expected in probe.texts:
        if (got := encode_text(tokenizer, text)) != expected:
            raise LimbeckError(
                f"the exported tokenizer reads {text!r} as {_shown(got)}, expected {_shown(expected)} as before; "
                "this tokenizer cannot be exported in this format: export safetensors"
            )
    largest = max(one.abs().max().item() for one in probe.logits)
    gap = max(
        (_logits(model, ids, expected.shape[-1]) - expected).abs().max().item()
        for ids, expected in zip(probe.sequences, probe.logits, strict=True)
    )
    share = gap / max(largest, 1e-30)
    # NaN is no small number.
    if not share <= bound:
        raise LimbeckError(
            f"the exported model's logits differ by {share:.2g} of the largest one, expected at most {bound:g} "
            f"in {dtype}; export with --dtype float32, or the model is one this format does not hold"
        )
    return share


def _shown(ids: Sequence[int]) -> str:
    return f"{list(ids[:12])}{'...' if len(ids) > 12 else ''}"
