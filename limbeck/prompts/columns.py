"""Columns of a data set: unread ones are counted, those of methods that are not implemented are refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from limbeck.prompts.fields import TURN_FIELDS, Row, quoted, require_unicode, shown_value
from limbeck.prompts.readers import PlacedRow
from limbeck.types import LimbeckError

# What a data set means by a column that no method here reads, and that changes what a row asks or answers.
UNPLAYED: dict[str, str] = {
    "privileged_context": "is context for the teacher alone, which teacher.sees=column reads",
    "teacher_id": "names a teacher for each row, which teachers with combine=column reads",
    "chosen": "is one answer of a preference pair, which preference.pairs=data alone reads",
    "rejected": "is one answer of a preference pair, which preference.pairs=data alone reads",
    "reward": "rates an answer, and no objective here weighs the data's answers by a rating",
    "label": "says whether an answer is wanted (KTO), and no objective here learns to avoid an answer of the data",
    **dict.fromkeys(
        ("image", "images", "video", "videos", "audio", "audios"), "belongs to the prompt, and only text is read here"
    ),
}
# Read where both models read images.
IMAGE_COLUMNS = ("images", "image")
# The same inside a turn of a conversation.
UNPLAYED_IN_TURNS: dict[str, str] = dict.fromkeys(
    ("weight", "train"), "says which turns to train on, which prompts.loss_on decides here"
)
_SHOWN = 12
_READ_IN_TURNS = frozenset({"role", "content", "from", "value", *TURN_FIELDS})


class ReadRow(dict[str, Any]):
    """A row that remembers which of its columns were asked for."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:  # type: ignore[override]
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


@dataclass(kw_only=True)
class ColumnTally:
    """Count of the columns of a source that are not read.

    Attributes:
        ignore: columns to leave out as if they were not there; `messages.weight` is a field of the turns of `messages`.
        unread: number of rows in which a column that is not read holds a value, by its name.
        images: whether the columns of images are read.
        seen: columns that the teacher sees beside the prompt.
    """

    ignore: Sequence[str] = ()
    seen: Sequence[str] = ()
    images: bool = False
    unread: Counter[str] = field(default_factory=Counter)
    _met: set[str] = field(default_factory=set)

    def kept(self, placed: PlacedRow) -> ReadRow:
        """The row without ignored columns.

        Raises:
            LimbeckError: a column of a method that is not implemented.
        """
        row = dict(placed.row)
        for name in self.ignore:
            column, _, inner = name.partition(".")
            if name in row:
                self._met.add(name)
                del row[name]
            elif inner and _is_list(row.get(column)):
                turns = row[column]
                if any(isinstance(turn, Mapping) and inner in turn for turn in turns):
                    self._met.add(name)
                row[column] = [_without(turn, inner) for turn in turns]
        for name, reason in _unplayed(row):
            if name in self.seen or (self.images and name in IMAGE_COLUMNS):
                continue
            raise LimbeckError(
                f"{placed.where}: the column {name!r} {reason}; remove it, or say that it is left out on purpose: "
                f"prompts.ignore_columns=[{name}]"
            )
        read = ReadRow(row)
        read.read.update(name for name in self.seen if name in row)
        return read

    def seen_in(self, placed: PlacedRow) -> dict[str, str]:
        """The texts of the columns that the teacher sees, by their names.

        Raises:
            LimbeckError: the row has no text there.
        """
        return {name: _seen_text(placed, name) for name in self.seen}

    def count(self, row: ReadRow) -> None:
        """Count the columns of a row that were not read."""
        names = [name for name, value in row.items() if name not in row.read and _says(value)]
        names += {f"{c}.{key}" for c, key in _turn_fields(row) if c in row.read and key not in _READ_IN_TURNS}
        instances: Any = dict.get(row, "instances") if "instances" in row.read else None
        names += {f"instances.{key}" for one in instances or () for key in _unread_in_instance(one)}
        self.unread.update(names)

    def finish(self) -> None:
        """Check that every ignored column exists: a misspelt name would change nothing, silently.

        Raises:
            LimbeckError: it was not.
        """
        for name in self.ignore:
            if name not in self._met:
                raise LimbeckError(
                    f"prompts.ignore_columns names {name!r}, which no row of the data has; correct or remove it"
                )


def _seen_text(placed: PlacedRow, name: str) -> str:
    """The text of a column that the teacher sees; of turns their texts, one to a line, as TRL has it."""
    value: Any = placed.row.get(name)
    if type(value) in (int, float):
        value = str(value)
    turns: list[Any] = list(value) if _is_list(value) else []
    if turns and all(isinstance(turn, Mapping) for turn in turns):
        value = "\n".join(str(turn["content"]) for turn in turns if _says(turn.get("content")))
    if isinstance(value, str) and value.strip():
        return require_unicode(value, name, placed.where)
    got = f"holds {shown_value(value)}" if name in placed.row else "is missing"
    raise LimbeckError(
        f"{placed.where}: the column {quoted(name)!r}, which the recipe reads (teacher.sees, combine, "
        f"responses.verify), {got}; expected text: fill it in, drop the row, or let the recipe read another"
    )


def unread_line(unread: Mapping[str, int], rows: int) -> str:
    """Line for the console about columns that are not read."""
    shown = [
        quoted(name) + ("" if count == rows else f" (in {count} of {rows} rows)")
        for name, count in list(unread.items())[:_SHOWN]
    ]
    more = f" and {len(unread) - _SHOWN} more" if len(unread) > _SHOWN else ""
    return f"prompts: columns that are not read: {', '.join(shown)}{more}"


def _unplayed(row: Row) -> Iterator[tuple[str, str]]:
    for name, reason in UNPLAYED.items():
        # Of a column `label` only truth values are KTO's; others name classes.
        if _says(value := row.get(name)) and (name != "label" or isinstance(value, bool)):
            yield name, reason
    for column, key in _turn_fields(row):
        if key in UNPLAYED_IN_TURNS:
            yield f"{column}.{key}", UNPLAYED_IN_TURNS[key]


def _turn_fields(row: Row) -> Iterator[tuple[str, str]]:
    """The columns that hold conversations, each with the fields that hold a value in one of its turns."""
    for column, value in row.items():
        turns = [turn for turn in value if isinstance(turn, Mapping)] if _is_list(value) else []
        if any("role" in turn or "from" in turn for turn in turns):
            yield from ((column, key) for turn in turns for key, inner in turn.items() if _says(inner))


def _unread_in_instance(one: Mapping[str, Any]) -> list[str]:
    """Fields of a self-instruct pair that are not read: the second of two answers."""
    twice = _says(one.get("output")) and _says(one.get("response"))
    read = {"input", "context", "output"} | (set() if twice else {"response"})
    return [key for key, value in one.items() if key not in read and _says(value)]


def _without(turn: Any, key: str) -> Any:
    return {name: value for name, value in turn.items() if name != key} if isinstance(turn, Mapping) else turn


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _says(value: Any) -> bool:
    """Whether a value is neither null nor empty."""
    return value is not None and value != "" and not (isinstance(value, Sequence | Mapping) and not value)
