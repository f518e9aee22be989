"""Evaluation groups as members of a registry: their options in recipes, and a group that no file of limbeck knows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, get_args

import pytest

import limbeck
from limbeck import cli
from limbeck.evaluation.context import EvaluationContext, Part, greedy
from limbeck.evaluation.group import EvaluationGroup, GroupResult, Need
from limbeck.evaluation.groups import EVALUATION_GROUPS
from limbeck.evaluation.scores.metrics import Metric
from limbeck.pipeline.evaluation_context import RunEvaluation
from limbeck.recipe.load import as_tree, json_schema, load_recipe, to_yaml
from limbeck.recipe.retired import RENAMED
from limbeck.recipe.yaml_text import parse
from limbeck.sweep.settings import as_overrides
from limbeck.types import LimbeckError, ScoredRow
from tests.tiny_pair import TinyPair


@dataclass(frozen=True, kw_only=True)
class LetterShare(EvaluationGroup):
    """How often some letters stand in the student's greedy answers."""

    letters: tuple[str, ...] = ("e",)
    metrics = {  # noqa: RUF012
        "letter_share": Metric(label="Share of letters", unit="", better="higher", meaning="how often they stand there")
    }

    def measure(self, evaluation: EvaluationContext) -> GroupResult:
        texts = evaluation.texts("student", greedy(evaluation.settings))
        rows = [
            ScoredRow(id=name, weight=1.0, values={"letter_share": self.share(text)}) for name, text in texts.items()
        ]
        return GroupResult(tables={"": rows}, detail={"letters": list(self.letters)})

    def share(self, text: str) -> float:
        return sum(text.count(letter) for letter in self.letters) / max(len(text), 1)


@pytest.fixture
def letters() -> Iterator[None]:
    EVALUATION_GROUPS.register("letters", LetterShare)
    yield
    EVALUATION_GROUPS.unregister("letters")


def recipe(*overrides: str, **sections: Any) -> Any:
    tree = {"teacher": {"model": "t"}, "student": {"init": "depth_prune", "layers": 2}, "prompts": {"source": "p"}}
    return load_recipe(tree | sections, overrides)


# What a group measures may need a student of its kind.
STUDENTS = {"recovery": {"student": {"init": "teacher", "quantize": {"format": "q4_0"}}}}


def groups(*overrides: str, **evaluate: Any) -> dict[str, Any]:
    return as_tree(recipe(*overrides, **({"evaluate": evaluate} if evaluate else {})))["evaluate"]["groups"]


@pytest.mark.parametrize("name", EVALUATION_GROUPS)
class TestEveryGroup:
    def test_builds_from_its_defaults_and_is_what_a_list_means(self, name: str) -> None:
        group = EVALUATION_GROUPS.build(name)
        made = recipe(evaluate=[name], **STUDENTS.get(name, {}))
        assert made.evaluate.groups == {name: group}
        assert group.needs() <= set(get_args(Need)) and set(group.parts) <= set(get_args(Part))

    def test_says_what_it_is_and_what_its_options_are(self, name: str) -> None:
        assert EVALUATION_GROUPS.summary(name).endswith(".")
        options = EVALUATION_GROUPS.options(name)
        assert options and all(option.default is not None for option in options.values())
        schema = json_schema()["$defs"]
        place = schema["EvaluationGroups"]["properties"][name]["$ref"].rpartition("/")[2]
        assert list(schema[place]["properties"]) == list(options) and schema[place]["additionalProperties"] is False

    def test_options_are_set_by_dotted_keys_and_written_back(self, name: str) -> None:
        group = EVALUATION_GROUPS.build(name)
        option = fields(group)[-1].name  # type: ignore[arg-type]
        value = getattr(group, option)
        sections = STUDENTS.get(name, {})
        made = recipe(f"evaluate.groups.{name}.{option}={json.dumps(value)}", evaluate=[name], **sections)
        assert made.evaluate.groups == {name: group} and load_recipe(parse(to_yaml(made), "recipe")) == made

    def test_refuses_what_it_does_not_know_and_the_keys_of_old(self, name: str) -> None:
        with pytest.raises(LimbeckError, match=f"^unknown key 'evaluate.groups.{name}.nothing'") as caught:
            recipe(f"evaluate.groups.{name}.nothing=1")
        assert "\n" not in str(caught.value)
        # Groups that came later never had keys elsewhere.
        if f"evaluate.{name}" in RENAMED:
            with pytest.raises(LimbeckError, match=f": evaluate.{name}.seed is now evaluate.groups.{name}.seed; write"):
                recipe(f"evaluate.{name}.seed=1")


def test_what_a_group_may_ask_for_is_there() -> None:
    asked = {name for name in vars(EvaluationContext) if not name.startswith("_")}
    assert len(asked) > 25 and asked <= {*dir(RunEvaluation), *(field.name for field in fields(RunEvaluation))}


def test_the_ways_to_write_groups() -> None:
    assert list(groups()) == ["fidelity", "rouge"]
    assert groups("evaluate.groups.fidelity.top_k=3")["fidelity"]["top_k"] == 3
    assert list(groups("evaluate.groups.fidelity.top_k=3")) == ["fidelity", "rouge"], "the default ones stay"
    assert list(groups("evaluate.groups.cost.repeats=1", groups=["nll"])) == ["nll", "cost"]
    kept = groups("evaluate.groups=[cost, nll]", groups={"nll": {"whose": "references"}, "rouge": {}})
    assert list(kept) == ["cost", "nll"] and kept["nll"]["whose"] == "references", "chosen groups keep their options"
    assert groups("evaluate={groups: {cost: {repeats: 2}}}") == {
        "cost": {"prompt_tokens": 256, "new_tokens": 32, "repeats": 2}
    }


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "evaluate.groups.fidelty.top_k=3",
            "unknown key 'evaluate.groups.fidelty'; did you mean 'evaluate.groups.fidelity'?",
        ),
        (
            "evaluate.groups.fidelity.topk=3",
            "unknown key 'evaluate.groups.fidelity.topk'; did you mean 'evaluate.groups.fidelity.top_k'?",
        ),
        (
            "evaluate.groups.fidelity.top_k=1",
            "evaluate.groups.fidelity.top_k: got 1; input should be greater than or equal to 2",
        ),
        (
            "evaluate.groups.fidelity.top_k=2.5",
            "evaluate.groups.fidelity.top_k: got 2.5; input should be a valid integer",
        ),
        ("evaluate.groups.rouge=3", "evaluate.groups.rouge is 3; expected a section with keys"),
        ("evaluate.groups=[rouge, rouge]", "evaluate.groups.1: got 'rouge'; input should name each group once"),
    ],
)
def test_mistakes_name_the_dotted_key(override: str, said: str) -> None:
    with pytest.raises(LimbeckError) as caught:
        recipe(override)
    assert str(caught.value) == said


def test_a_group_from_outside_is_measured_reported_and_listed(
    letters: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = TinyPair.write(tmp_path)
    tree = tiny.tree(
        tmp_path / "run", train={"max_steps": 2}, evaluate={"groups": {"letters": {"letters": ["a", "e"]}}}
    )
    run = limbeck.run(tree)
    assert 0 < run.scores["after"]["letter_share"]["mean"] < 1 and "letter_share" in run.scores["change"]
    assert run.scores["metrics"]["letter_share"]["meaning"] == "how often they stand there"
    record = json.loads((run.directory / "scores/after.letters.json").read_text("utf-8"))
    assert record["detail"] == {"letters": ["a", "e"]}
    assert "Share of letters" in run.report.read_text("utf-8")
    resolved = parse((run.directory / "recipe.resolved.yaml").read_text("utf-8"), "recipe")
    assert resolved["evaluate"]["groups"] == {"letters": {"letters": ["a", "e"]}}
    with pytest.raises(LimbeckError, match=r"unknown key 'evaluate\.groups\.letters\.leters'; did you mean") as caught:
        limbeck.run(tree, "evaluate.groups.letters.leters=[x]")
    assert "'evaluate.groups.letters.letters'" in str(caught.value)
    with pytest.raises(LimbeckError, match=r"evaluate.groups.letters.letters: got 'x'; expected a list"):
        limbeck.run(tree, "evaluate.groups.letters.letters=x")
    capsys.readouterr()
    cli.groups()
    assert "letters: tuple[str, ...] = ('e',)" in capsys.readouterr().out


def test_a_group_of_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(group: str) -> list[EntryPoint]:
        assert group == "limbeck.evaluation_groups"
        return [EntryPoint("installed", f"{__name__}:LetterShare", group)]

    monkeypatch.setattr("limbeck.registry.installed", installed)
    monkeypatch.setattr(EVALUATION_GROUPS, "_discovered", False)
    assert groups(groups={"installed": {}}) == {"installed": {"letters": ["e"]}}
    EVALUATION_GROUPS.unregister("installed")


def test_a_metric_that_nobody_described_is_refused(
    letters: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LetterShare, "metrics", {})
    tree = TinyPair.write(tmp_path).tree(tmp_path / "run", train={"max_steps": 1}, evaluate={"groups": ["letters"]})
    with pytest.raises(LimbeckError, match="the metric 'letter_share' is not described"):
        limbeck.run(tree)


def test_an_arm_of_a_sweep_may_add_a_group_with_its_defaults() -> None:
    added = as_overrides({"evaluate": {"groups": {"nll": {}, "cost": {"repeats": 2}}}, "train": {}})
    assert added == ["evaluate.groups.nll={}", "evaluate.groups.cost.repeats=2"]
    assert list(groups(*added)) == ["fidelity", "rouge", "nll", "cost"]
