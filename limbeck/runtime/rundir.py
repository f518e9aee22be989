"""The run directory: atomic writes, the lock, and one manifest a finished stage.

    recipe.resolved.yaml  provenance.json  prompts.jsonl  responses/  signal/  checkpoints/  rounds/  metrics.jsonl
    student/  scores/  scores.json  samples.jsonl  report.html  report.svg  stages/NAME.json

A stage is done when its manifest says so; the manifest holds the fingerprint of everything the stage read and the hash
of every file it wrote (`outputs`). Whatever is written appears under its final name only when it is whole, so
a kill at any moment leaves finished things finished.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from limbeck.runtime.folders import partial_in, remove
from limbeck.types import Json, LimbeckError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let a write that fails inside the block say what it wrote: the system names a file it cannot open, no other."""
    try:
        yield
    except Exception as error:
        # safetensors has an error of its own, with the system's number in its text.
        of_the_disk = getattr(error, "errno", None) in _DISK or "os error" in str(error)
        if of_the_disk and getattr(error, "filename", None) is None:
            error.filename = str(path)  # pyright: ignore[reportAttributeAccessIssue]
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A scratch file that becomes `path`, on disk, when the block ends without an error, and vanishes with one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with naming(path):
            # What a kill left, or a link that would have somebody else's file written.
            remove(partial)
            if path.is_dir():
                raise _a_folder(path)
            partial.touch()
            mode = stat.S_IMODE(partial.stat().st_mode)
            yield partial
            _settle(partial, mode)
        partial.replace(path)
    finally:
        # On a full disk half a file would take the room that the next one needs.
        partial.unlink(missing_ok=True)


def _settle(file: Path, mode: int) -> None:
    """See that a file is on disk, and that whoever may read its neighbours may read it: safetensors writes 0600."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    if stat.S_IMODE(file.stat().st_mode) != mode:
        file.chmod(mode)


def _a_folder(path: Path) -> LimbeckError:
    return LimbeckError(f"{path} is a folder where a file belongs; delete it and run the same command again")


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the new one, also after a crash."""
    with whole_file(path) as partial:
        partial.write_text(text, "utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except IsADirectoryError:
        raise _a_folder(path) from None
    except (ValueError, RecursionError) as error:
        raise LimbeckError(f"{path} is damaged ({error}); delete it and run the same command again") from None


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
    """A record with the fingerprint of itself, so that whoever reads it sees whether it is what was written."""
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


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A scratch folder that becomes `path` when the block ends without an error, and vanishes with one.

    A folder that stood there before steps aside under another name until the new one is in place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    remove(partial)
    partial.mkdir()
    try:
        with naming(path):
            yield partial
            mode = stat.S_IMODE(partial.stat().st_mode) & 0o666
            for file in partial.rglob("*"):
                if file.is_file():
                    _settle(file, mode)
        replaced = path.with_name(f".{path.name}.replaced.partial")
        remove(replaced)
        if path.exists():
            path.replace(replaced)
        partial.replace(path)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# Files that grow by lines in place: a second name for one of them would change with it.
APPENDED = ("metrics.jsonl", "metrics.sft.jsonl", "examples.jsonl", "served.jsonl")


def link(path: Path, target: Path) -> None:
    """Give a file a second name, in place of what has it; a copy for logs and where a file can have but one name.

    Safe because everything else in a run directory is replaced, never written in place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    if path.name in APPENDED:
        shutil.copyfile(path, partial)
    else:
        try:
            partial.hardlink_to(path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK, errno.ENOSYS):
                raise
            shutil.copyfile(path, partial)
    partial.replace(target)
    # Of two names of one file, a move of the first onto the second does nothing at all.
    partial.unlink(missing_ok=True)


def _open_lock(path: Path) -> IO[str]:
    """The lock file; a link there would have somebody else's file overwritten."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.EISDIR:
            raise _a_folder(path) from None
        if error.errno != errno.ELOOP:
            raise
        raise LimbeckError(
            f"{path} is a link; expected a plain file: delete it and run the same command again"
        ) from None
    return os.fdopen(descriptor, "r+", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Where a run lives. Construct with `open_run`."""

    root: Path

    @property
    def prompts(self) -> Path:
        return self.root / "prompts.jsonl"

    @property
    def responses(self) -> Path:
        return self.root / "responses"

    @property
    def signal(self) -> Path:
        return self.root / "signal"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def rounds(self) -> Path:
        return self.root / "rounds"

    @property
    def examples(self) -> Path:
        return self.rounds / "examples.jsonl"

    @property
    def sft_metrics(self) -> Path:
        return self.root / "metrics.sft.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def corpus(self) -> Path:
        """The text of train.lm as blocks of token ids."""
        return self.root / "lm.safetensors"

    @property
    def learning_rate(self) -> Path:
        """Searches for the learning rate, a file for each training that left it open."""
        return self.root / "learning_rate"

    @property
    def student(self) -> Path:
        return self.root / "student"

    @property
    def scores(self) -> Path:
        return self.root / "scores"

    @property
    def samples(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def picture(self) -> Path:
        return self.root / "report.svg"

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.resolved.yaml"

    @property
    def lock(self) -> Path:
        """Held by the run; the first rank of a launch also touches it, as a sign of life."""
        return self.root / ".lock"

    def manifest_path(self, stage: str) -> Path:
        return self.root / "stages" / f"{stage}.json"

    def manifest(self, stage: str) -> Json | None:
        """The record of a finished (or begun, see `finished`) stage."""
        path = self.manifest_path(stage)
        if not path.exists():
            return None
        read_fields(path, {"fingerprint": str, "done": bool, "seconds": (int, float)})
        return read_sealed(path)

    def write_manifest(self, stage: str, record: Json) -> None:
        """Write the record of a stage."""
        write_json(self.manifest_path(stage), sealed(record))

    def done(self, stage: str) -> bool:
        """Whether the stage is done, for whatever inputs."""
        record = self.manifest(stage)
        return record is not None and record["done"]

    def finished(self, stage: str, fingerprint_: str) -> bool:
        """Whether the stage is done for exactly these inputs."""
        record = self.manifest(stage)
        return record is not None and record["done"] and record["fingerprint"] == fingerprint_

    def begun(self, stage: str, fingerprint_: str) -> bool:
        """Whether the stage is being made from exactly these inputs."""
        record = self.manifest(stage)
        return record is not None and not record["done"] and record["fingerprint"] == fingerprint_

    @contextmanager
    def locked(self, warn: Callable[[str], None]) -> Iterator[None]:
        """Keep a second run out of the directory. The lock dies with the process, so a kill never leaves it behind.

        Args:
            warn: told where the file system has no locks.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with _open_lock(self.root / ".lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise LimbeckError(
                    f"{self.root} is in use by another run ({file.read().strip() or 'starting'}); "
                    "wait for it, or give this one its own output_dir=..."
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                warn(f"the file system of {self.root} has no locks; make sure that no second run uses it")
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()}")
            file.flush()
            with naming(self.root):
                yield

    def remove_partial_files(self) -> None:
        """Remove what a killed run left half written. Only under the lock: a living run's files look the same."""
        for left in partial_in(self.root):
            remove(left)

    def set_aside(self, stage: str, outputs: tuple[Path, ...]) -> Path | None:
        """Move the outputs of a superseded stage to superseded/, so that nothing finished is lost.

        Safe to kill: the manifest is marked as not done before the first move and goes last, so that what remains is
        never taken for a finished stage, nor for the beginning of another one.

        Returns:
            where they are now; None where there was nothing.
        """
        present = [path for path in outputs if path.exists()]
        record = self.manifest(stage)
        if not present and record is None:
            return None
        target = self._superseded(f"{stage}-{record['fingerprint'][:8] if record else 'unknown'}")
        if record is not None:
            write_json(target / f"{stage}.json", sealed(record))
            self.write_manifest(stage, record | {"done": False})
        target.mkdir(parents=True, exist_ok=True)
        for path in present:
            path.replace(target / path.name)
        self.manifest_path(stage).unlink(missing_ok=True)
        return target

    def set_files_aside(self, stage: str, names: Iterable[str]) -> Path | None:
        """Move damaged files of a stage to superseded/, by their names below the run directory.

        Returns:
            where they are now; None where none was there.
        """
        present = [name for name in names if os.path.lexists(self.root / name)]
        if not present:
            return None
        target = self._superseded(f"{stage}-damaged")
        for name in present:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).replace(target / name)
        return target

    def _superseded(self, what: str) -> Path:
        """A new folder's path for what is set aside now."""
        name = f"{what}-{time.strftime('%Y%m%dT%H%M%S')}"
        folder, number = self.root / "superseded", 1
        while (folder / name).exists():
            number += 1
            name = f"{name.partition('_')[0]}_{number}"
        return folder / name
