"""A sweep file: what it means, what is refused, and the runs that it makes."""

from __future__ import annotations

import itertools
import json
import re
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from limbeck.pipeline.build import loss_plan_of
from limbeck.recipe.files import shipped_sweeps
from limbeck.recipe.load import load_recipe
from limbeck.sweep.arms import arms_of, final_runs, first_recipes, tuning_runs
from limbeck.sweep.settings import KEYS, load_sweep, settings_to_yaml
from limbeck.types import LimbeckError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sweeping.md"
RECIPE = {"teacher": {"model": "t"}, "student": {"model": "s"}, "train": {"max_steps": 7}}


def sweep(*overrides: str, **keys: Any):
    return load_sweep({"name": "x", "recipe": RECIPE} | keys, overrides)


def refusal(*overrides: str, **keys: Any) -> str:
    with pytest.raises(LimbeckError) as caught:
        loaded = sweep(*overrides, **keys)
        for arm in arms_of(loaded):
            final_runs(loaded, arm, {}, {})
            tuning_runs(loaded, arm, {})
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestArms:
    def test_grid_is_the_full_product(self) -> None:
        loaded = sweep(grid={"objective.name": ["fkl", "rkl"], "objective.temperature": [1, 2.5]})
        assert [(arm.name, arm.keys) for arm in arms_of(loaded)] == [
            (f"name={name},temperature={t:g}", {"objective.name": name, "objective.temperature": t})
            for name, t in itertools.product(("fkl", "rkl"), (1, 2.5))
        ]

    def test_named_arms_times_the_grid(self) -> None:
        arms = {"plain": {}, "csd": {"objective": {"name": "csd", "first": "student"}}}
        loaded = sweep(arms=arms, grid={"train.learning_rate": [1e-4, 3e-4]})
        found = {arm.name: arm.keys for arm in arms_of(loaded)}
        assert list(found) == [f"{a},learning_rate={r}" for a in arms for r in ("0.0001", "0.0003")]
        assert found["csd,learning_rate=0.0003"] == {
            "objective.name": "csd",
            "objective.first": "student",
            "train.learning_rate": 3e-4,
        }

    def test_one_arm_without_either(self) -> None:
        (arm,) = arms_of(sweep(seeds=[0, 1]))
        runs = final_runs(sweep(seeds=[0, 1]), arm, {}, {})
        assert [str(run.directory) for run in runs] == [f"runs/sweeps/x/arms/base/seed={s}" for s in (0, 1)]
        assert [run.recipe.train.seed for run in runs] == [0, 1]

    def test_whole_keys_where_their_ends_agree(self) -> None:
        grid = {"responses.temperature": [0.5], "objective.temperature": [1, 2]}
        assert arms_of(sweep(grid=grid))[1].name == "responses.temperature=0.5,objective.temperature=2"

    @given(st.lists(st.text(string.printable + "äß/\\", min_size=1, max_size=200), min_size=1, max_size=6, unique=True))
    def test_names_are_directories_and_differ(self, values: list[str]) -> None:
        names = [arm.name for arm in arms_of(sweep(grid={"prompts.source": values}))]
        assert len(set(names)) == len(values)
        for name in names:
            assert len(name) <= 120 and not set(name) - set(string.ascii_letters + string.digits + "._=,+-")
            assert Path(name).name == name and name.strip(".")

    def test_runs_differ_in_their_keys_and_nothing_else(self) -> None:
        loaded = sweep("train.weight_decay=0", set={"train": {"max_steps": 3}}, grid={"objective.temperature": [1, 2]})
        one, two = (final_runs(loaded, arm, {}, {})[0].recipe for arm in arms_of(loaded))
        assert one.train == two.train and one.train.max_steps == 3 and one.train.weight_decay == 0
        assert one.train.learning_rate == load_recipe(RECIPE).train.learning_rate
        assert (one.objective.temperature, two.objective.temperature) == (1, 2)

    def test_a_section_that_was_left_out_is_taken_with_its_defaults(self) -> None:
        loaded = sweep(set={"teacher.across": {}}, arms={"plain": {"train": {}}, "taught": {"sft": {}}})
        plain, taught = (final_runs(loaded, arm, {}, {})[0].recipe for arm in arms_of(loaded))
        assert plain.teacher.across is not None and taught.teacher.across is not None
        assert plain.sft is None and taught.sft is not None
        assert plain.train.max_steps == taught.train.max_steps == 7

    def test_tuning_with_the_first_seed(self) -> None:
        loaded = sweep(arms={"a": {}}, tune={"train.learning_rate": [1e-4, 0.5]}, seeds=[4, 5])
        (arm,) = arms_of(loaded)
        runs = tuning_runs(loaded, arm, {})
        assert [str(run.directory) for run in runs] == [
            f"runs/sweeps/x/arms/a/tune/learning_rate={rate}" for rate in ("0.0001", "0.5")
        ]
        assert all(run.tuning and run.seed == run.recipe.train.seed == 4 for run in runs)
        final = final_runs(loaded, arm, {"train.learning_rate": 0.5}, {})
        # The winner is played again as the first of the final runs: the very same recipe, so nothing is done twice.
        assert final[0].recipe.train == runs[1].recipe.train and final[0].keys == {"train.learning_rate": 0.5}


class TestOverrides:
    def test_recipe_and_sweep(self) -> None:
        loaded = sweep("prompts.limit=5", "sweep.seeds=[3]", "sweep.parallel=2", "output_dir=here", teacher_run=RECIPE)
        assert loaded.seeds == (3,) and loaded.parallel == 2 and str(loaded.directory) == "here"
        assert isinstance(loaded.recipe, dict) and loaded.recipe["prompts"] == {"limit": 5}
        teacher = first_recipes(loaded)["teacher.model"]
        assert teacher.prompts.limit == 5 and str(teacher.directory) == "here/teacher"

    def test_only_prompts_reach_what_comes_first(self) -> None:
        first = {"teacher.model": RECIPE, "student.model": RECIPE}
        recipes = first_recipes(sweep("train.max_steps=9", first=first)).values()
        assert [str(recipe.directory) for recipe in recipes] == [f"runs/sweeps/x/{n}" for n in ("teacher", "student")]
        assert all(recipe.train.max_steps == 7 for recipe in recipes)

    @pytest.mark.parametrize(
        ("override", "where"),
        [
            ("objective.temperature=3", "sweep.grid"),
            ("objective={name: rkl}", "sweep.arms"),
            ("train.seed=1", "sweep.seeds"),
            ("train.learning_rate=1", "sweep.tune"),
            ("objective.first=student", "sweep.arms"),
        ],
    )
    def test_of_what_is_swept(self, override: str, where: str) -> None:
        message = refusal(
            override,
            grid={"objective.temperature": [1, 2]},
            tune={"train.learning_rate": [1e-4, 1e-3]},
            arms={"a": {"objective.name": "csd", "objective.first": "uniform"}},
        )
        assert message.startswith(repr(override)) and where in message

    def test_of_the_teacher_that_is_trained(self) -> None:
        assert "teacher.model in first" in refusal("teacher.model=other", teacher_run=RECIPE)
        assert "teacher.model in first" in refusal("teacher={model: other}", first={"teacher.model": RECIPE})
        assert sweep("teacher.model=o", "sweep.first={}", first={"teacher.model": RECIPE}).first == {}
        assert sweep(teacher_run=RECIPE) == sweep(first={"teacher.model": RECIPE})


class TestFiles:
    def test_paths_beside_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "mine"
        folder.mkdir()
        (folder / "base.yaml").write_text(yaml.safe_dump(RECIPE))
        (folder / "many.yaml").write_text("recipe: base.yaml\nseeds: [1, 2]\n")
        monkeypatch.chdir(tmp_path)
        loaded = load_sweep("mine/many.yaml")
        assert loaded.name == "many" and str(loaded.directory) == "runs/sweeps/many"
        assert isinstance(loaded.recipe, dict) and loaded.recipe["train"] == {"max_steps": 7}

    def test_shipped_recipe_by_name(self) -> None:
        loaded = sweep(recipe="quickstart", grid={"objective.name": ["fkl", "rkl"]})
        assert final_runs(loaded, arms_of(loaded)[0], {}, {})[0].recipe.student.layers == 18

    @pytest.mark.parametrize("name", shipped_sweeps())
    def test_shipped_sweeps_load(self, name: str) -> None:
        loaded = load_sweep(name)
        assert first_recipes(loaded).keys() == loaded.first.keys()
        for arm in arms_of(loaded):
            for run in (*tuning_runs(loaded, arm, {}), *final_runs(loaded, arm, {}, {})):
                assert loss_plan_of(run.recipe).objectives

    @pytest.mark.parametrize("text", re.findall(r"^```yml\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S))
    def test_examples_of_the_page(self, text: str) -> None:
        tree = yaml.safe_load(text)
        for key in ("teacher.model", "student.model"):
            if key in tree.get("first", {}):
                tree["first"][key] = RECIPE
        loaded = load_sweep(tree)
        assert sum(len(final_runs(loaded, arm, {}, dict.fromkeys(loaded.first, "m"))) for arm in arms_of(loaded)) > 1

    def test_every_key_is_on_the_page(self) -> None:
        said = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", PAGE.read_text("utf-8"), re.M))))
        assert said == set(KEYS)

    def test_resolved_says_the_same(self, tmp_path: Path) -> None:
        loaded = sweep(
            "objective.alpha=0.2",
            set={"objective": {"name": "skl"}},
            grid={"train.learning_rate": [1e-4, 3e-05]},
            halving={"at": [0.5]},
            teacher_run=RECIPE,
            output_dir=str(tmp_path),
        )
        (tmp_path / "sweep.resolved.yaml").write_text(settings_to_yaml(loaded))
        assert load_sweep(tmp_path) == loaded

    def test_keys_of_tuning_alone(self) -> None:
        on = {"prompts.heldout": "dev.jsonl"}
        assert "tune_on is about the runs that tune, but nothing is tuned" in refusal(tune_on=on)
        assert "tune_extend is about the runs that tune" in refusal(tune_extend=2)
        rates = {"train.learning_rate": [1e-4, 1e-3]}
        assert "tune_on: train.learning_rate is what the arms differ in" in refusal(
            tune=rates, tune_on={"train": {"learning_rate": 1.0}}
        )
        assert sweep(tune=rates, tune_on=on, tune_extend=2).tune_on == on

    def test_a_recipe_is_no_sweep(self) -> None:
        with pytest.raises(LimbeckError, match="quickstart is a recipe, not a sweep; run it with: limbeck run"):
            load_sweep("quickstart")

    def test_a_sweep_is_no_recipe(self, tmp_path: Path) -> None:
        path = tmp_path / "s.yaml"
        path.write_text("recipe: quickstart\n")
        with pytest.raises(LimbeckError, match="is a sweep, not a recipe; run it with: limbeck sweep"):
            load_recipe(path)

    def test_unknown_name(self) -> None:
        with pytest.raises(LimbeckError, match="no sweep 'nowhere': neither a file nor a shipped sweep"):
            load_sweep("nowhere")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"gird": {}}, "unknown key 'gird'; did you mean 'grid'?"),
        ({"halving": {"att": [0.5]}}, "did you mean 'halving.at'?"),
        ({"halving": {"at": [0.5, 0.25]}}, "expected ascending shares"),
        ({"halving": {"at": [1.5]}}, "less than 1"),
        ({"halving": {"metric": "teacher_entropy"}}, "the teacher's own"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "a seed twice"),
        ({"seeds": 3}, "expected a list, such as seeds=[3]"),
        ({"parallel": 0}, "parallel"),
        ({"recipe": 3}, "recipe"),
        ({"grid": {"objective.name": []}}, "grid.objective.name"),
        ({"grid": {"objective.name": "fkl"}}, "expected a list"),
        ({"grid": {"objective.name": ["fkl", "fkl"]}}, "a value twice"),
        ({"grid": {"train.seed": [1, 2]}}, "list the seeds in seeds"),
        ({"grid": {"output_dir": ["a"]}}, "the sweep names its runs itself"),
        ({"grid": {"train.learning_rate": [1.0]}, "tune": {"train.learning_rate": [1.0]}}, "stands in two of"),
        ({"tune": {"train.learning_rate": [1.0]}, "tune_metric": "forward_lk"}, "did you mean 'forward_kl'?"),
        ({"arms": {"a": {}, "b": {}}}, "the arms a and b are the same"),
        ({"arms": {"a": 3}}, "arms.a"),
        ({"first": {"teacher": "kd"}}, "first: got 'teacher'; expected the key of a model, such as teacher.model"),
        ({"first": {"teacher.modle": "kd"}}, "did you mean 'teacher.model'?"),
        ({"first": {"teacher.model": "kd"}, "teacher_run": "kd"}, "remove one of them"),
        ({"first": {"teacher.model": "nowhere"}}, "no recipe 'nowhere'"),
        ({"name": "../up"}, "expected a plain name"),
        ({"arms": {"a": {}, "b": {"train.max_stepz": 1}}}, "arm b: unknown key 'train.max_stepz'; did you mean"),
        ({"arms": {"a": {}, "b": {"train.max_steps": -1}}}, "arm b: train.max_steps: got -1"),
        ({"grid": {"objective.temperature": [1, -1]}}, "arm temperature=-1: objective.temperature: got -1"),
        ({"tune": {"train.learning_rate": [1e-3, "x"]}}, "arm base: train.learning_rate: got 'x'"),
    ],
)
def test_refused_in_one_line(keys: dict[str, Any], said: str) -> None:
    assert said in refusal(**keys), json.dumps(keys)
