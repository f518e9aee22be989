"""JSON records: fingerprints, reading with checks, and records that hold a fingerprint of themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from limbeck.runtime.files import read_json
from limbeck.types import Json, LimbeckError

_Parsed = TypeVar("_Parsed")


def fingerprint(value: Any) -> str:
    """Sha256 (hex) of a JSON-able value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def read_object(path: Path) -> Json:
    """A JSON object.

    Raises:
        LimbeckError: the file holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise LimbeckError(
            f"{path} is damaged (it holds a {type(value).__name__} where an object belongs); delete it and run the "
            "same command again"
        )
    return value


def read_fields(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> Json:
    """A JSON object with certain fields.

    Raises:
        LimbeckError: the file holds something else.
    """
    record = read_object(path)
    wrong = next((name for name, kind in fields.items() if not isinstance(record.get(name), kind)), None)
    if wrong is not None:
        got = f"no {wrong}" if wrong not in record else f"a {type(record[wrong]).__name__} as {wrong}"
        raise LimbeckError(f"{path} is damaged (it holds {got}); delete it and run the same command again")
    return record


def sealed(record: Json) -> Json:
    """A record with a fingerprint of itself, so that a reader can tell whether it is what was written."""
    plain = {key: value for key, value in record.items() if key != "check"}
    # As it will be read: JSON turns every key into text.
    return plain | {"check": fingerprint(json.loads(json.dumps(plain)))}


def read_sealed(path: Path) -> Json:
    """The record of `sealed` that a file holds; one without a fingerprint of itself passes.

    Raises:
        LimbeckError: it is not as it was written.
    """
    record = read_object(path)
    if record != sealed(record) and "check" in record:
        raise LimbeckError(f"{path} is damaged (it is not what was written); delete it and run the same command again")
    return {key: value for key, value in record.items() if key != "check"}


def parsed_lines(path: Path, parse: Callable[[str], _Parsed]) -> Iterator[_Parsed]:
    """What `parse` makes of each line of a file of JSON lines that a stage wrote whole, one at a time.

    Raises:
        LimbeckError: the file is absent or damaged, naming the line.
    """
    try:
        lines = path.open("rb")
    except FileNotFoundError:
        raise LimbeckError(f"{path} does not exist; run the same command again") from None
    with lines:
        # Bytes: lines of text would also end where JSON does not end them.
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                parsed = parse(line.decode("utf-8"))
            except UnicodeDecodeError:
                raise LimbeckError(f"{path} is damaged (not UTF-8); delete it and run the same command again") from None
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise LimbeckError(
                    f"{path}, line {number} is damaged ({error}); delete the file and run the same command again"
                ) from None
            yield parsed
