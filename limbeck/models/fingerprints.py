"""Content hashes of models and tokenizers, so that a run can say exactly what it used."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.models.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHA256 = re.compile(r"[0-9a-f]{64}")


def weight_files(source: Source) -> list[Path]:
    """The files that make the model: the GGUF, or config.json and every safetensors file, sorted by name."""
    if source.gguf is not None:
        return [source.gguf]
    return [source.directory / "config.json", *sorted(source.directory.glob("*.safetensors"))]


def model_fingerprint(source: Source) -> str:
    """sha256 over names and contents of `weight_files`. The same bytes give the same value, wherever they lie."""
    whole = hashlib.sha256()
    for path in weight_files(source):
        # The GGUF's own name is the user's choice and no part of the model.
        name = "gguf" if source.gguf is not None else path.name
        whole.update(f"{name}\0{_content(path)}\n".encode())
    return whole.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over what the tokenizer does: vocabulary, merges, normalisation, special tokens, chat template."""
    record: dict[str, object] = {
        "special": {role: str(token) for role, token in sorted(tokenizer.special_tokens_map.items())},
        "chat_template": tokenizer.chat_template,
    }
    if tokenizer.is_fast:
        record["rules"] = backend_rules(tokenizer)
    else:
        record["vocabulary"] = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def backend_rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a fast tokenizer does, as its JSON has it, without padding and truncation: those belong to the last call."""
    backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    rules: dict[str, Any] = json.loads(backend.to_str())
    return {key: value for key, value in rules.items() if key not in ("padding", "truncation")}


def _content(path: Path) -> str:
    real = path.resolve()
    # The hub cache names a large file's blob by its sha256 already.
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name
    stat = real.stat()
    return _digest(real, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """`size` and `mtime_ns` are part of the cache's key alone."""
    del size, mtime_ns
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
