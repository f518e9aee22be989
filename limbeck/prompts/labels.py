"""Names of prompts in messages, with place and text: an id is a hash, which cannot be found in a file."""

from __future__ import annotations

from limbeck.types import Prompt

_SHOWN = 50


def prompt_label(prompt: Prompt) -> str:
    """The id, where the prompt stood when that is known, and its beginning (of a conversation: of the last turn)."""
    text = prompt.text if prompt.text is not None else prompt.messages[-1].content if prompt.messages else ""
    # A prompt may be a book: only its beginning is looked at.
    line = " ".join(text[: 8 * _SHOWN].split())
    shown = repr(line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "...")
    return f"{prompt.id} ({prompt.where}: {shown})" if prompt.where else f"{prompt.id} ({shown})"
