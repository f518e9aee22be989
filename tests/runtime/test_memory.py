"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes

import pytest
import torch

from limbeck.runtime.memory import give_back_freed, resident_memory

MIB = 1 << 20


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_memory_of_freed_tensors_is_given_back() -> None:
    torch.empty(31 * MIB, dtype=torch.uint8)  # from now on glibc keeps smaller ones
    held = [torch.ones(4 * MIB, dtype=torch.uint8) for _ in range(64)]
    last = torch.ones(4 * MIB, dtype=torch.uint8)  # what lies above holds a heap up
    before = resident_memory()
    del held
    assert resident_memory() > before - 16 * MIB
    give_back_freed()
    assert resident_memory() < before - 192 * MIB
    assert last.all()
