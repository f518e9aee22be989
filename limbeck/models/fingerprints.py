"""Content hashes of models and tokenizers, so that a run records exactly what it used."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.models.sources import Source, shards_of_index
from limbeck.runtime.hashing import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHA256 = re.compile(r"[0-9a-f]{64}")
# What transformers reads beside configuration and weights: tokenizer, chat templates, generation settings, adapters,
# and the Python files of a model that brings its own.
_BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("generation_config.json", "adapter_config.json", "*.safetensors.index.json", "*.py"),
)


def weight_files(source: Source) -> list[Path]:
    """The files that make the model: the GGUF, or config.json and every safetensors file, sorted by name."""
    if source.gguf is not None:
        return [source.gguf]
    named = (shard for shard in shards_of_index(source.directory) if shard.is_file())
    shards = {*source.directory.glob("*.safetensors"), *named}
    return [source.directory / "config.json", *sorted(shards)]


def model_files(source: Source) -> list[Path]:
    """Every file that decides the model's output: `weight_files`, tokenizer, chat template, settings, adapters."""
    if source.gguf is not None:
        return weight_files(source)
    beside = {path for pattern in _BESIDE for path in source.directory.glob(pattern)}
    return [*weight_files(source), *sorted(path for path in beside if path.is_file())]


def model_fingerprint(source: Source) -> str:
    """sha256 over names and contents of `model_files`. The same bytes give the same value, wherever they lie."""
    return _fingerprint(source, model_files(source))


def description_fingerprint(source: Source) -> str:
    """The same without the weights, for a model that runs elsewhere; a GGUF file has no part without them."""
    weights = [] if source.gguf is not None else [path for path in weight_files(source) if path.suffix != ".json"]
    return _fingerprint(source, [path for path in model_files(source) if path not in weights])


def _fingerprint(source: Source, files: list[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        # The GGUF's own name is the user's choice and no part of the model.
        name = "gguf" if source.gguf is not None else path.relative_to(source.directory).as_posix()
        whole.update(f"{name}\0{_content(path)}\n".encode())
    return whole.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the rules of the tokenizer: vocabulary, merges, normalisation, special tokens, chat template."""
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
    """Rules of a fast tokenizer, as in its JSON, without padding and truncation: those belong to the last call."""
    backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    rules: dict[str, Any] = json.loads(backend.to_str())
    return {key: value for key, value in rules.items() if key not in ("padding", "truncation")}


def _content(path: Path) -> str:
    real = path.resolve()
    # The hub cache names a large file's blob by its sha256 already.
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name
    return sha256_of(real)
