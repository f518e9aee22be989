"""Files of a finished stage: name, size, time and hash are in its manifest, and compared where a file is read.

Hashing reads each file once: when its stage ends, and again in a later command that runs a stage which reads it. A
command that has nothing to run compares sizes and times of last change alone, and reads what differs in time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from limbeck.runtime.files import APPENDED
from limbeck.runtime.hashing import sha256_of
from limbeck.runtime.records import fingerprint
from limbeck.types import Json

Written = Mapping[str, Mapping[str, Any]]


def written_below(root: Path, outputs: Iterable[Path]) -> Json:
    """Size, time and hash of every whole file of some outputs, by its name below the run directory."""
    found: Json = {}
    for path in _files(outputs):
        stat = path.stat()
        entry = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_of(path)}
        found[path.relative_to(root).as_posix()] = entry
    return found


def _files(outputs: Iterable[Path]) -> Iterator[Path]:
    for output in outputs:
        for path in [output] if output.is_file() else sorted(output.rglob("*")):
            if path.is_file() and not any(part.endswith(".partial") for part in path.parts):
                yield path


def matching(written: Written, patterns: Iterable[str], *, wanted: bool = True) -> Written:
    """The files whose names match one of some patterns, or none of them."""
    patterns = tuple(patterns)
    return {name: w for name, w in written.items() if any(fnmatchcase(name, p) for p in patterns) == wanted}


def faults(root: Path, written: Written, *, content: bool) -> dict[str, str]:
    """Faults of files that were written: name to "is missing" or "has changed".

    Args:
        content: compare what they hold, even where size and time of last change are the same.
    """
    found = {}
    for name, entry in written.items():
        path = root / name
        if not path.is_file():
            found[name] = "is missing"
            continue
        stat = path.stat()
        same = stat.st_size == entry["size"]
        if same and (content or stat.st_mtime_ns != entry["mtime_ns"]):
            same = sha256_of(path) == entry["sha256"]
        if not same:
            found[name] = "has changed"
    return found


def content_of(written: Written) -> str:
    """One fingerprint of names and contents."""
    return fingerprint({name: entry["sha256"] for name, entry in written.items()})


def with_companions(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """Files and those that are only of use beside them: of the same name up to the first dot."""
    stems = {_stem(name) for name in names}
    return sorted({*names, *(name for name in among if _stem(name) in stems)})


def _stem(name: str) -> tuple[str, str]:
    folder, _, file = name.rpartition("/")
    return folder, file.partition(".")[0]


def is_log(name: str) -> bool:
    """Whether a file grew by lines, which cannot be written again as they were."""
    return name.rpartition("/")[2] in APPENDED


def made_from(record: Json, sources: Json) -> bool:
    """Whether a stage was made from these files, as far as its record says."""
    then = record.get("made_from", {})
    return all(then[name] == now for name, now in sources.items() if name in then)
