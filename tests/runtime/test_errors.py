"""Errors from outside limbeck, in one line; errors of limbeck itself keep their traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limbeck.runtime.errors import explain, in_one_line
from limbeck.types import LimbeckError


class TestFailures:
    def test_of_a_real_allocation(self) -> None:
        with pytest.raises(LimbeckError, match="out of memory"), in_one_line():
            torch.empty(1 << 50, dtype=torch.uint8)

    def test_damaged_weights(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        (tmp_path / "a.safetensors").write_bytes(b"12345678{")
        with (
            pytest.raises(LimbeckError, match=rf"{tmp_path / 'a.safetensors'} is damaged .*; delete it"),
            in_one_line(),
        ):
            load_file(tmp_path / "a.safetensors")

    @pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), KeyError("x")])
    def test_own_faults_keep_their_traceback(self, error: Exception) -> None:
        assert explain(error) is None
        with pytest.raises(type(error)), in_one_line():
            raise error

    def test_own_lines_pass(self) -> None:
        line = LimbeckError("a line")
        with pytest.raises(LimbeckError) as caught, in_one_line():
            raise line
        assert caught.value is line
