"""Two processes on the CPU (gloo) do what one does: the same updates, one set of files, one decision to stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.authors import SCENARIOS, play_author
from tests.distributed.updates import UPDATES, play_update
from tests.training.play import identical, largest_gap, metrics, weights


def ended(played: Path, name: str, rank: int = 0) -> dict[str, Tensor]:
    return load_file(played / name / f"rank{rank}.safetensors")


@pytest.mark.parametrize("name", UPDATES)
def test_two_processes_make_the_update_of_one(played, tmp_path, name):
    student = play_update(name, tmp_path, played / "model")
    assert largest_gap(weights(student), ended(played, name)) < 1e-10
    assert identical(ended(played, name, 0), ended(played, name, 1))
    for one, two in zip(metrics(tmp_path), metrics(played / name), strict=True):
        assert (one["step"], one["tokens"], one["learning_rate"]) == (two["step"], two["tokens"], two["learning_rate"])
        # Ranks exchange what is logged in float32.
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-6)
        assert ("loss/lm" in one) == ("loss/lm" in two) == name.startswith("text")
        if "loss/lm" in one:
            assert one["lm_tokens"] == two["lm_tokens"]
            assert one["loss/lm"] == pytest.approx(two["loss/lm"], rel=1e-6)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_write_what_one_writes(played, tmp_path, name):
    """Each row has random numbers of its own, so that the ids are the same whoever writes a response, beside whom."""
    student, written = play_author(name, tmp_path, per_device_train_batch_size=8)
    there = [json.loads((played / name / f"written-rank{rank}.json").read_text()) for rank in range(2)]
    assert there[0] == there[1] == json.loads(json.dumps(written))
    assert any(author == "student" for step in written for _, author, _ in step)
    assert largest_gap(weights(student), ended(played, name)) < 1e-10
    assert identical(ended(played, name, 0), ended(played, name, 1))
    for one, two in zip(metrics(tmp_path), metrics(played / name), strict=True):
        for key in ("step", "tokens", "share", "buffer", "responses/count", "responses/length"):
            assert one.get(key) == two.get(key)
        assert one.keys() == two.keys()
        for key in one.keys() & {"loss", "kl_p99", "gap/student", "alpha/student", "log_q/student"}:
            assert one[key] == pytest.approx(two[key], rel=1e-6)
    paths = [sorted(p.relative_to(r) for p in r.glob("rounds/**/*.jsonl")) for r in (tmp_path, played / name)]
    assert paths[0] == paths[1] and bool(paths[0]) == (name in ("rounds", "pairs"))
    if name == "replay":
        assert metrics(tmp_path)[-1]["share"] > 0.7


def test_a_wish_on_one_rank_stops_both_and_both_continue_bit_for_bit(played):
    assert identical(ended(played, "straight"), ended(played, "continued"))
    assert identical(ended(played, "continued", 0), ended(played, "continued", 1))
    assert [line["step"] for line in metrics(played / "continued")] == [1, 2, 3, 4, 5]
    assert [p.name for p in (played / "continued" / "checkpoints").iterdir()] == ["step-000003"]


def test_nan_on_one_rank_stops_both_before_the_update(played):
    for rank in range(2):
        message = json.loads((played / f"messages-rank{rank}.json").read_text())["poisoned"]
        assert message.startswith("step 3:") and "step-000002" in message
        kept = load_file(played / "poisoned" / "checkpoints" / "step-000002" / "model.safetensors")
        end = {f"student.{name}": weight for name, weight in ended(played, "poisoned", rank).items()}
        assert identical(kept, {name: end[name] for name in kept})
