"""The card of an export: the model's own, with a section on this export and how to load it."""

from __future__ import annotations

import re
from typing import Any

from limbeck.recipe.yaml_text import dump, parse
from limbeck.types import LimbeckError

# Levels of a card's metadata; those of the hub have five.
MOST_LEVELS = 30
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def front_matter(card: str) -> dict[str, Any]:
    """The metadata at the head of a card; empty where there is none, or none that can be read and written again.

    Cards come with models of strangers: aliases, whose size can grow without bound, are not read.
    """
    found = _FRONT.match(card)
    try:
        read = parse(found[1], "the metadata of a card") if found else None
    except (LimbeckError, RecursionError):
        return {}
    return read if isinstance(read, dict) and not _too_deep(read) else {}


def _too_deep(value: Any) -> bool:
    """Whether values lie in each other deeper than any card's; how deep one can write hangs on the stack left."""
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [inner for one in level if isinstance(one, dict | list) for inner in _values(one)]
    return bool(level)


def _values(one: dict[Any, Any] | list[Any]) -> list[Any]:
    return list(one.values()) if isinstance(one, dict) else one


def exported_card(card: str, *, name: str, file: str | None, said: str) -> str:
    """The card that lies beside the export.

    Args:
        card: the model's own; a short one is made where it is empty.
        file: the GGUF file; None for safetensors.
        said: a sentence on how the export was checked.
    """
    front = front_matter(card) or {"pipeline_tag": "text-generation", "tags": ["limbeck"]}
    front = {"library_name": "transformers"} | front
    body = _FRONT.sub("", card).strip("\n") or f"# {' '.join(name.split())}"
    if file is not None:
        front["library_name"] = "gguf"
        body = _section(body, "Use", f"```sh\nllama-server -m {file}\nollama create my-model -f Modelfile\n```")
    body = _section(body, "This export", said)
    return f"---\n{dump(front)}---\n\n{body}\n"


def _section(body: str, title: str, text: str) -> str:
    """The body with a section of that title, in place of the one it had."""
    section = f"## {title}\n\n{text}\n"
    old = re.compile(rf"^## {title}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if old.search(body):
        return old.sub(lambda _: f"{section}\n", body, count=1).rstrip("\n")
    return f"{body}\n\n{section}".rstrip("\n")
