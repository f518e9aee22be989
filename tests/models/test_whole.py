"""The whole copy of a model whose weights lie in files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from limbeck.models.whole import keep_copy, whole_on_first_rank
from tests.training.play import identical, tiny_model, weights


def test_weights_in_files_are_those_of_the_model_and_go_with_the_block(tmp_path: Path) -> None:
    model, folder = tiny_model(1), tmp_path / "w"
    keep_copy(model, torch.device("cpu"))
    with whole_on_first_rank(model, folder) as copied:
        assert copied is not model and identical(weights(copied), weights(model))
        assert sum(file.stat().st_size for file in folder.iterdir()) == sum(w.nbytes for w in model.parameters())
    assert not folder.exists() and not any(weight.numel() for weight in copied.parameters())


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    model, folder = tiny_model(1), tmp_path / "w"
    keep_copy(model, torch.device("cpu"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space") as said, whole_on_first_rank(model, folder):
        pass
    assert said.value.filename == str(folder / "000000") and not folder.exists()
