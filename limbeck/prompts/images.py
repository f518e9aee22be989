"""Images of the rows of a data set: read, checked and put in their places in the conversation.

A row has them in the column `images` (or `image`), or in blocks of its turns. A place is a block `{type: image}`, or
the text `<image>` in a user's turn. Where a row names no place at all, its images stand before the text of the first
user's turn, as TRL has it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from limbeck.models.images import ImageFolder, decode_image, image_id, read_image_file, require_pillow
from limbeck.prompts.columns import IMAGE_COLUMNS
from limbeck.prompts.fields import shown_value
from limbeck.prompts.formats import Example
from limbeck.prompts.image_blocks import UnreadImage, blocks_in
from limbeck.prompts.readers import PlacedRow
from limbeck.types import ImageRef, LimbeckError, Message

PLACE = "<image>"
_REMEDY = "name a place for each image, or none at all"


@dataclass(frozen=True)
class RowImages:
    """Reads the images of rows.

    Attributes:
        folder: keeps the bytes of each image; None only looks at them.
    """

    folder: ImageFolder | None = None
    _seen: set[str] = field(default_factory=set)

    def placed(self, examples: Sequence[Example], row: Mapping[str, Any], placed: PlacedRow) -> list[Example]:
        """The examples of a row with its images in their places.

        Raises:
            LimbeckError: an image that cannot be read, or another number of images than of places.
        """
        given = _sources(row, placed.where)
        if not given and not any(turn.parts for one in examples for turn in (*_turns(one), one.answer) if turn):
            return list(examples)
        require_pillow()
        names = [self._read(source, placed, f"image {n}") for n, source in enumerate(given, start=1)]
        return [self._filled(example, names, placed) for example in examples]

    def _filled(self, example: Example, names: Sequence[str], placed: PlacedRow) -> Example:
        """One example with every place taken by an image."""
        where = placed.where
        if example.answer is not None and example.answer.parts:
            raise LimbeckError(f"{where}: the answer holds an image, and models here answer in text; drop the row")
        turns = [self._with_places(turn, bool(names), where) for turn in _turns(example)]
        places = [p for turn in turns for p in turn.parts if isinstance(p, UnreadImage) and p.source is None]
        if not places and names:
            turns = _before_first(turns, len(names), where)
        elif len(places) != len(names):
            raise LimbeckError(
                f"{where}: got {len(names)} images in the column and {len(places)} places for them in the "
                f"conversation; {_REMEDY}"
            )
        left = iter(names)
        filled = tuple(replace(turn, parts=tuple(self._known(p, left, placed) for p in turn.parts)) for turn in turns)
        return replace(example, text=None, instruction=None, messages=filled)

    def _with_places(self, turn: Message, in_column: bool, where: str) -> Message:
        """A turn with the texts `<image>` as places, where its row has a column of images and no blocks."""
        if turn.parts and turn.role != "user":
            raise LimbeckError(
                f"{where}: a turn of the {turn.role[:20]} holds an image, expected images in turns of the user alone; "
                "move it there"
            )
        if turn.parts or not in_column or turn.role != "user" or PLACE not in turn.content:
            return turn
        pieces = turn.content.split(PLACE)
        parts: list[str | ImageRef] = []
        for piece in pieces:
            parts += [*([piece] if piece else []), UnreadImage()]
        content = "\n".join(piece for piece in pieces if piece)
        return replace(turn, content=content, parts=tuple(parts[:-1]))

    def _known(self, part: str | ImageRef, left: Iterator[str], placed: PlacedRow) -> str | ImageRef:
        if not isinstance(part, UnreadImage):
            return part
        name = next(left) if part.source is None else self._read(part.source, placed, "the image of a turn")
        return ImageRef(id=name)

    def _read(self, source: Any, placed: PlacedRow, what: str) -> str:
        """The id of an image, once it was seen that it can be decoded."""
        data, said = _bytes_of(source, placed, what)
        name = image_id(data)
        if name not in self._seen:
            decode_image(data, said)
            if self.folder is not None:
                self.folder.add(data)
            self._seen.add(name)
        return name


def _turns(example: Example) -> tuple[Message, ...]:
    return example.messages or (Message(role="user", content=example.text or ""),)


def _before_first(turns: Sequence[Message], count: int, where: str) -> list[Message]:
    """Turns with places before the text of the first user's."""
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise LimbeckError(f"{where}: got images and no turn of the user to put them in; add one")
    turn = turns[first]
    parts = (*(UnreadImage() for _ in range(count)), *([turn.content] if turn.content else []))
    return [*turns[:first], replace(turn, parts=parts), *turns[first + 1 :]]


def _sources(row: Mapping[str, Any], where: str) -> list[Any]:
    """What the columns of images hold."""
    held = [(name, row.get(name)) for name in IMAGE_COLUMNS]
    found = [(name, value) for name, value in held if value not in (None, "", [], ())]
    if len(found) > 1:
        raise LimbeckError(f"{where}: got both 'images' and 'image', expected one of them; remove the other")
    if not found:
        return []
    value = found[0][1]
    return list(value) if isinstance(value, list | tuple) else [value]


def _bytes_of(source: Any, placed: PlacedRow, what: str) -> tuple[bytes, str]:
    """The bytes of an image, and its name in messages.

    Raises:
        LimbeckError: neither a path nor bytes, or a file that cannot be read.
    """
    data = source.get("bytes") if isinstance(source, Mapping) else source
    if isinstance(data, bytes):
        return data, f"{placed.where}: {what}"
    path = source.get("path") if isinstance(source, Mapping) else source
    if not isinstance(path, str) or not path or "\0" in path:
        raise LimbeckError(
            f"{placed.where}: {what} is {shown_value(source)}, expected a path relative to the file of prompts, or an "
            "image's bytes; rewrite the row"
        )
    if path.startswith(("http://", "https://", "data:")):
        raise LimbeckError(
            f"{placed.where}: {what} is the address {shown_value(path)}, expected a file; nothing is fetched here: "
            "download it and name the file"
        )
    said = f"{placed.where}: {what} ({shown_value(path)})"
    return read_image_file(_file_of(path, placed.folder, said), said), said


def _file_of(path: str, folder: Path | None, said: str) -> Path:
    """The file that a row names: any, where the prompts are a file of this machine; else one that `datasets` fetched.

    Links are not followed for that: the hub's own folders are full of them.

    Raises:
        LimbeckError: it was not fetched. Data of others must not read what else is on this machine.
    """
    named = Path(path.removeprefix("file://"))
    if folder is not None:
        return folder / named.expanduser()
    file = Path(os.path.abspath(named))
    if any(file.is_relative_to(os.path.abspath(one)) for one in _fetched_folders()):
        return file
    raise LimbeckError(
        f"{said} is a path, expected an image's bytes: a data set of the hub names no files of this machine; "
        "drop the row, or download the data set and give its folder"
    )


def _fetched_folders() -> list[str]:
    """Where the libraries keep the files of the hub's data sets."""
    from datasets import config
    from huggingface_hub import constants

    return [str(config.HF_DATASETS_CACHE), constants.HF_HUB_CACHE]


def images_digest(rows: Iterable[tuple[Mapping[str, Any], PlacedRow]]) -> str | None:
    """A hash of all images of some rows in their order; None where there are none.

    Args:
        rows: each without the columns that are ignored, and with its place.

    Raises:
        LimbeckError: one cannot be read; names its row.
    """
    digest, count = hashlib.sha256(), 0
    for row, placed in rows:
        for number, source in enumerate((*_sources(row, placed.where), *_in_blocks(row, placed.where)), start=1):
            digest.update(image_id(_bytes_of(source, placed, f"image {number}")[0]).encode())
            count += 1
    return digest.hexdigest() if count else None


def _in_blocks(row: Mapping[str, Any], where: str) -> Iterator[Any]:
    """The images that blocks of a row's turns hold themselves."""
    for column, value in row.items():
        for turn in value if isinstance(value, list | tuple) else ():
            content = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
            for part in blocks_in(content, column, where) or ():
                if isinstance(part, UnreadImage) and part.source is not None:
                    yield part.source
