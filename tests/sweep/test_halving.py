"""Successive halving, and the pauses it is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.runtime.files import read_json
from limbeck.sweep.ranking import survivors
from limbeck.sweep.tasks import Outcome, Task, perform
from limbeck.types import Interrupted
from tests.sweep.conftest import SMALL, Play, alone, recipe_tree, require_same_bits
from tests.tiny_pair import TinyPair

HALVING = {"at": [0.25, 0.5], "keep": 0.5}


class TestHalving:
    def test_the_best_go_on_as_if_nothing_had_been(self, played: Play, tiny: TinyPair, tmp_path: Path) -> None:
        rates = [1e-9, 3e-3, 1e-3]
        done = played(tmp_path / "s", grid={"train.learning_rate": rates}, halving=HALVING, seeds=[0, 1])
        arms = [f"learning_rate={rate:g}" for rate in rates]
        expected = arms
        for share, steps in ((0.25, 1), (0.5, 2)):
            standing = {}
            for arm in expected:
                for seed in (0, 1):
                    (record,) = (done.root / "arms" / arm / f"seed={seed}" / "halving").glob(f"{share:g}-*.json")
                    standing.setdefault(arm, []).append(read_json(record)["after"]["forward_kl"])
            gone_on = survivors({arm: sum(found) / 2 for arm, found in standing.items()}, 0.5)
            for arm in set(expected) - set(gone_on):
                line = done.state(arm, 1)
                assert line["state"] == "dropped"
                assert f"after {share:g} of the steps: forward_kl" in line["error"]
                assert f"not among the best {len(gone_on)} of {len(expected)}" in line["error"]
                run = done.root / line["directory"]
                assert max(path.name for path in (run / "checkpoints").glob("step-*")) == f"step-{steps:06d}"
            expected = gone_on
        (winner,) = expected
        assert done.state(winner)["state"] == "done" and done.end.failed == 0
        rate = winner.removeprefix("learning_rate=")
        separate = alone(tiny, tmp_path / "r", f"train.learning_rate={rate}", "train.seed=1")
        require_same_bits(done.root / "arms" / winner / "seed=1", separate)
        again = played(tmp_path / "s", grid={"train.learning_rate": rates}, halving=HALVING, seeds=[0, 1])
        assert again.lines == done.lines

    def test_the_number_is_that_of_an_evaluation(self, tiny: TinyPair, played: Play, tmp_path: Path) -> None:
        """Paused where another run ends: with a flat schedule both have done the same by then."""
        flat, both = {"lr_scheduler_type": "constant"}, {"groups": ["fidelity", "rouge"]}
        done = played(
            tmp_path / "s",
            recipe=recipe_tree(tiny, train=flat, evaluate=both),
            grid={"train.learning_rate": [1e-3, 1e-2]},
            halving={"at": [0.5], "metric": "rouge_l"},
        )
        (record,) = (done.root / "arms" / "learning_rate=0.001" / "seed=0" / "halving").glob("0.5-*.json")
        short = alone(tiny, tmp_path / "r", "train.max_steps=2", train=flat, evaluate=both)
        after = read_json(short / "scores.json")["after"]
        assert read_json(record)["after"] == {name: after[name]["mean"] for name in read_json(record)["after"]}
        assert "rouge_l" in read_json(record)["after"]

    def test_after_tuning(self, played: Play, tmp_path: Path) -> None:
        """The run that won the tuning is at its end already; compared is how it stood on the way."""
        done = played(
            tmp_path / "s",
            grid={"objective.name": ["fkl", "rkl"]},
            tune={"train.learning_rate": [1e-9, 1e-3]},
            halving={"at": [0.5]},
        )
        states = sorted(line["state"] for line in done.lines if not line["tuning"])
        assert states == ["done", "dropped"]

    def test_one_that_fails_on_the_way(self, played: Play, tmp_path: Path) -> None:
        done = played(tmp_path / "s", grid={"train.learning_rate": [1e-4, 1e30]}, halving={"at": [0.5], "keep": 0.9})
        assert [line["state"] for line in done.lines] == ["done", "failed"]

    def test_too_late(self, played: Play, tmp_path: Path) -> None:
        grid = {"train.learning_rate": [1e-4, 1e-3]}
        played(tmp_path / "s", grid=grid)
        late = played(tmp_path / "s", grid=grid, halving=HALVING)
        assert all("was trained to its end before anybody asked" in line["error"] for line in late.lines)


class TestPausing:
    def test_adapters_and_frozen_embeddings(self, tiny: TinyPair, played: Play, tmp_path: Path) -> None:
        student = {"lora": {"r": 2}, "freeze_embeddings": True}
        grid = {"train.learning_rate": [1e-3, 1e-9]}
        done = played(tmp_path / "s", recipe=recipe_tree(tiny, student=student), grid=grid, halving={"at": [0.5]})
        assert sorted(line["state"] for line in done.lines) == ["done", "dropped"]

    def test_another_evaluation_measures_anew(self, tiny: TinyPair, tmp_path: Path) -> None:
        """What was measured at a pause is that of the evaluation then: another metric, or another one, is measured."""
        tree = recipe_tree(tiny, evaluate={"groups": ["fidelity", "rouge"]}) | {"output_dir": str(tmp_path / "r")}

        def paused(metric: str, **changes: object) -> Outcome:
            recipe = tree | {"evaluate": {"groups": ["fidelity", "rouge"], **changes}}
            return perform(
                Task(recipe=recipe, artifacts=str(tmp_path / "a"), update=False, pause_at=0.5, metric=metric)
            )

        first = paused("forward_kl")
        assert first.state == "paused" and first.means is not None and "rouge_l" not in first.means
        assert paused("forward_kl") == first
        other = paused("rouge_l")
        assert other.means is not None and other.means["forward_kl"] == first.means["forward_kl"]
        (record,) = (tmp_path / "r" / "halving").glob("*.json")
        assert "rouge_l" in read_json(record)["after"]
        shorter = paused("rouge_l", max_new_tokens=2)
        assert len(list((tmp_path / "r" / "halving").glob("*.json"))) == 2
        assert shorter.means is not None and shorter.means["rouge_l"] != other.means["rouge_l"]

    def test_where_it_was_asked(self, tiny: TinyPair, tmp_path: Path) -> None:
        recipe = load_recipe(recipe_tree(tiny, train=SMALL | {"save_steps": 50}) | {"output_dir": str(tmp_path / "r")})
        for share, step in ((0.3, 2), (0.3, 2), (0.5, 2), (0.75, 3)):
            with pytest.raises(Interrupted, match=f"after step {step} of 4"):
                run_pipeline(recipe, stages=STAGES, until="train", pause_at=share)
            assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == step
        run = run_pipeline(recipe, stages=STAGES, until="train", pause_at=0.9)
        assert run.done("train")
