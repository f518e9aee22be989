"""Text that spells a control token, such as <|im_end|>, is that control token to a Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from limbeck.prompts.fields import texts_in
from limbeck.prompts.labels import prompt_label
from limbeck.types import LimbeckError, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ControlTokens = Literal["error", "parse"]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special tokens of a tokenizer, named ones and added ones: id to spelling."""
    added: Mapping[int, Any] = tokenizer.added_tokens_decoder
    control = {index: token.content for index, token in added.items() if token.special}
    for index, content in zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True):
        control[index] = content
    return control


def refuse_control_tokens(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, policy: ControlTokens, *, answers: bool
) -> None:
    """With policy "error", raise for the first prompt that spells a control token; with "parse", let it be one.

    Args:
        answers: look into the reference answers too.

    Raises:
        LimbeckError: naming the prompt, the token and the remedy.
    """
    if policy == "parse":
        return
    if policy != "error":
        raise LimbeckError(f"prompts.control_tokens is {policy!r}, expected error or parse")
    spelled = [_content(prompt, answers) for prompt in prompts]
    # One search a token through all texts at once: nearly always none of them is there.
    everything = "\0".join(spelled)
    found = [token for token in special_tokens(tokenizer).values() if token.strip() and token in everything]
    for prompt, text in zip(prompts, spelled, strict=True):
        for token in found:
            if token in text:
                raise LimbeckError(
                    f"prompt {prompt_label(prompt)} spells the control token {token}, which the tokenizer "
                    "would read as one; remove it, or set prompts.control_tokens=parse"
                )


def _content(prompt: Prompt, answers: bool) -> str:
    turns = [*(prompt.messages or ()), *([prompt.answer] if answers and prompt.answer else [])]
    texts = [turn.content for turn in turns] + texts_in([turn.fields for turn in turns if turn.fields])
    texts += texts_in(prompt.tools) if prompt.tools else []
    return "\0".join([*texts, prompt.text or "", (prompt.completion or "") if answers else ""])
