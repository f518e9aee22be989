"""Prompts as text without a chat template."""

from __future__ import annotations

from limbeck.prompts.labels import prompt_label
from limbeck.types import LimbeckError, Prompt

# The wording of Alpaca (Taori et al. 2023), which MiniLLM and its successors train and evaluate with.
_OPENING = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."


def plain_text(prompt: Prompt) -> str:
    """The text as it stands; of instruction data, instruction and input with a blank line between them."""
    return _single_turn(prompt, "plain") if prompt.text is None else prompt.text


def alpaca_text(prompt: Prompt) -> str:
    """The Alpaca wording. What is no instruction data counts as an instruction without input."""
    if prompt.instruction is not None:
        instruction, given = prompt.instruction
    else:
        instruction, given = (_single_turn(prompt, "alpaca") if prompt.text is None else prompt.text), ""
    return alpaca_text_of(instruction, given)


def alpaca_text_of(instruction: str, given: str) -> str:
    """The Alpaca wording of an instruction and its input, which may be empty."""
    if not given.strip():
        return f"{_OPENING}. {_REQUEST}\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    return (
        f"{_OPENING}, paired with an input that provides further context. {_REQUEST}\n\n"
        f"### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
    )


def _single_turn(prompt: Prompt, template: str) -> str:
    assert prompt.messages, f"prompt {prompt.id} has neither text nor messages"
    if len(prompt.messages) != 1:
        roles = ", ".join(turn.role for turn in prompt.messages)
        raise LimbeckError(
            f"prompt {prompt_label(prompt)} has the turns {roles}, which template {template!r} has no words for; "
            "use a tokenizer with a chat template, or single user turns"
        )
    return prompt.messages[0].content
