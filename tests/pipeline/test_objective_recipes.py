"""Objectives of every kind play through the real command, and what their temperature came to is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from limbeck.rollouts.io import read_responses
from tests.limbeck_command import CommandServer
from tests.tiny_pair import TinyPair

SUM = {"name": "sum", "parts": [{"name": "csd", "weight": 0.5}, {"name": "ce"}, {"name": "hidden", "weight": 0.1}]}


@pytest.mark.parametrize(
    ("objective", "factors"),
    [
        ({"name": "fkl", "temperature": 2.0}, {"fkl": 4.0}),
        ({"name": "tv", "temperature": 2.0}, {"tv": 2.0}),
        ({"name": "rkl", "temperature": 2.0, "temperature_scale": "none"}, {"rkl": 1.0}),
        ({"name": "csd", "first": "teacher", "temperature": 2.0}, {"csd": 1.0}),
        (SUM, {"csd": 1.0}),
        ({"name": "tad", "per_sequence": True}, {"tad": 1.0}),
        ({"name": "fkl", "temperature": 2.0, "temperature_adapt": 0.5}, {"fkl": None}),
    ],
)
def test_the_resolved_factor_is_recorded(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, objective: dict, factors: dict[str, float | None]
) -> None:
    run = tmp_path / "run"
    tree = tiny.tree(run, train={"max_steps": 2}, evaluate={"groups": ["fidelity"]})
    tree["objective"] = objective
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tree), "utf-8")
    done = limbeck.run("run", str(recipe), cwd=tmp_path)
    assert done.code == 0, done.stderr
    recorded = json.loads((run / "stages" / "train.json").read_text("utf-8"))["temperature"]
    assert {name: recorded[name]["factor"] for name in factors} == factors


def played(limbeck: CommandServer, tiny: TinyPair, run: Path, **sections: dict[str, Any]) -> list[dict[str, Any]]:
    """Play a recipe for four steps; the lines of its metrics."""
    sections.setdefault("train", {"max_steps": 4})
    done = limbeck.run("run", tiny.recipe(run, evaluate={"groups": ["fidelity"]}, **sections))
    assert done.code == 0, done.stderr
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_a_teacher_in_16_bits_is_stored_in_16_bits_without_loss(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path
) -> None:
    losses, sizes = {}, {}
    for kept in (None, "float32"):
        run = tmp_path / str(kept)
        lines = played(limbeck, tiny, run, teacher={"dtype": "bfloat16", "cache_dtype": kept}, train={"max_steps": 2})
        losses[kept] = [line["loss"] for line in lines]
        sizes[kept] = sum(path.stat().st_size for path in (run / "signal").glob("[0-9]*.safetensors"))
    assert losses[None] == losses["float32"]
    assert sizes[None] < 0.6 * sizes["float32"]


def test_a_temperature_that_moves(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    moving = {"temperature": 4.0, "temperature_end": 1.0, "temperature_shape": "linear"}
    lines = played(limbeck, tiny, tmp_path / "run", objective=moving)
    assert [line["temperature"] for line in lines] == pytest.approx([4.0, 3.0, 2.0, 1.0])
    recorded = json.loads((tmp_path / "run" / "stages" / "train.json").read_text("utf-8"))["temperature"]["fkl"]
    assert (recorded["student"], recorded["student_end"], recorded["factor"], recorded["factor_end"]) == (4, 1, 16, 1)


def test_an_option_that_moves(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    walking = {"name": "taid", "temperature": 1.0, "schedule": {"progress": [0.4, 1.0]}}
    lines = played(limbeck, tiny, tmp_path / "run", objective=walking)
    assert [line["progress"] for line in lines] == pytest.approx([0.4, 0.6, 0.8, 1.0])
    # At the end the target is the teacher: the loss is the forward KL, and before it is less.
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["forward_kl"], rel=1e-4)
    assert lines[0]["loss"] < 0.5 * lines[0]["forward_kl"]


def test_each_step_says_what_can_be_compared_over_runs(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    parts = [{"name": "fkl", "weight": 0.5}, {"name": "ce"}]
    lines = played(limbeck, tiny, tmp_path / "run", objective={"name": "sum", "parts": parts, "temperature": 2.0})
    for line in lines:
        assert line["loss"] == pytest.approx(0.5 * line["loss/fkl"] + line["loss/ce"], rel=1e-4)
        assert line["student_entropy"] > 0 and line["teacher_entropy"] > 0 and line["forward_kl"] > 0
    # The loss is at temperature 2, the measure at 1.
    assert lines[0]["forward_kl"] != pytest.approx(lines[0]["loss/fkl"], rel=1e-2)


@pytest.mark.parametrize("support", ["topk_tail", "topk_renorm", "sampled"])
def test_sparse_supports(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, support: str) -> None:
    from limbeck.teachers.store.addresses import address_of
    from limbeck.teachers.store.reader import Store, codec_name

    run = tmp_path / "run"
    lines = played(limbeck, tiny, run, teacher={"support": support, "support_k": 5}, objective={"temperature": 1.0})
    assert all(line["loss"] == line["loss"] for line in lines)
    responses = read_responses(run / "responses" / "teacher.jsonl")
    store = Store(run / "signal")
    store.locate([address_of(response) for response in responses])
    form = "sampled" if support == "sampled" else "topk"
    for response in responses:
        codec, columns = store.entry(address_of(response))
        # Held-out rows stay whole, since evaluation is over the whole vocabulary; training rows hold five tokens.
        assert codec_name(codec) == ("hidden" if response.split == "heldout" else form)
        assert response.split == "heldout" or columns["logp"].shape == (response.tokens, 5)


def test_all_tokens_kept_is_the_full_support(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    full = played(limbeck, tiny, tmp_path / "full", teacher={"cache": False})
    kept = played(limbeck, tiny, tmp_path / "kept", teacher={"support": "topk_tail", "support_k": 300})
    for one, other in zip(full, kept, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_teacher_that_nobody_reads_is_not_asked(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    """Cross-entropy trains to the same bits beside the stored signal and beside none."""
    asked = played(limbeck, tiny, tmp_path / "asked", objective={"name": "ce"})
    unheard = played(limbeck, tiny, tmp_path / "unheard", objective={"name": "ce"}, teacher={"cache": False})
    assert [one["loss"] for one in asked] == [one["loss"] for one in unheard]
    weights = "student/model.safetensors"
    assert (tmp_path / "asked" / weights).read_bytes() == (tmp_path / "unheard" / weights).read_bytes()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"teacher": {"support": "topk_tail", "cache": False}}, ("teacher.support=topk_tail", "teacher.cache=true")),
        ({"teacher": {"support": "topk_tail", "support_k": 100000}}, ("teacher.support_k is 100000", "300")),
        ({"teacher": {"support_temperatures": [2.0]}}, ("teacher.support_temperatures", "full")),
        ({"teacher": {"support": "sampled"}, "objective": {"name": "rkl"}}, ("'rkl'", "'sampled'")),
        (
            {"teacher": {"support": "topk_tail", "support_temperatures": [3.0]}},
            ("temperature 2 is not in the cache", "topk_renorm"),
        ),
        (
            {"teacher": {"support": "topk_tail"}, "objective": {"temperature_end": 1.0}},
            ("objective.temperature_end", "teacher.support=full"),
        ),
        (
            {"objective": {"temperature_end": 1.0, "teacher_temperature": 2.0, "temperature_scale": "none"}},
            ("objective.temperature_end", "remove objective.teacher_temperature"),
        ),
        ({"teacher": {"support": "topk_tail"}, "objective": {"temperature_adapt": 0.5}}, ("adapt", "sparse")),
        ({"teacher": {"support": "topk_tail"}, "objective": {"name": "tad"}}, ("'tad'", "'topk_tail'")),
        ({"objective": {"name": "fkl", "schedule": {"alpha": [0.1, 0.2]}}}, ("'alpha'", "unknown", "none")),
        ({"objective": {"name": "skl", "schedule": {"alpha": [0.1, 1.0]}}}, ("skl alpha=1.0",)),
        ({"objective": {"name": "hidden", "schedule": {"alpha": [0.1, 1.0]}}}, ("'alpha'", "none")),
    ],
)
def test_axes_that_exclude_each_other(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, sections: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused = limbeck.run("run", tiny.recipe(tmp_path / "run", **sections))
    assert refused.code == 2, refused.stderr
    for word in words:
        assert word in refused.error_line
    assert not (tmp_path / "run" / "responses").exists()


def test_a_projection_is_learned_where_widths_differ(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    from transformers import AutoConfig

    narrow = {"init": "scratch", "layers": None, "config": {"hidden_size": 16, "num_hidden_layers": 1}}
    objective = {"name": "hidden", "kind": "mse", "temperature": 1.0}
    lines = played(limbeck, tiny, tmp_path / "run", student=narrow, objective=objective, train={"max_steps": 12})
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert AutoConfig.from_pretrained(tmp_path / "run" / "student").hidden_size == 16
