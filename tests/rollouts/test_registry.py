"""The registry of response sources: what recipes, lists, documentation and checks read of it, member by member."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic.dataclasses import dataclass

import limbeck
from limbeck.fields import STRICT, Count
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import Recipe, as_tree, json_schema, load_recipe, to_yaml
from limbeck.recipe.yaml_text import parse
from limbeck.rollouts.options import OnPolicyOptions, SourceMaterials, SourceOptions
from limbeck.rollouts.registry import SOURCES
from limbeck.rollouts.sources import OfflineSource, ResponseSource, StepCounter
from limbeck.rollouts.student import StudentSource
from limbeck.types import LimbeckError, Response
from tests.limbeck_command import CommandServer
from tests.tiny_pair import TinyPair

DOCS = Path(__file__).resolve().parents[2] / "docs"
PLAIN: dict[str, Any] = {"teacher": {"model": "t"}, "student": {"init": "depth_prune", "layers": 2}}
# A value of every option that is not its default, within what all sources take.
OTHER: dict[str, Any] = {
    "refresh": 3,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "first_max_new_tokens": 3,
    "text_field": "body",
    "max_tokens": 500,
    "teacher_share": 0.3,
    "share": 0.9,
    "share_end": 0.9,
    "share_shape": "exponential",
    "capacity": 7,
    "decay": "constant",
    "tolerance": 0.3,
    "bump": 0.3,
    "compare_with": "lowest",
    "validate_steps": 3,
    "teacher_top_k": 3,
    "teacher_redraw": "nucleus",
    "resample_teacher": False,
}
OPTIONS = [(name, option) for name in SOURCES for option in SOURCES.options(name)]


def recipe(*overrides: str, **sections: Any) -> Recipe:
    return load_recipe(PLAIN | sections, overrides)


def refusal(*overrides: str, **sections: Any) -> str:
    with pytest.raises(LimbeckError) as error:
        recipe(*overrides, **sections)
    assert "\n" not in str(error.value)
    return str(error.value)


def other(name: str, option: str) -> Any:
    return "step" if (name, option) == ("replay", "refresh") else OTHER[option]


# ---- every member


@pytest.mark.parametrize("name", SOURCES)
def test_a_name_alone_a_mapping_and_an_override_are_the_same(name: str) -> None:
    built = SOURCES.build(name)
    assert recipe(responses={"source": name}).responses.source == built
    assert recipe(responses={"source": {"name": name}}).responses.source == built
    assert recipe(f"responses.source={name}").responses.source == built
    assert recipe(f"responses.source.name={name}").responses.source == built


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_an_option_is_read_resolved_and_in_the_fingerprint(name: str, option: str, tiny: TinyPair) -> None:
    value = other(name, option)
    # On top of a name that is text, and in a mapping.
    over = recipe(f"responses.source.{option}={json.dumps(value)}", responses={"source": name})
    assert over == recipe(responses={"source": {"name": name, option: value}})
    assert getattr(over.responses.source, option) == value
    assert as_tree(over)["responses"]["source"][option] == value
    assert load_recipe(parse(to_yaml(over), "it")) == over
    if (name, option) != ("replay", "refresh"):  # it has one value, the default
        assert value != getattr(SOURCES.build(name), option)
    sections = {"responses": {"source": name}}
    before, after = (
        RunContext(load_recipe(tiny.tree(Path("run"), **sections), more)).fingerprints(STAGES)
        for more in ((), (f"responses.source.{option}={json.dumps(value)}",))
    )
    assert before["train"] != after["train"], "another training"
    # What of plain text is read is what there is before training.
    same = ("prompts",) if SOURCES[name].documents else ("prompts", "respond", "teach")
    assert all(before[stage] == after[stage] for stage in same), "the same before it"
    assert (before["respond"] != after["respond"]) == SOURCES[name].documents


@pytest.mark.parametrize(("name", "option"), sorted({(n, o) for n in SOURCES for _, o in OPTIONS} - {*OPTIONS}))
def test_an_option_of_another_source_is_refused(name: str, option: str) -> None:
    said = refusal(f"responses.source={name}", f"responses.source.{option}={json.dumps(OTHER[option])}")
    readers = [other for other, own in OPTIONS if own == option]
    assert said.startswith(f"responses.source.{option} is an option of {' or '.join(readers)}, not {name}; ")
    assert said.endswith(f"set responses.source.name={readers[0]}")


@pytest.mark.parametrize("name", SOURCES)
def test_an_option_of_no_source_is_refused(name: str) -> None:
    said = refusal(f"responses.source={name}", "responses.source.refesh=2")
    assert said.startswith(f"unknown key 'responses.source.refesh' (response source {name!r} has ")
    assert said.endswith("did you mean 'responses.source.refresh'?") == ("refresh" in SOURCES.options(name))


@pytest.mark.parametrize("name", SOURCES)
def test_what_a_source_says_of_itself(name: str) -> None:
    source = SOURCES.build(name)
    assert source.credit and source.on_policy == isinstance(source, OnPolicyOptions)
    # Who has written what is there before training is either known, or asked.
    assert (source.initial_author is None) == source.on_policy
    assert source.on_policy or source.trains_on_initial
    assert source.fresh == (source.on_policy and not source.paired)


@pytest.mark.parametrize("name", SOURCES)
def test_the_schema_and_the_list_have_it(name: str, limbeck: CommandServer) -> None:
    (schema,) = (
        one
        for one in json_schema()["$defs"]["ResponsesSection"]["properties"]["source"]["anyOf"]
        if one.get("title") == name
    )
    assert set(schema["properties"]) == {"name", *SOURCES.options(name)} and schema["additionalProperties"] is False
    listed = limbeck.run("sources").stdout
    assert re.search(rf"^{name} +{re.escape(SOURCES.summary(name))}\n", listed, re.MULTILINE)
    for option in SOURCES.options(name).values():
        assert f" {option.name}: {option.kind} = {option.default}\n" in listed


def test_the_tables_of_the_documentation() -> None:
    page = (DOCS / "on-policy.md").read_text("utf-8")
    sources, options = (table.split("\n\n")[0] for table in re.split(r"\| `responses\.source\S*` \|", page)[1:])
    assert re.findall(r"^\| `(\w+)`", sources, re.MULTILINE) == list(SOURCES)
    found = {}
    for keys, of in re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", options, re.MULTILINE):
        found |= {key: set(re.findall(r"\w+", of)) for key in re.findall(r"`(\w+)`", keys)}
    on_policy = {name for name in SOURCES if SOURCES[name].on_policy}
    assert {key: names if names != {"all"} else on_policy for key, names in found.items()} == {
        option: {name for name, own in OPTIONS if own == option} for _, option in OPTIONS
    }


# ---- what a recipe says otherwise


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            "studnet",
            "responses.source: response source 'studnet' is unknown (nearest: 'student'): choose from teacher,",
        ),
        (5, "responses.source is 5; expected a name such as student"),
        (["student"], "responses.source is ['student']; expected a name"),
        (None, "responses.source is None; expected a name"),
        ({"name": None}, "responses.source.name is None; expected a name such as student"),
        ({"share": 0.2}, "responses.source.share is an option of mixed or replay, not teacher; remove it"),
        ({"name": "mixed", "share": "x"}, "responses.source.share: got 'x'; input should be a valid number"),
        ({"name": "replay", "capacity": 0}, "responses.source.capacity: got 0; input should be greater than"),
    ],
)
def test_what_is_no_source(value: object, said: str) -> None:
    assert refusal(responses={"source": value}).startswith(said)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["responses.author=student"], "responses.author is now responses.source;"),
        (["responses.base=data"], "responses.base is now responses.initial_author;"),
        (["responses.on_policy.share=0.2"], "responses.on_policy.share is now responses.source.share;"),
        (["responses.on_policy.buffer=2"], "responses.on_policy.buffer is now responses.source.capacity;"),
        (["responses.on_policy={}"], "responses.on_policy is now responses.source;"),
    ],
)
def test_keys_of_earlier_recipes_are_refused_with_those_of_today(overrides: list[str], said: str) -> None:
    assert refusal(*overrides) == f"keys of a recipe have new names: {said} write those instead"


def test_a_run_of_an_earlier_recipe_is_refused_with_the_keys_of_today(tmp_path: Path) -> None:
    old = {"author": "replay", "base": "data", "on_policy": {"share": 0.1, "buffer": 9, "bump": 0.1}}
    (tmp_path / "recipe.resolved.yaml").write_text(json.dumps(PLAIN | {"responses": old}), "utf-8")
    with pytest.raises(LimbeckError) as error:
        limbeck.load(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} was made by an earlier version: keys of a recipe have new names: responses.author is now "
        "responses.source, responses.base is now responses.initial_author, responses.on_policy.share is now "
        "responses.source.share, responses.on_policy.buffer is now responses.source.capacity, and 1 more; write those "
        "instead, in a new directory"
    )


def test_a_name_replaces_the_options_of_the_source_before() -> None:
    responses = {"source": {"name": "replay", "capacity": 5}}
    assert recipe("responses.source=mixed", responses=responses).responses.source == SOURCES.build("mixed")
    assert "capacity is an option of replay, not mixed" in refusal("responses.source.name=mixed", responses=responses)


# ---- a member from outside


class TeacherFirst:
    """The teacher's answers for some steps, then the student's own."""

    wants_validation, validation_steps = False, 1

    def __init__(self, initial: OfflineSource, own: StudentSource, steps: int):
        self.initial, self.own, self.steps = initial, own, steps
        self.prompts = initial.prompts | own.prompts

    @property
    def steps_per_epoch(self) -> int:
        return self.initial.steps_per_epoch

    def step(self, clock: StepCounter) -> dict[int, Response]:
        return (self.initial if clock.step < self.steps else self.own).step(clock)

    def preview(self, count: int, total: int) -> list[dict[int, Response]]:
        return self.initial.preview(count, total)

    def starts_round(self, clock: StepCounter) -> bool:
        return self.own.starts_round(clock)

    def validated(self, loss: float) -> None:
        return

    def metrics(self, clock: StepCounter) -> dict[str, float]:
        return {"alone": float(clock.step >= self.steps)}

    def counts(self, clock: StepCounter) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Any) -> None:
        return


@dataclass(config=STRICT, kw_only=True)
class TeacherFirstOptions(OnPolicyOptions):
    """The teacher's answers for so many steps, then the student's own."""

    steps: Count = 2
    """Steps on the teacher's answers."""

    credit: ClassVar[str] = "by the teacher at first, then by the student"

    def build(self, materials: SourceMaterials) -> ResponseSource:
        initial = OfflineSource(materials.offline, materials.context)
        own = StudentSource(materials.prompts, self.rollout(materials), materials.context)
        return TeacherFirst(initial, own, self.steps)


@dataclass(config=STRICT, kw_only=True)
class HalfOptions(SourceOptions):
    """Every other one of the responses that were there before training."""

    def build(self, materials: SourceMaterials) -> ResponseSource:
        every_other = range(0, len(materials.offline), 2)
        return OfflineSource(materials.offline, materials.context, rows=every_other)


@pytest.fixture
def outside() -> Iterator[None]:
    members = {"teacher_first": TeacherFirstOptions, "half": HalfOptions}
    for name, member in members.items():
        SOURCES.register(name, member)
    yield
    for name in members:
        SOURCES.unregister(name)


def played(tiny: TinyPair, folder: Path, *overrides: str) -> tuple[Path, list[dict[str, Any]]]:
    train = {"max_steps": 5, "logging_steps": 1}
    tree = tiny.tree(folder, train=train, evaluate={"groups": ["fidelity"], "samples": 1})
    root = Path(limbeck.run(tree, *overrides).directory)
    return root, [json.loads(line) for line in (root / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_a_source_from_outside_plays_a_whole_run(outside: None, tiny: TinyPair, tmp_path: Path) -> None:
    root, lines = played(tiny, tmp_path / "run", "responses.source=teacher_first", "responses.source.steps=3")
    assert [line["alone"] for line in lines] == [0, 0, 0, 1, 1]
    assert ["responses/count" in line for line in lines] == [False] * 3 + [True] * 2
    resolved = parse((root / "recipe.resolved.yaml").read_text("utf-8"), "it")["responses"]["source"]
    assert (resolved["name"], resolved["steps"]) == ("teacher_first", 3)
    assert "Responses: by the teacher at first, then by the student." in (root / "student" / "README.md").read_text()
    assert "teacher_first" in (root / "report.html").read_text("utf-8")
    # The same again is done already; another value of its option is another training.
    assert limbeck.run(root).directory == root
    with pytest.raises(LimbeckError, match=r"responses\.source\.steps"):
        limbeck.run(root, "responses.source.steps=4")


def test_a_source_from_outside_that_writes_nothing(outside: None, tiny: TinyPair, tmp_path: Path) -> None:
    _, lines = played(
        tiny, tmp_path / "run", "responses.source=half", "train.num_train_epochs=1", "train.max_steps=null"
    )
    # 18 prompts to train on: 9 responses, in steps of 4.
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_members_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SOURCES.build("mixed", share=0.2).share = 0.3  # type: ignore[attr-defined]
