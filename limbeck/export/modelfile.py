"""The Modelfile beside a GGUF file, with which `ollama create` makes a model of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from limbeck.export.gguf_tokens import special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELFILE = "Modelfile"
_ENDS = ("eos", "eot", "eom")


def end_texts(tokenizer: PreTrainedTokenizerBase, stops: Iterable[int]) -> list[str]:
    """How the tokens that end an answer are written, those of the GGUF file.

    Args:
        stops: further tokens at which the model's own generation stops.
    """
    special = special_ids(tokenizer, stops)
    ids = [special[role] for role in _ENDS if role in special]
    return [str(tokenizer.decode([index], skip_special_tokens=False)) for index in ids]


def modelfile(file: str, *, adapter: str | None, ends: Iterable[str]) -> str:
    """The text of a Modelfile. The template is left to Ollama, which reads it from the GGUF file.

    Args:
        file: the GGUF file beside it.
        adapter: the GGUF file of the adapters that belong to it.
        ends: texts to stop at. Those that a quoted value cannot hold are left out: a stranger's token must not become
            an instruction of its own, and the model's engine stops at the token all the same.
    """
    lines = [f"FROM ./{file}"]
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter}")
    lines += [f'PARAMETER stop "{end}"' for end in ends if end.strip() and end.isprintable() and '"' not in end]
    return "\n".join(lines) + "\n"
