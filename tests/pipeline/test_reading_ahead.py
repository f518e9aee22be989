"""Runs whose next micro-batch is prepared in a thread, as for a CUDA device: the same student, whatever is read."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from limbeck.pipeline.cached_teacher import CachedTeacher
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.signal_windows import SignalWindows
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.teachers.across import SharedSource
from limbeck.teachers.store.source import StoredSignals
from limbeck.training import micro_batches
from limbeck.types import Signal, TokenBatch
from tests.pipeline.test_signal_windows import ROWS
from tests.tiny_pair import TinyPair, write_prompts

AHEAD = "limbeck-background"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    pair = TinyPair.write(tmp_path_factory.mktemp("pair"))
    write_prompts(pair.prompts, ROWS)
    return pair


CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "store": (StoredSignals, {"train": {"eval_steps": 4, "eval_size": 8}}),
    "windows": (SignalWindows, {"teacher": {"cache_limit_gib": 16 * 2**10 / 2**30}}),
    "rounds": (CachedTeacher, {"responses": {"source": {"name": "student", "refresh": 3}}}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_student_is_the_same(tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    kind, sections = CASES[case]
    read, threads = kind.read_stored, list[str]()

    def watched(self: Any, batch: TokenBatch) -> Signal | None:
        signal = read(self, batch)
        if signal is not None:
            threads.append(threading.current_thread().name)
        return signal

    monkeypatch.setattr(kind, "read_stored", watched)
    students = []
    for ahead in (False, True):
        base = {"responses": {"source": "data"}, **sections}
        tree = tiny.tree(tmp_path / str(ahead), **base)
        tree["train"] |= {"max_steps": 10, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
        threads.clear()
        with monkeypatch.context() as maybe:
            if ahead:
                maybe.setattr(micro_batches, "pin_of", lambda device: Tensor.clone)
            run = run_pipeline(load_recipe(tree), stages=STAGES, until="train")
        assert threads and (AHEAD in threads) == ahead
        students.append((run.student / "model.safetensors").read_bytes())
    assert students[0] == students[1]


def test_a_teacher_with_other_tokens_reads_its_store_alone() -> None:
    """Merged groups need a pass of the teacher."""
    source = SharedSource(inner=StoredSignals(None, None), readings=None, chain=True)  # type: ignore[arg-type]
    assert source.read_stored(None) is None  # type: ignore[arg-type]
