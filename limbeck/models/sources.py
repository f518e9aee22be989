"""Files of a model by its name: shipped assets, local directories, GGUF files, hub ids.

    smollm2-135m-instruct      a shipped asset (`limbeck.models.assets`)
    ./my-model                 a directory in the ecosystem's form: config.json, safetensors, tokenizer
    model.Q4_K_M.gguf          a GGUF file, dequantised when loaded
    Qwen/Qwen2.5-0.5B          a hub id; `hub:NAME` where a local path has the same name

Weights are safetensors, never pickles. With HF_HUB_OFFLINE=1 hub ids come from the local hub cache alone; without a
network they do too, after one short attempt.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Literal

from limbeck.models.assets import ASSETS, DownloadProgress, fetch
from limbeck.models.folders import require_own_tokenizer, require_sound_folder
from limbeck.models.quiet import one_line, quiet_transformers
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

HUB_TIMEOUT_S = 10.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_ELSEWHERE = ("*/*", "consolidated*", "*.bin.index.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Location of a model.

    Attributes:
        name: what was asked for.
        directory: holds config.json, weights and tokenizer; for a GGUF file the folder it lies in.
        gguf: the GGUF file, else None.
        revision: the hub's commit, else None.
        license: as the asset or the hub declares it, where known.
    """

    name: str
    kind: Literal["asset", "directory", "gguf", "hub"]
    directory: Path
    gguf: Path | None = None
    revision: str | None = None
    license: str | None = None


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    weights: bool = True,
    trust_remote_code: bool = False,
    progress: DownloadProgress | None = None,
) -> Source:
    """Find a model, fetching it where needed.

    Args:
        revision: branch, tag or commit of a hub model.
        weights: False fetches configuration and tokenizer alone, where the source allows it.
        trust_remote_code: fetch the Python files of a hub model too.

    Raises:
        LimbeckError: no such model, gated, unreachable (within seconds), no safetensors weights.
    """
    text = str(name)
    if text.startswith("hub:"):
        return _hub(text.removeprefix("hub:"), revision, weights, trust_remote_code, progress)
    if revision is None and text in ASSETS:
        return Source(name=text, kind="asset", directory=fetch(text, progress=progress), license=ASSETS[text].license)
    path = Path(text).expanduser()
    if path.exists():
        if revision is not None:
            raise LimbeckError(
                f"revision {revision!r} given for the local model {text}; only hub models have revisions"
            )
        return _local(text, path, weights)
    if _HUB_ID.fullmatch(text) and path.suffix != ".gguf":
        return _hub(text, revision, weights, trust_remote_code, progress)
    raise LimbeckError(
        f"no model {text!r}: there is no such directory or file{_nearest(text)}; "
        f"give a model directory, a .gguf file, a hub id or one of {', '.join(ASSETS)}"
    )


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), ASSETS, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _local(name: str, path: Path, weights: bool) -> Source:
    if path.is_file():
        from limbeck.models.gguf import is_gguf

        if not is_gguf(path):
            raise LimbeckError(f"{name} is a file but no GGUF file; give a model directory or a .gguf file")
        require_own_tokenizer(path.resolve().parent)
        return Source(name=name, kind="gguf", directory=path.resolve().parent, gguf=path.resolve())
    if not (path / "config.json").is_file():
        raise LimbeckError(f"{name} is no model: {_what_instead(path)}")
    require_sound_folder(path)
    if weights:
        require_safetensors(name, [file.name for file in path.iterdir()])
        require_inside(name, path)
    return Source(name=name, kind="directory", directory=path.resolve())


def _what_instead(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return "it holds a LoRA adapter; merge it into its base model with `limbeck export` and give that directory"
    if inside := sorted(path.glob("*.gguf")):
        return f"it has no config.json; give the file {inside[0].name} in it"
    return "it has no config.json; give a directory written by save_pretrained"


def require_safetensors(name: str, files: list[str]) -> None:
    """Refuse a model whose weights are missing or can only be unpickled.

    Raises:
        LimbeckError: names what there is instead and how to convert it.
    """
    if any(file.endswith(".safetensors") for file in files):
        return
    pickles = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickles:
        raise LimbeckError(
            f"{name} has only pickled weights ({pickles[0]}), which can run code when opened; "
            "convert them to safetensors with transformers' save_pretrained if you trust them"
        )
    raise LimbeckError(f"{name} has a config.json but no .safetensors weights; expected model.safetensors")


def shards_of_index(folder: Path) -> list[Path]:
    """The weight files that a model's index names, in their order of first mention; none without an index.

    Raises:
        LimbeckError: the index is no index, or names a file outside of the folder.
    """
    return [shard for path in sorted(folder.glob("*.safetensors.index.json")) for shard in _shards_of(path)]


def _shards_of(path: Path) -> list[Path]:
    try:
        named = json.loads(path.read_text("utf-8"))["weight_map"].values()
        shards = list(dict.fromkeys(PurePath(name) for name in named))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise LimbeckError(
            f"{path} is no index of weights ({one_line(error)}); expected an object weight_map of tensor to file: "
            "download the model again"
        ) from None
    outside = next((shard for shard in shards if shard.is_absolute() or ".." in shard.parts), None)
    if outside is not None:
        raise LimbeckError(
            f"{path} names {str(outside)!r}, which is outside of the model's folder; move the file into the folder and "
            "name it there"
        )
    return [path.parent / shard for shard in shards]


def require_inside(name: str, folder: Path) -> None:
    """Refuse a model that does not lie in its folder as a whole: what lies elsewhere can change unseen.

    Raises:
        LimbeckError: names the file that is outside, or is not there.
    """
    if absent := next((shard for shard in shards_of_index(folder) if not shard.is_file()), None):
        raise LimbeckError(f"{name} lacks {absent.name}, which its index names; download it again")


def _hub(
    repo: str, revision: str | None, weights: bool, trust_remote_code: bool, progress: DownloadProgress | None
) -> Source:
    from huggingface_hub import errors, is_offline_mode

    if not _HUB_ID.fullmatch(repo):
        raise LimbeckError(f"{repo!r} is no hub id; expected owner/name")
    patterns = [*_SMALL_FILES, *(["*.safetensors"] if weights else []), *(["*.py"] if trust_remote_code else [])]
    if is_offline_mode():
        return _cached(repo, revision, patterns, weights, "HF_HUB_OFFLINE is set")
    try:
        info = _ask(repo, revision)
        if weights:
            require_safetensors(repo, [sibling.rfilename for sibling in info.siblings or []])
        return _download(repo, info, patterns, weights, progress)
    except errors.GatedRepoError as error:
        raise LimbeckError(
            f"the hub model {repo} is gated; accept its terms at https://huggingface.co/{repo} and log in "
            "(`hf auth login` or HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise LimbeckError(f"the hub model {repo} has no revision {revision!r}; leave it out for the newest") from error
    except errors.RepositoryNotFoundError as error:
        raise LimbeckError(
            f"no model {repo!r}: no such path here and no such model on the hub (or it is private and you are "
            f"not logged in){_nearest(repo)}; check the name, or log in with `hf auth login`"
        ) from error
    except network_errors() as error:
        return _cached(repo, revision, patterns, weights, f"the hub cannot be reached ({one_line(error)})")


def fetch_weights(source: Source, names: Collection[str]) -> None:
    """Fetch the files of weights of a hub model that hold some tensors, into the folder of its small ones.

    Args:
        names: of the tensors; names that it lacks are passed over.

    Raises:
        LimbeckError: the hub cannot be reached, and they are not here.
    """
    from huggingface_hub import hf_hub_download

    shards = {
        file
        for index in source.directory.glob("*.safetensors.index.json")
        for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()
        if name in names
    }
    for file in sorted(shards) or ["model.safetensors"]:
        if not (source.directory / file).is_file():
            try:
                hf_hub_download(source.name.removeprefix("hub:"), file, revision=source.revision)
            except network_errors() as error:
                raise LimbeckError(
                    f"{file} of the hub model {source.name} is not here and cannot be fetched ({one_line(error)}); "
                    "connect, or give a local directory"
                ) from error


def network_errors() -> tuple[type[Exception], ...]:
    """Exceptions of the hub's client when the network fails; its HTTP library differs between versions."""
    from huggingface_hub import errors

    roots = [base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    return (*roots, OSError)


def _ask(repo: str, revision: str | None) -> ModelInfo:
    """One request decides within seconds whether there is a hub, such a model, such a revision."""
    from huggingface_hub import HfApi

    return HfApi().model_info(repo, revision=revision, timeout=HUB_TIMEOUT_S)


def _download(
    repo: str, info: ModelInfo, patterns: list[str], weights: bool, progress: DownloadProgress | None
) -> Source:
    from huggingface_hub import snapshot_download

    if progress is not None and weights:
        progress(f"fetching {repo} at {(info.sha or 'main')[:8]} from the hub, once")
    # A long download gets the hub's own progress bar in a terminal.
    with contextlib.nullcontext() if sys.stderr.isatty() else quiet_transformers():
        folder = snapshot_download(repo, revision=info.sha, allow_patterns=patterns, ignore_patterns=list(_ELSEWHERE))
    card = info.card_data.to_dict() if info.card_data is not None else {}
    return _snapshot(repo, Path(folder), weights, card.get("license"))


def _cached(repo: str, revision: str | None, patterns: list[str], weights: bool, why: str) -> Source:
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=list(_ELSEWHERE), local_files_only=True
        )
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        raise LimbeckError(
            f"no model {repo!r}: no such path here, and {why} while the hub cache has no copy{_nearest(repo)}; "
            f"connect, or give a local directory, a .gguf file or one of {', '.join(ASSETS)}"
        ) from error
    return _snapshot(repo, Path(folder), weights, None)


def _snapshot(repo: str, folder: Path, weights: bool, license_name: object) -> Source:
    if not (folder / "config.json").is_file():
        raise LimbeckError(f"the hub model {repo} has no config.json; give a model in transformers' form")
    require_sound_folder(folder)
    if weights:
        require_safetensors(repo, os.listdir(folder))
        require_inside(repo, folder)
    name = license_name if isinstance(license_name, str) else None
    return Source(name=repo, kind="hub", directory=folder, revision=folder.name, license=name)
