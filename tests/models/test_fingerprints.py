"""A model's fingerprint sees every file that decides what the model says, and no other; none lies elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from limbeck.models.fingerprints import model_fingerprint
from limbeck.models.sources import resolve
from limbeck.types import LimbeckError
from tests.models.tiny import save_tiny

READ = (
    *("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
    *("generation_config.json", "adapter_config.json", "adapter_model.safetensors", "modeling_own.py", "config.json"),
)


@pytest.mark.parametrize("name", READ)
def test_every_file_that_is_read(tmp_path: Path, name: str) -> None:
    folder = save_tiny(tmp_path / "model")
    seen = [model_fingerprint(resolve(folder))]
    for content in ("{} ", "{}  "):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
        seen.append(model_fingerprint(resolve(folder)))
    assert len(set(seen)) == 3


def test_no_other_file(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    before = model_fingerprint(resolve(folder))
    for name in ("README.md", "student.json", "LICENSE", "notes.txt"):
        (folder / name).write_text("anything")
    assert model_fingerprint(resolve(folder)) == before


def with_index(folder: Path, shard: str) -> Path:
    """Move the weights elsewhere and name the place in an index."""
    weights = folder / "model.safetensors"
    (folder / shard).parent.mkdir(exist_ok=True)
    weights.rename(folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    # Something else with the ending, so that only the index tells.
    (folder / "other.safetensors").write_bytes((folder / shard).read_bytes())
    return folder / shard


def test_a_shard_in_a_folder_below_is_seen(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    shard = with_index(folder, "below/x.safetensors")
    before = model_fingerprint(resolve(folder))
    shard.write_bytes(shard.read_bytes() + b" ")
    assert model_fingerprint(resolve(folder)) != before
    shard.unlink()
    with pytest.raises(LimbeckError, match=r"lacks x\.safetensors, which its index names"):
        resolve(folder)


@pytest.mark.parametrize("place", ["../outside/x.safetensors", "{}/x.safetensors", "a/../../x.safetensors"])
def test_a_shard_elsewhere_is_refused(tmp_path: Path, place: str) -> None:
    folder = save_tiny(tmp_path / "model")
    (tmp_path / "outside").mkdir()
    (folder / "a").mkdir()
    with_index(folder, place.format(tmp_path / "outside"))
    with pytest.raises(LimbeckError, match="which is outside of the model's folder; move the file into the folder"):
        resolve(folder)


@pytest.mark.parametrize("text", ["[]", "null", "{", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 5000])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(LimbeckError, match="is no index of weights"):
        resolve(folder)
