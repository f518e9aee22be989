"""Rows of a source, one by one, each with its place for error messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from glob import glob
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.prompts.fields import quoted
from limbeck.prompts.hub import load_hub, stream_hub
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")


@dataclass(frozen=True, slots=True)
class PlacedRow:
    """A row and where it stands, such as "data.jsonl, line 7".

    Attributes:
        folder: of its file, which paths in the row are relative to; None for a hub data set.
    """

    row: Mapping[str, Any]
    where: str
    folder: Path | None = None


def rows_of(
    source: str,
    dataset_split: str = "train",
    dataset_config: str | None = None,
    *,
    keys: str = "prompts",
    streamed: bool = False,
) -> Iterator[PlacedRow]:
    """All rows of a source (see `load_prompts`), lazily: of lines and of tables no more is in memory than a part.

    Args:
        keys: the section of the recipe that messages name.
        streamed: fetch of a hub data set what is read, as it is read, and keep nothing of it.

    Raises:
        LimbeckError: nothing there, nothing in it, or not readable, naming file and line.
    """
    empty = True
    for row in _dispatch(source, dataset_split, dataset_config, keys, streamed):
        empty = False
        yield row
    if empty:
        wanted = "at least two prompts" if keys == "prompts" else "rows of text"
        raise LimbeckError(f"{source} holds no rows, expected {wanted}; check the path or the split")


def source_digest(source: str) -> str | None:
    """Sha256 (hex) of the bytes a local source holds, file by file in order; None for a hub id.

    What a stage that reads prompts is fingerprinted by, so that an edited file makes a new run of the stage.
    """
    if source == "builtin":
        return hashlib.sha256(_builtin()).hexdigest()
    found = _local(source)
    if not found:
        return None
    digest = hashlib.sha256()
    for path in found:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(f"{file.name}\n{file.stat().st_size}\n".encode())
                with file.open("rb") as content:
                    while data := content.read(1 << 20):
                        digest.update(data)
    return digest.hexdigest()


def _builtin() -> bytes:
    return files("limbeck.prompts").joinpath("builtin.jsonl").read_bytes()


def _is_pattern(source: str) -> bool:
    return any(char in source for char in "*?[")


def _local(source: str) -> list[Path]:
    """The file, the folder or the files of a pattern that a source names; empty where the source is not local."""
    path = Path(source).expanduser()
    if path.exists():
        return [path]
    return [Path(match) for match in sorted(glob(str(path), recursive=True))] if _is_pattern(source) else []


def is_path(source: str) -> bool:
    """Whether a source can only be a file, a folder or a pattern, whether it is there or not."""
    spelled = source.startswith((".", "/", "~")) or Path(source).suffix in _SUFFIXES or _is_pattern(source)
    return spelled or Path(source).exists()


def _dispatch(source: str, split: str, config: str | None, keys: str, streamed: bool) -> Iterator[PlacedRow]:
    if source == "builtin":
        return _read_json_lines(_builtin().split(b"\n"), "the built-in set")
    found = _local(source)
    if len(found) == 1 and found[0].is_dir():
        return _read_folder(found[0], split, keys)
    if found:
        return _read_files(found)
    if is_path(source):
        raise LimbeckError(f"{source} does not exist; give a file or folder, a hub id, or builtin")
    if streamed:
        return _read_stream(stream_hub(source, split, config, keys=keys), source)
    return _read_dataset(load_hub(source, split, config, keys=keys), source)


def _read_folder(path: Path, split: str, keys: str) -> Iterator[PlacedRow]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _read_saved(path, split, keys)
    found = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    if not found:
        raise LimbeckError(
            f"{path} holds neither a saved data set nor {', '.join(_SUFFIXES)} files; give the folder or file that does"
        )
    return _read_files(found)


def _read_files(paths: Iterable[Path]) -> Iterator[PlacedRow]:
    for path in paths:
        yield from _read_file(path)


def _read_file(path: Path) -> Iterator[PlacedRow]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    if path.suffix not in _SUFFIXES:
        raise LimbeckError(f"{path} is not one of {', '.join(_SUFFIXES)}; convert it to one JSON object per line")
    try:
        if path.suffix == ".json" and (data := path.read_bytes()).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from _read_json_array(data, str(path), path.parent)
            return
        with path.open("rb") as lines:
            yield from _read_json_lines(lines, str(path), path.parent)
    except OSError as error:
        raise LimbeckError(f"{path} cannot be read ({error.strerror}); check its permissions") from None


def _read_json_lines(lines: Iterable[bytes], name: str, folder: Path | None = None) -> Iterator[PlacedRow]:
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix(b"\n")
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            where = f"{name}, line {number}"
            yield _placed(_parse(line, where, 1), where, folder)


def _read_json_array(data: bytes, name: str, folder: Path | None = None) -> Iterator[PlacedRow]:
    for number, row in enumerate(_parse(data.removeprefix(b"\xef\xbb\xbf"), name, None), start=1):
        yield _placed(row, f"{name}, row {number}", folder)


def _parse(data: bytes, where: str, lines: int | None) -> Any:
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise LimbeckError(f"{where} is not UTF-8 (byte {error.start}); convert the file") from None
    except json.JSONDecodeError as error:
        place = f"{where}, column {error.colno}" if lines else f"{where}, line {error.lineno}, column {error.colno}"
        raise LimbeckError(
            f"{place}: malformed JSON ({error.msg}), expected one object per line, or an array of objects in "
            "a .json file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise LimbeckError(f"{where}: unreadable JSON ({error}), expected an object with text fields") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. A field that is there twice, which JSON allows, is refused, since either could be meant."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(name for name in row if sum(name == key for key, _ in pairs) > 1)
        raise ValueError(f"the field {quoted(twice)} stands there twice")
    return row


def _placed(row: Any, where: str, folder: Path | None = None) -> PlacedRow:
    if not isinstance(row, Mapping):
        raise LimbeckError(f"{where}: expected a JSON object with named fields, got {type(row).__name__}")
    return PlacedRow(row, where, folder)


def _read_parquet(path: Path) -> Iterator[PlacedRow]:
    import pyarrow.parquet
    from pyarrow import ArrowException

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield PlacedRow(_without_nulls(row), f"{path}, row {number}", path.parent)
    except (ArrowException, OSError) as error:
        raise LimbeckError(f"{path} is no readable parquet file ({_one_line(error)}); write it again") from None


def _read_saved(path: Path, split: str, keys: str) -> Iterator[PlacedRow]:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise LimbeckError(f"{path} is no readable data set folder ({_one_line(error)}); save it again") from None
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise LimbeckError(
                f"{path} has the splits {', '.join(map(str, saved))}, not {split!r}; set {keys}.dataset_split"
            )
        saved = saved[split]
    yield from _read_dataset(saved, str(path), path)


def _read_dataset(dataset: Dataset, name: str, folder: Path | None = None) -> Iterator[PlacedRow]:
    for number, row in enumerate(_undecoded(dataset), start=1):
        yield _placed(_without_nulls(row), f"{name}, row {number}", folder)


def _read_stream(dataset: IterableDataset, name: str) -> Iterator[PlacedRow]:
    for number, row in enumerate(dataset, start=1):
        yield _placed(_without_nulls(row), f"{name}, row {number}")


def _undecoded(dataset: Dataset) -> Dataset:
    """The data set with images as the bytes they are: they are decoded with care, and where their row is known."""
    from datasets import Image, List

    for column, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(column, List(Image(decode=False)))
    return dataset


def _without_nulls(value: Any) -> Any:
    """A value of a typed table without null fields: there every object of a column has all fields that any of them has,
    so that a schema of tools would be full of fields that it does not name."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "..."
