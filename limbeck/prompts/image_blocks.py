"""Blocks of content in the turns of a conversation: texts and images in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from limbeck.types import ImageRef, LimbeckError

# Where a block of an image keeps it, where it does not stand in a column of its own.
_SOURCES = ("image", "path", "url", "image_url")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadImage(ImageRef):
    """An image of a row before its file is read.

    Attributes:
        source: a path, bytes or what `datasets` makes of an image; None where the column `images` has it.
    """

    id: str = ""
    source: Any = field(default=None, compare=False, hash=False)


def blocks_in(content: Any, column: str, where: str) -> tuple[str | ImageRef, ...] | None:
    """The texts and images of a turn's content; None where the content is no list of blocks.

    Raises:
        LimbeckError: a block of another kind.
    """
    if not isinstance(content, Sequence) or isinstance(content, str) or not content:
        return None
    if not all(isinstance(block, Mapping) and isinstance(block.get("type"), str) for block in content):
        return None
    return tuple(_part(block, column, where) for block in content)


def _part(block: Mapping[str, Any], column: str, where: str) -> str | ImageRef:
    kind = block["type"]
    if kind == "text" and isinstance(block.get("text"), str):
        return block["text"]
    if kind in ("image", "image_url"):
        found = next((block[name] for name in _SOURCES if block.get(name) is not None), None)
        return UnreadImage(source=found.get("url") if isinstance(found, Mapping) and "url" in found else found)
    without = " without a text" if kind == "text" else ""
    raise LimbeckError(
        f"{where}: got a block of type {kind[:40]!r}{without} in {column!r}, expected {{'type': 'text', "
        "'text': '...'} or {'type': 'image'}; only texts and images are read: change or drop the row"
    )
