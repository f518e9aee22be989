"""Export of a model: written, read back and compared before its folder appears."""

from __future__ import annotations

import fcntl
import gc
import math
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from limbeck.export.cards import exported_card, front_matter
from limbeck.export.checks import BOUNDS, LogitProbe, compare_logits, digests, probe, require_equal
from limbeck.export.encoding import GGUF_FORMATS, Encoding, differing, most_of, put_back
from limbeck.export.gguf_adapter import Adapters, read_adapters, require_merged, write_gguf_adapter
from limbeck.export.gguf_model import write_gguf
from limbeck.export.modelfile import MODELFILE, end_texts, modelfile
from limbeck.export.source import Exportable, find
from limbeck.models.gguf_architectures import require_known
from limbeck.models.loading import DTYPES, load_model
from limbeck.runtime.files import whole_folder, write_text
from limbeck.student.endings import stop_ids
from limbeck.student.saving import save_student
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Format = Literal["safetensors", "gguf"]
_PRECISIONS = {"safetensors": tuple(DTYPES), "gguf": (*DTYPES, *GGUF_FORMATS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """Result of an export.

    Attributes:
        file: what to load: the folder itself, or the GGUF file in it.
        difference: the largest of a logit from the source's, as a share of the largest logit.
        bound: what it was allowed to be; infinite where it is what the format makes of the weights, bit for bit.
        trained: whether the weights were trained as the blocks that were written.
        adapter: the GGUF file of the adapters that belong to these weights, where there are any.
    """

    folder: Path
    file: Path
    dtype: str
    difference: float
    bound: float
    trained: bool = False
    adapter: Path | None = None

    @property
    def said(self) -> str:
        """In a sentence."""
        if self.trained:
            beside = "" if self.adapter is None else f", with its adapters in {self.adapter.name}"
            return (
                f"{self.dtype} blocks as they were trained{beside}, read back: every weight is the same bit for bit, "
                "and so are token ids."
            )
        if math.isinf(self.bound):
            return (
                f"{self.dtype} blocks, read back: every weight is the rounded one bit for bit, token ids are those of "
                f"the source. Rounding moves logits by up to {self.difference:.2g} of the largest one."
            )
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
    blocks_of = None if found.quantized is None or format != "gguf" else most_of(found.quantized)
    trained = blocks_of is not None and dtype in (None, blocks_of)
    dtype = dtype or blocks_of or str(found.dtype).removeprefix("torch.")
    assert trained or dtype in precisions
    say(f"export: {found.name} as {format}, {dtype}")
    with whole_folder(out) as work:
        written = (
            _write_gguf(work, found, dtype, say, trained=trained)
            if format == "gguf"
            else _write_safetensors(work, found, dtype)
        )
        card, licences, name = found.card, found.licences, found.name
        # The source and its copy need not be in memory at once.
        del found
        gc.collect()
        back = load_model(written.path, trust_remote_code=trust_remote_code)
        bound = BOUNDS["float32"] if trained else BOUNDS.get(dtype, math.inf)
        difference = compare_logits(written.seen, back.model, back.tokenizer, dtype, bound)
        if written.weights is not None:
            require_equal(written.weights, digests(back.model))
        del back
        file = None if written.path == work else written.path.name
        exported = Exported(
            folder=out,
            file=out if file is None else out / file,
            dtype=dtype,
            difference=difference,
            bound=bound,
            trained=trained,
            adapter=None if written.adapter is None else out / written.adapter.name,
        )
        for licence in licences:
            shutil.copyfile(licence, work / licence.name)
        write_text(work / "README.md", exported_card(card, name=name, file=file, said=exported.said))
    say(f"export: {exported.said}")
    return exported


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What was written, and what it has to be when it is read back.

    Attributes:
        path: what to load.
        seen: logits and token ids of the source.
        weights: digests of weights that must come back bit for bit; None where they are rounded.
        adapter: the file of the adapters that belong to it.
    """

    path: Path
    seen: LogitProbe
    weights: Mapping[str, str] | None = None
    adapter: Path | None = None


def _write_safetensors(work: Path, found: Exportable, dtype: str) -> _Written:
    seen = probe(found.original, found.tokenizer)
    save_student(found.model.to(DTYPES[dtype]), found.tokenizer, work)  # type: ignore[arg-type]
    return _Written(path=work, seen=seen)


def _write_gguf(work: Path, found: Exportable, dtype: str, say: Callable[[str], None], *, trained: bool) -> _Written:
    require_known(found.model.config)
    adapters = None
    if trained and found.quantized is not None and found.quantized.trained == "frozen":
        assert found.folder is not None
        adapters = read_adapters(found.folder / "quantized")
    encoding = _encoding(found, dtype, adapters, say, trained=trained)
    path = work / _gguf_name(found.name, dtype)
    seen, weights = None, None
    if not trained:
        seen = probe(found.original, found.tokenizer)
    if encoding.blocks:
        put_back(found.model, encoding.blocks)
        weights = digests(found.model)
    license = front_matter(found.card).get("license")
    write_gguf(
        path,
        found.model,
        found.tokenizer,
        name=found.name,
        encoding=encoding,
        license=license if isinstance(license, str) else None,
    )
    beside = None
    if adapters is not None:
        beside = path.with_name(f"{path.stem}-lora.gguf")
        write_gguf_adapter(beside, found.model.config, adapters, name=found.name)
    ends = end_texts(found.tokenizer, stop_ids(found.model))
    adapter = None if beside is None else beside.name
    write_text(work / MODELFILE, modelfile(path.name, adapter=adapter, ends=ends))
    # The blocks that were trained are compared with what they stand for, without adapters.
    return _Written(path=path, seen=seen or probe(found.model, found.tokenizer), weights=weights, adapter=beside)


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
                raise BlockingIOError  # its holder has just removed it, and another process may hold a new one
        except BlockingIOError:
            raise LimbeckError(f"{out} is being written by another export; wait for it, or name another") from None
        try:
            # The holder of the lock may have finished after our look at the folder.
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
    short = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"} | {name: name.upper() for name in GGUF_FORMATS}
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"
    return f"{plain}-{short[dtype]}.gguf"


def _encoding(
    found: Exportable, dtype: str, adapters: Adapters | None, say: Callable[[str], None], *, trained: bool
) -> Encoding:
    """How the matrices of a GGUF file are written.

    Raises:
        LimbeckError: weights that were changed after they were trained as blocks.
    """
    if not trained:
        if found.quantized is not None:
            say(f"export: the student was trained as {most_of(found.quantized)}; {dtype} rounds its weights again")
        return Encoding.rounded(found.model, dtype, say) if dtype in GGUF_FORMATS else Encoding(dtype=dtype)
    assert found.quantized is not None
    encoding = Encoding.of_blocks(found.quantized)
    if adapters is not None:
        require_merged(found.model, encoding.blocks, adapters)
    elif (name := differing(found.model, encoding.blocks)) is not None:
        raise LimbeckError(
            f"{name} is not what its block stands for: it was changed after training; delete the folder quantized "
            "beside the weights to export these as they are, or name a --dtype"
        )
    return encoding
