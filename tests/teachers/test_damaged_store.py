"""Files of a signal that hold something else: named, with a remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from limbeck.teachers.stored import read_head, shards_of, write_head
from limbeck.types import Head, LimbeckError


@pytest.mark.parametrize("name", ["zzz", "row-0000012", f"{3:015}x", f"{1:016}.zzz", f"{1:016}.ids.ids"])
def test_a_shard_of_other_tensors(tmp_path: Path, name: str) -> None:
    save_file({f"{3:016}": torch.zeros(2, 2), name: torch.zeros(2)}, tmp_path / "00001.safetensors")
    with pytest.raises(LimbeckError, match=rf"00001\.safetensors is damaged \(it holds {name}\); delete it and run"):
        shards_of(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", "{}", "3", '{"scale": "x", "softcap": null, "vocab_size": 5}', "{"])
def test_scalars_of_a_head(tmp_path: Path, text: str) -> None:
    write_head(tmp_path, Head(weight_VD=torch.zeros(5, 2), vocab_size=5))
    (tmp_path / "head.json").write_text(text)
    with pytest.raises(LimbeckError, match=r"head\.json is damaged .*; delete it and run the same command again"):
        read_head(tmp_path)


@pytest.mark.parametrize("tensors", [{}, {"zzz": 5}, {"weight": 4}, {"weight": 5, "more": 5}])
def test_weights_of_a_head(tmp_path: Path, tensors: dict[str, int]) -> None:
    (tmp_path / "head.json").write_text(json.dumps({"scale": 1.0, "softcap": None, "vocab_size": 5}))
    save_file({name: torch.zeros(rows, 2) for name, rows in tensors.items()}, tmp_path / "head.safetensors")
    with pytest.raises(LimbeckError, match=r"head\.safetensors is damaged"):
        read_head(tmp_path)
