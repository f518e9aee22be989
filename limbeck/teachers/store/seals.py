"""Files with a seal: a small JSON beside each, written last, that holds its size, its hash and what it is made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from limbeck.runtime.files import whole_file, write_text
from limbeck.runtime.records import sealed
from limbeck.types import Json, LimbeckError


def write_record(path: Path, record: Json) -> None:
    """Write a JSON object that notices a change of any of its bits when it is read."""
    write_text(path, _text(record))


def read_record(path: Path) -> Json:
    """The object of `write_record`.

    Raises:
        LimbeckError: it is not what was written.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        record = {key: value for key, value in json.loads(text).items() if key != "check"}
        same = text == _text(record)
    except (ValueError, AttributeError, RecursionError):
        same, record = False, {}
    if not same:
        raise damaged(path)
    return record


def _text(record: Json) -> str:
    return json.dumps(sealed(record), indent=2, ensure_ascii=False) + "\n"


def write_sealed_file(path: Path, write: Callable[[Path], None], record: Json) -> None:
    """Write a file and then its seal; until that is there, the file counts for nothing.

    Args:
        write: writes the file that it is given the name of.
    """
    seal_of(path).unlink(missing_ok=True)
    with whole_file(path) as partial:
        write(partial)
    write_record(seal_of(path), {"bytes": path.stat().st_size, "sha256": _sha256(path), **record})


def seal_of(path: Path) -> Path:
    """The seal beside a file."""
    return path.with_suffix(".json")


def read_seal(path: Path) -> Json:
    """The seal of a file, whose size is compared with it, but not its content.

    Raises:
        LimbeckError: the seal is damaged, or the file has another size.
    """
    record = read_record(seal_of(path))
    if not path.is_file() or path.stat().st_size != record.get("bytes"):
        raise damaged(path)
    return record


def read_whole_seal(path: Path) -> Json:
    """The same with the content compared.

    Raises:
        LimbeckError: the file is not what was written.
    """
    record = read_seal(path)
    if _sha256(path) != record.get("sha256"):
        raise damaged(path)
    return record


def _sha256(path: Path) -> str:
    """Hash of a file's content, read anew each time: what is looked for are changes that no time of change shows."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(path: Path, what: str = "it is not what was written") -> LimbeckError:
    return LimbeckError(
        f"{path} is damaged ({what}); run the command that wrote it again (`limbeck store capture` of a store, "
        "`limbeck run` of a run), which makes it anew"
    )
