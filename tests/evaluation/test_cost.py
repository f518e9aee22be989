"""What a model costs: counts against files and tensors, times against a clock of our own."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import limbeck
from limbeck.evaluation.cost import parameters, timed_in_turns, weight_bytes
from limbeck.models.loading import load_model
from limbeck.types import LimbeckError
from tests.tiny_pair import TinyPair

IDS = (5, 9, 12, 40, 7)


@pytest.fixture(scope="module")
def model(tiny: TinyPair) -> Any:
    return load_model(tiny.teacher).model


def test_counts_are_those_of_the_file(tiny: TinyPair, model: Any) -> None:
    stored = load_file(tiny.teacher / "model.safetensors")
    assert "lm_head.weight" not in stored, "the head is tied, so it counts once"
    assert parameters(model) == sum(tensor.numel() for tensor in stored.values())
    held = sum(tensor.numel() * 4 for tensor in stored.values())
    assert weight_bytes(model) == held + sum(buffer.numel() * 4 for buffer in model.buffers())
    assert weight_bytes(load_model(tiny.teacher, dtype="bfloat16").model) == pytest.approx(held / 2, rel=0.01)


def test_every_token_is_one_pass_over_one_token(model: Any) -> None:
    """The tokens are those of generate: each step reads the one before it and the cache, nothing again."""
    read: list[torch.Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    try:
        timed_in_turns({"student": (model, IDS)}, new_tokens=6, repeats=1)
    finally:
        hook.remove()
    assert [tuple(ids.shape) for ids in read] == [(1, 5), *[(1, 1)] * 6] * 2
    written = [int(ids) for ids in read[1:7]]
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(torch.tensor([IDS]), attention_mask=torch.ones(1, 5, dtype=torch.long), **settings)
    assert written == expected[0, 5:].tolist()


def test_two_models_take_turns_and_the_first_round_does_not_count(model: Any) -> None:
    ticks = itertools.count()
    found = timed_in_turns(
        {"student": (model, IDS), "teacher": (model, IDS)}, new_tokens=4, repeats=2, clock=lambda: float(next(ticks))
    )
    assert {name: len(timings) for name, timings in found.items()} == {"student": 2, "teacher": 2}
    assert all(t.prefill_s == 1 and t.step_s == 1 / 4 for timings in found.values() for t in timings)
    assert next(ticks) == 3 * 3 * 2, "three looks at the clock, three rounds, two models"


def test_what_does_not_fit_the_window_is_refused(model: Any) -> None:
    with pytest.raises(
        LimbeckError, match=r"129 tokens .*expected at most 128.*the student; lower evaluate\.groups\.cost"
    ):
        timed_in_turns({"student": (model, [5] * 121)}, new_tokens=8, repeats=1)


def test_the_group(tiny: TinyPair, tmp_path: Path) -> None:
    section = {"prompt_tokens": 48, "new_tokens": 4, "repeats": 3}
    run = limbeck.run(tiny.tree(tmp_path / "run", evaluate={"groups": {"cost": section}}))
    after, before = run.scores["after"], run.scores["before"]
    assert not before and not run.scores["change"]
    record = json.loads((run.student / "student.json").read_text("utf-8"))
    assert after["parameters"]["mean"] == record["parameters"] / 1e6
    assert after["teacher_parameters"]["mean"] == record["teacher_parameters"] / 1e6
    assert after["disk_size"]["mean"] == record["size_mb"]
    assert after["parameters"]["n"] == 1 and after["parameters"]["low"] is None
    model = load_model(run.student).model
    cache = model(torch.tensor([IDS]), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert after["cache_size"]["mean"] == held / len(IDS) / 1e3
    for metric in ("prefill_speed", "decode_speed", "teacher_prefill_speed", "teacher_decode_speed"):
        score = after[f"{metric}@prompt=48"]
        assert score["n"] == 3 and score["low"] <= score["mean"] <= score["high"]
    detail = json.loads((run.directory / "scores/after.cost.json").read_text("utf-8"))["detail"]
    assert detail["student_over_teacher"]["parameters"] == pytest.approx(
        record["parameters"] / record["teacher_parameters"]
    )
    lines = (run.directory / "scores/after.cost@prompt=48.jsonl").read_text("utf-8").splitlines()
    middle = sorted(json.loads(line)["decode_speed"] for line in lines)[1]
    assert detail["student"]["decode_speed"] == middle


def test_a_prompt_longer_than_the_pair_can_read_is_refused_before_any_work(tiny: TinyPair, tmp_path: Path) -> None:
    tree = tiny.tree(tmp_path / "run", evaluate={"groups": ["cost"]})
    with pytest.raises(LimbeckError, match=r"288 tokens .*expected at most 128.*pair; lower evaluate\.groups\.cost"):
        limbeck.run(tree)
    assert not (tmp_path / "run" / "responses").exists()
