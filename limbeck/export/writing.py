"""Write, read back, compare, and only then let it appear."""

from __future__ import annotations

import fcntl
import gc
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from limbeck.export.cards import exported_card, front_matter
from limbeck.export.checks import BOUNDS, compare_logits, probe
from limbeck.export.source import Exportable, find
from limbeck.models.loading import DTYPES, load_model
from limbeck.runtime.files import whole_folder, write_text
from limbeck.student.saving import save_student
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Format = Literal["safetensors", "gguf"]
_PRECISIONS = {"safetensors": tuple(DTYPES), "gguf": (*DTYPES, "q8_0")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """Result of an export.

    Attributes:
        file: what to load: the folder itself, or the GGUF file in it.
        difference: the largest of a logit from the source's, as a share of the largest logit.
        bound: what it was allowed to be.
    """

    folder: Path
    file: Path
    dtype: str
    difference: float
    bound: float

    @property
    def said(self) -> str:
        """In a sentence."""
        return (
            f"{self.dtype} weights, read back and compared with the source: logits differ by at most "
            f"{self.difference:.2g} of the largest one (bound {self.bound:g}), token ids by none."
        )


def export_model(
    source: str,
    out: Path,
    *,
    format: str = "safetensors",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Export a model into a folder that appears whole, checked, or not at all.

    Args:
        source: a run directory, a model directory, a PEFT directory, a hub id, a GGUF file or a named asset.
        format: "safetensors" or "gguf".
        dtype: of the weights; as they are stored where it is None.

    Raises:
        LimbeckError: `out` exists, no such source, a format that cannot hold it, or a check that failed.
    """
    precisions = _require(out, format, dtype)
    with _alone(out):
        return _export(source, out, format, dtype, precisions, trust_remote_code, say)


def _export(
    source: str,
    out: Path,
    format: str,
    dtype: str | None,
    precisions: tuple[str, ...],
    trust_remote_code: bool,
    say: Callable[[str], None],
) -> Exported:
    found = find(source, trust_remote_code=trust_remote_code)
    dtype = dtype or str(found.dtype).removeprefix("torch.")
    assert dtype in precisions
    say(f"export: {found.name} as {format}, {dtype}")
    seen = probe(found.original, found.tokenizer)
    with whole_folder(out) as work:
        if format == "gguf":
            file: str | None = _gguf_name(found.name, dtype)
            _write_gguf(work / file, found, dtype)
        else:
            file = None
            save_student(found.model.to(DTYPES[dtype]), found.tokenizer, work)  # type: ignore[arg-type]
        card, licences, name = found.card, found.licences, found.name
        # The source and its copy need not be in memory at once.
        del found
        gc.collect()
        written = work if file is None else work / file
        back = load_model(written, trust_remote_code=trust_remote_code)
        difference = compare_logits(seen, back.model, back.tokenizer, dtype)
        del back
        exported = Exported(
            folder=out,
            file=out if file is None else out / file,
            dtype=dtype,
            difference=difference,
            bound=BOUNDS[dtype],
        )
        for licence in licences:
            shutil.copyfile(licence, work / licence.name)
        write_text(work / "README.md", exported_card(card, name=name, file=file, said=exported.said))
    say(f"export: {exported.said}")
    return exported


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second export out of the same folder. The lock dies with the process, so a kill leaves none behind.

    Raises:
        LimbeckError: another export is writing there, or has just done so.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.with_name(f".{out.name}.lock")
    # Not through a link: opening must make nothing elsewhere.
    descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not lock.exists() or os.fstat(descriptor).st_ino != lock.stat().st_ino:
                raise BlockingIOError  # whoever had it has just removed it, and somebody else may hold another
        except BlockingIOError:
            raise LimbeckError(f"{out} is being written by another export; wait for it, or name another") from None
        try:
            # Whoever held the lock may have finished between our look at the folder and here.
            if out.exists():
                raise LimbeckError(f"{out} exists, expected a new folder; name another, or delete it first")
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _require(out: Path, format: str, dtype: str | None) -> tuple[str, ...]:
    if format not in get_args(Format):
        raise LimbeckError(f"format is {format!r}, expected {' or '.join(get_args(Format))}: correct --format")
    if dtype is not None and dtype not in _PRECISIONS[format]:
        raise LimbeckError(
            f"dtype is {dtype!r}, expected one of {', '.join(_PRECISIONS[format])} for {format}: correct --dtype"
        )
    if out.exists():
        raise LimbeckError(f"{out} exists, expected a new folder; name another, or delete it first")
    return _PRECISIONS[format]


def _gguf_name(name: str, dtype: str) -> str:
    short = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"
    return f"{plain}-{short[dtype]}.gguf"


def _write_gguf(path: Path, found: Exportable, dtype: str) -> None:
    from limbeck.export.gguf_model import write_gguf

    license = front_matter(found.card).get("license")
    write_gguf(
        path,
        found.model,
        found.tokenizer,
        name=found.name,
        dtype=dtype,
        license=license if isinstance(license, str) else None,
    )
