"""Values that each arm chooses for itself, and runs that come before all arms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from limbeck.prompts.io import read_prompts
from limbeck.recipe.load import load_recipe
from limbeck.runtime.files import read_json
from limbeck.sweep.checks import has_student
from limbeck.types import LimbeckError
from tests.sweep.conftest import Play, Tree, made_here, recipe_tree
from tests.tiny_pair import TinyPair, write_model


class TestTuning:
    def test_each_arm_its_own_best(self, played: Play, tmp_path: Path) -> None:
        rates = [1e-9, 1e-3, 1e30]
        done = played(
            tmp_path / "s",
            grid={"objective.name": ["fkl", "rkl"]},
            tune={"train.learning_rate": rates},
            seeds=[3, 4],
        )
        for name in ("fkl", "rkl"):
            tuning = [line for line in done.lines if line["tuning"] and line["arm"] == f"name={name}"]
            assert [line["state"] for line in tuning] == ["done", "done", "failed"]
            assert [line["keys"]["train.learning_rate"] for line in tuning] == rates
            scores = [read_json(done.root / line["directory"] / "scores.json") for line in tuning[:2]]
            means = [s["after"]["forward_kl"]["mean"] for s in scores]
            for seed in (3, 4):
                line = done.state(f"name={name}", seed)
                assert line["keys"]["train.learning_rate"] == rates[means.index(min(means))]
            # Nothing of the winner is done twice.
            assert made_here(done.root / done.state(f"name={name}", 3)["directory"]) == {"report"}
        assert done.end.runs == 4

    def test_says_where_the_best_is_the_last(self, played: Play, tmp_path: Path) -> None:
        done = played(tmp_path / "s", tune={"train.learning_rate": [1e-9, 1e-3]})
        assert any("the best train.learning_rate is 0.001, an end of [1e-09, 0.001]" in line for line in done.said)

    def test_extends_until_the_best_is_inside(self, played: Play, tmp_path: Path) -> None:
        done = played(tmp_path / "s", tune={"train.learning_rate": [1e-9, 1e-4]}, tune_extend=4)
        rates = [line["keys"]["train.learning_rate"] for line in done.lines if line["tuning"]]
        # The ratio of the last two, until the arm diverges or gets worse; no value is tried twice.
        assert rates[:3] == [1e-9, 1e-4, 10.0] and len(rates) == 3
        assert done.state("base")["keys"]["train.learning_rate"] in rates[1:]
        again = played(tmp_path / "s", tune={"train.learning_rate": [1e-9, 1e-4]}, tune_extend=4)
        assert [line["keys"] for line in again.lines] == [line["keys"] for line in done.lines]

    def test_what_lies_beyond_and_cannot_be_ends_the_list(self, played: Play, tmp_path: Path) -> None:
        """A share of the steps is at most 1: the arms go on with the best of those that can be."""
        done = played(tmp_path / "s", tune={"train.warmup_ratio": [0.9, 0.3]}, tune_extend=3)
        ratios = [line["keys"]["train.warmup_ratio"] for line in done.lines if line["tuning"]]
        best = done.state("base")["keys"]["train.warmup_ratio"]
        assert done.state("base")["state"] == "done" and best in ratios and max(ratios) <= 1
        if best == 0.9:
            assert any("train.warmup_ratio stays at 0.9, since 2.7 cannot be" in line for line in done.said)

    def test_on_other_prompts_than_the_arms_are_compared_on(self, played: Play, tmp_path: Path) -> None:
        development = tmp_path / "dev.jsonl"
        asked = [f"Name the animal number {n}." for n in range(6)]
        development.write_text("".join(json.dumps({"prompt": p, "completion": "okapi"}) + "\n" for p in asked))
        done = played(
            tmp_path / "s",
            tune={"train.learning_rate": [1e-4, 1e-3]},
            tune_on={"prompts.heldout": str(development)},
        )
        for line in done.lines:
            prompts = read_prompts(done.root / line["directory"] / "prompts.jsonl")
            held = {p.text for p in prompts if p.split == "heldout"}
            assert (held == set(asked)) == line["tuning"], line
            assert line["state"] == "done"

    def test_an_arm_that_cannot_be_tuned(self, played: Play, tmp_path: Path) -> None:
        done = played(
            tmp_path / "s",
            arms={"good": {}, "bad": {"train.learning_rate": 1e30}},
            tune={"train.adam_beta2": [0.9, 0.95]},
            seeds=[0, 1],
        )
        assert [done.state("bad", seed)["state"] for seed in (0, 1)] == ["failed", "failed"]
        assert "none of the runs that tune it finished" in done.state("bad")["error"]
        assert done.state("good")["state"] == "done" and done.end.failed == 2

    def test_a_metric_that_is_not_measured(self, played: Play, tmp_path: Path) -> None:
        done = played(tmp_path / "s", tune={"train.learning_rate": [1e-3, 1e-2]}, tune_metric="forward_kl@student")
        assert "forward_kl@student was not measured (but" in done.state("base")["error"]
        assert done.end.failed == done.end.runs == 1


class TestFirst:
    def test_its_student_is_the_teacher(self, played: Play, tiny: TinyPair, tmp_path: Path) -> None:
        first = recipe_tree(tiny, student={"init": "pretrained", "layers": None, "model": str(tiny.teacher)})
        keys: Tree = {"first": {"teacher.model": first}, "arms": {"a": {}, "b": {"objective.name": "rkl"}}}
        done = played(tmp_path / "sweeps" / "s", "prompts.limit=16", **keys)
        teacher = tmp_path / "sweeps" / "s" / "teacher"
        assert [line["state"] for line in done.lines] == ["done", "done"]
        run = load_recipe(done.root / "arms/a/seed=0/recipe.resolved.yaml")
        assert Path(run.teacher.model) == teacher / "student"
        assert load_recipe(teacher / "recipe.resolved.yaml").prompts.limit == 16
        # Another sweep nearby takes it over.
        played(tmp_path / "sweeps" / "t", "prompts.limit=16", **keys)
        assert made_here(tmp_path / "sweeps" / "t" / "teacher") == {"report"}

    def test_a_student_that_is_gone_or_damaged_is_made_again(
        self, played: Play, tiny: TinyPair, tmp_path: Path
    ) -> None:
        first = recipe_tree(tiny, student={"init": "pretrained", "layers": None, "model": str(tiny.teacher)})
        done = played(tmp_path / "s", first={"teacher.model": first})
        student = done.root / "teacher" / "student"
        weights = (student / "model.safetensors").read_bytes()
        (student / "model.safetensors").write_bytes(weights[:5000])
        assert not has_student(load_recipe(done.root / "teacher" / "recipe.resolved.yaml"))
        shutil.rmtree(student)
        again = played(tmp_path / "s", first={"teacher.model": first})
        assert again.lines == done.lines
        assert (student / "model.safetensors").read_bytes() == weights

    def test_what_fails_in_it_is_said_to_be_its_own(self, played: Play, tiny: TinyPair, tmp_path: Path) -> None:
        student = {"init": "pretrained", "layers": None, "model": str(tiny.teacher)}
        first = recipe_tree(tiny, student=student, train={"learning_rate": 1e30})
        with pytest.raises(LimbeckError, match=r"^first\.teacher\.model: step \d+: .* lower train\.learning_rate"):
            played(tmp_path / "s", first={"teacher.model": first})

    def test_a_mistake_in_an_arm_is_seen_before_it(self, played: Play, tiny: TinyPair, tmp_path: Path) -> None:
        for init in ({"init": "scratch", "layers": None}, {"init": "pretrained", "layers": None}):
            first = recipe_tree(tiny, student=init | {"model": str(tiny.teacher)})
            with pytest.raises(LimbeckError, match=r"arm b: unknown key 'objective\.frist'"):
                played(tmp_path / "s", first={"teacher.model": first}, arms={"a": {}, "b": {"objective.frist": 1}})
            assert not (tmp_path / "s").exists()

    def test_a_teacher_with_other_tokens(self, played: Play, tiny: TinyPair, tmp_path: Path) -> None:
        other = write_model(tmp_path / "other", extra=["zebra zebra quagga quagga okapi okapi"] * 9)
        first = recipe_tree(
            tiny,
            teacher={"model": str(other)},
            student={"init": "pretrained", "layers": None, "model": str(other)},
        )
        student = {"student": {"init": "pretrained", "layers": None, "model": str(tiny.teacher)}}
        with pytest.raises(LimbeckError, match="arm base: "):
            played(tmp_path / "s", first={"teacher.model": first}, recipe=recipe_tree(tiny, **student))
        assert not (tmp_path / "s").exists()
