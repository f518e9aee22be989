"""Recipes: what is written is read, what is wrong gets one line."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.objectives import OBJECTIVES
from limbeck.recipe.load import (
    Recipe,
    as_tree,
    json_schema,
    known_keys,
    load_recipe,
    objective_of,
    shipped_recipes,
    to_yaml,
)
from limbeck.recipe.yaml_text import dump, parse
from limbeck.rollouts.registry import SOURCES
from limbeck.types import LimbeckError

SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "recipe.schema.json"
PLAIN: dict[str, Any] = {"teacher": {"model": "t"}, "student": {"init": "depth_prune", "layers": 2}}


def recipe(*overrides: str, **sections: Any) -> Recipe:
    return load_recipe(PLAIN | sections, overrides)


def refusal(*overrides: str, **sections: Any) -> str:
    with pytest.raises(LimbeckError) as error:
        recipe(*overrides, **sections)
    assert "\n" not in str(error.value)
    return str(error.value)


def in_file(folder: Path, text: str) -> Recipe:
    path = folder / "mine.yaml"
    path.write_text(text, "utf-8")
    return load_recipe(path)


def test_the_smallest_recipe_has_every_default():
    small = recipe()
    assert (
        small.train.learning_rate == "auto"
        and small.objective.name == "fkl"
        and small.responses.source == SOURCES.build("teacher")
    )
    assert small.directory == Path("runs/run")
    assert recipe("output_dir=elsewhere").directory == Path("elsewhere")


def test_the_name_of_a_file_names_the_run(tmp_path):
    text = "teacher: {model: t}\nstudent: {init: depth_prune, layers: 2}\n"
    assert in_file(tmp_path, text).name == "mine"
    assert in_file(tmp_path, "name: other\n" + text).name == "other"


def test_a_callers_mapping_is_never_changed():
    tree = copy.deepcopy(PLAIN) | {"train": {"max_steps": 3}}
    before = copy.deepcopy(tree)
    load_recipe(tree, ["train.max_steps=5", "objective.name=csd", "teacher.model=other"])
    assert tree == before


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.learning_rate=1e-4", "train", "learning_rate", 1e-4),
        ("train.learning_rate=3E-4", "train", "learning_rate", 3e-4),
        ("train.learning_rate=2", "train", "learning_rate", 2.0),
        ("train.learning_rate=.5", "train", "learning_rate", 0.5),
        ("train.max_steps=20", "train", "max_steps", 20),
        ("train.max_steps=null", "train", "max_steps", None),
        ("train.compile=on", "train", "compile", "on"),
        ("train.compile=off", "train", "compile", "off"),
        ("train.bf16=true", "train", "bf16", True),
        ("train.report_to=[tensorboard, wandb]", "train", "report_to", ("tensorboard", "wandb")),
        ("responses.stop=['a: b', 'x=y']", "responses", "stop", ("a: b", "x=y")),
        ("student.keep=[0, 3]", "student", "keep", (0, 3)),
        ("teacher.model=C:\\models\\x", "teacher", "model", "C:\\models\\x"),
        ("teacher.revision=0123", "teacher", "revision", "0123"),
        ("teacher.revision='1e5'", "teacher", "revision", "1e5"),
        ("prompts.dataset_config=2026-01-31", "prompts", "dataset_config", "2026-01-31"),
        ("prompts.source=no", "prompts", "source", "no"),
        ("objective.alpha=0.1", "objective", "options", {"alpha": 0.1}),
        (" train.seed = 7", "train", "seed", 7),
    ],
)
def test_overrides_are_typed_as_in_a_file(override, section, key, value):
    sections = {"student": {"init": "depth_prune"}} if "keep" in override else {}
    got = getattr(getattr(recipe(override, **sections), section), key)
    assert got == value and type(got) is type(value)


def test_a_list_of_groups_is_what_is_evaluated():
    """As the design document writes it: in a file, with more said on the command line, and there alone."""
    listed = recipe(evaluate=["rouge"])
    assert listed == recipe("evaluate.groups=[rouge]") == recipe(evaluate={"groups": ["rouge"]})
    both = recipe("evaluate.samples=2", "evaluate=[fidelity]", evaluate=["rouge"])
    assert (tuple(both.evaluate.groups), both.evaluate.samples) == (("fidelity",), 2)
    assert list(as_tree(listed)["evaluate"]["groups"]) == ["rouge"]


def test_the_last_override_wins():
    assert recipe("train.seed=1", "train.seed=2").train.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lerning_rate=1", "unknown key 'train.lerning_rate'; did you mean 'train.learning_rate'?"),
        ("learning_rate=1", "unknown key 'learning_rate'; did you mean 'train.learning_rate'?"),
        ("trian.seed=1", "unknown key 'trian'; did you mean 'train'?"),
        ("student.lora.rank=1", "unknown key 'student.lora.rank'"),
        ("train.max_steps=ten", "train.max_steps: got 'ten'; input should be a valid integer"),
        ("train.max_steps=1.5", "train.max_steps: got 1.5; input should be a valid integer"),
        ("train.max_steps=0", "train.max_steps: got 0; input should be greater than or equal to 1"),
        ("train.max_steps=true", "train.max_steps: got True"),
        ("train.bf16=1", "train.bf16: got 1; input should be a valid boolean"),
        ("train.bf16=yes", "train.bf16: got 'yes'"),
        ("train.learning_rate='1e-4'", "train.learning_rate: got '1e-4'; input should be a valid number"),
        ("train.learning_rate=.nan", "train.learning_rate: got nan; expected a finite number"),
        ("objective.alpha=.inf", "objective.alpha: got inf; expected a finite number"),
        ("train.seed=-1", "train.seed: got -1"),
        ("train.lr_scheduler_type=cosin", "'linear', 'cosine'"),
        ("train=5", "train is 5; expected a section with keys"),
        ("train=null", "train is None; expected a section"),
        ("train.report_to=wandb", "train.report_to: got 'wandb'; expected a list, such as train.report_to=[wandb]"),
        ("responses.stop='a, b'", 'expected a list, such as responses.stop=["a, b"]'),
        ("student.keep=3", "student.keep: got 3; expected a list, such as student.keep=[3]"),
        ("student.keep={a: 1}", "student.keep: got {'a': 1}; expected a list"),
        ("teacher.support_temperatures=2.5", "expected a list, such as teacher.support_temperatures=[2.5]"),
        ("objective.schedule.alpha=0.1", "objective.schedule.alpha: got 0.1; expected a list"),
        (
            "evaluate.groups=[fidelity, rogue]",
            "evaluate.groups.1: got 'rogue'; input should be 'fidelity', 'rouge',",
        ),
        (
            "evaluate=[fidelity, rogue]",
            "evaluate.groups.1: got 'rogue'; input should be 'fidelity', 'rouge',",
        ),
        ("evaluate=fidelity", "evaluate is 'fidelity'; expected a section"),
        ("responses.top_p=1.5", "responses.top_p: got 1.5; input should be less than or equal to 1"),
        ("prompts.fields.question=q", "prompts.fields.question: got 'question'; input should be 'prompt'"),
        ("objective.temperature_scale=tau3", "objective.temperature_scale: got 'tau3'; input should be 'none', 'tau'"),
        ("teacher.model=5", "teacher.model: got 5; input should be a valid string"),
        ("teacher.model.name=x", "teacher.model is a value, not a section"),
        ("train.max_steps", "has no value; write section.key=value"),
        ("=1", "has no value"),
        ("name=[a", "the value of override 'name=[a' is not valid YAML"),
        ("name=", "name: got None"),
        ("name=../x", "expected a plain name"),
        ("name=/x", "expected a plain name"),
        ('name="a\\nb"', "expected a plain name"),
        ("objective.options={temperature: 3}", "write it as objective.temperature"),
        ("student.init=pretrained", "student.model is missing; name a model, or set student.init"),
        ("student={init: pretrained, model: m, layers: 2}", "student.keep belong to init depth_prune, not to init"),
        ("student.revision=abc", "student.revision is 'abc', but without student.model the student is made of the"),
        ("student.trust_remote_code=true", "made of the teacher; set teacher.trust_remote_code, or name student.model"),
        (
            "train={warmup_ratio: 0.1, warmup_steps: 5}",
            "warmup_ratio is 0.1, but train.warmup_steps=5 takes its place",
        ),
        ("train.hub_model_id=me/mine", "train.hub_model_id is 'me/mine', which only train.push_to_hub reads"),
        (
            "objective.temperature_shape=linear",
            "temperature_shape is linear, which only objective.temperature_end reads",
        ),
        ("student.layers=null", "needs student.layers (how many) or student.keep"),
        ("student.keep=[0, 1]", "not both"),
        ("student.config={hidden_size: 8}", "student.config belongs to init scratch"),
    ],
)
def test_what_is_wrong_gets_one_line(override, message):
    assert message in refusal(override)


def test_a_missing_model_is_asked_for():
    with pytest.raises(LimbeckError, match=r"^teacher is missing; add it to the recipe"):
        load_recipe({})
    with pytest.raises(LimbeckError, match=r"teacher\.model is missing"):
        load_recipe({"teacher": {}})
    with pytest.raises(LimbeckError, match=r"student\.model is missing; name a model, or set student\.init"):
        load_recipe({"teacher": {"model": "t"}})


def test_several_mistakes_share_the_line():
    message = refusal("train.sed=1", "train.max_steps=x", "teacher.modell=y")
    assert all(part in message for part in ("'train.seed'", "train.max_steps: got 'x'", "'teacher.model'"))


def test_a_long_value_is_cut_short():
    assert len(refusal(f"train.max_steps={'9' * 3000}")) < 300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds nothing; expected sections"),
        ("- a\n- b", "holds list"),
        ("train: {a: 1", "is not valid YAML: while parsing a flow mapping"),
        ("teacher: {model: t}\nteacher: {model: u}", "the key 'teacher' stands twice"),
        ("train: {seed: 1, seed: 2}", "the key 'seed' stands twice"),
        ("? [a]\n: 1", "a key must be plain text"),
        ("a: &x 1\nb: *x", "anchors and aliases"),
        ("a: !!python/object:os.system x", "tag"),
        ("a: !!bool maybe", "tag"),
        ("\ta: 1", "is not valid YAML"),
        ("a: 1\n---\nb: 2", "is not valid YAML"),
        ("a: \x07", "is not valid YAML"),
        ("a: " + "[" * 2000, "nested too deeply"),
        ("a: " + "[" * 40 + "]" * 40, "nested more than"),
    ],
)
def test_broken_files_get_one_line(tmp_path, text, message):
    with pytest.raises(LimbeckError) as error:
        in_file(tmp_path, text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(LimbeckError, match="not UTF-8"):
        load_recipe(tmp_path / "x.yaml")


def test_an_unknown_recipe_names_the_shipped_ones(tmp_path):
    with pytest.raises(LimbeckError, match=r"quickstart.*did you mean 'quickstart'\?"):
        load_recipe("quikstart")
    with pytest.raises(LimbeckError, match="neither a file nor a shipped recipe"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    "tree",
    [
        {("a", "b"): 1},
        {"train": {1: 2}},
        {"name": "\ud800"},
        {"name": b"x"},
        {"objective": {"alpha": float("nan")}},
        {"objective": {"x": {1, 2}}},
        {"objective": {"x": object()}},
        {"a": 1, 1: 2, "1": 3},
        {"a\nb": 1},
        {"objective": {"a\u2028b": 1}},
    ],
)
def test_trees_that_no_file_could_hold_get_one_line(tree):
    with pytest.raises(LimbeckError) as error:
        load_recipe(PLAIN | tree)
    assert "\n" not in str(error.value)


def test_a_tree_that_holds_itself_gets_one_line():
    loop: dict[str, Any] = {}
    loop["a"] = loop
    assert "nested" in refusal(objective=loop)


# ---- round trips and fuzz

TEXT = st.text(max_size=12) | st.sampled_from(
    ["1e5", "on", "no", "null", "~", "0123", "1:30", "=", "<<", "true", "2026-01-31", "1_0", ".inf", "- a", "#", "a: b"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
VALUES = st.sampled_from([0, 1, 2, 0.5, -1, 1e-4, 10**400, "on", "auto", "float32", True, None, [], {}]) | TREES
KEYS = st.sampled_from(known_keys()) | st.sampled_from(["objective.alpha", "objective.first", "student.config.x"])
FINITE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)


@given(st.dictionaries(TEXT, FINITE, max_size=4))
def test_what_is_dumped_is_parsed_back(tree):
    assert parse(dump(tree), "it") == tree


@given(st.text())
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        parse(text, "it")
    except LimbeckError as error:
        assert len(str(error).splitlines()) == 1


def mutated(base: dict[str, Any], changes: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = copy.deepcopy(base)
    for key, value in changes:
        *parents, leaf = key.split(".")
        node = tree
        for part in parents:
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        node[leaf] = value
    return tree


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.tuples(KEYS, VALUES), max_size=3))
def test_any_mutation_loads_and_comes_back_or_gets_one_line(changes):
    try:
        loaded = load_recipe(mutated(PLAIN, changes))
    except LimbeckError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert load_recipe(parse(to_yaml(loaded), "it")) == loaded
    try:
        objective_of(loaded)
    except LimbeckError as error:
        assert len(str(error).splitlines()) == 1


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_any_tree_is_a_recipe_or_gets_one_line(tree):
    for whole in (tree, {**PLAIN, "objective": tree}, {**PLAIN, "student": tree}):
        if isinstance(whole, dict):
            with _either():
                load_recipe(whole)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(KEYS | TEXT, TEXT | st.sampled_from(["[", "{a: 1}", "1e-4", "[1, x]"])), max_size=3))
def test_any_override_is_read_or_gets_one_line(changes):
    with _either():
        load_recipe(PLAIN, [f"{key}={value}" for key, value in changes])


class _either:
    """Allows a LimbeckError of one line, and nothing else."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, LimbeckError) and len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "key", "meant"),
    [
        ("fkl", "temprature", "objective.temperature"),
        ("fkl", "temprature_end", "objective.temperature_end"),
        ("fkl", "shedule", "objective.schedule"),
        ("skl", "alhpa", "objective.alpha"),
        ("skl", "nme", "objective.name"),
    ],
)
def test_a_misspelt_key_of_the_objective_is_named_with_the_nearest(name, key, meant):
    loaded = recipe(objective={"name": name, key: 1})
    with pytest.raises(LimbeckError, match=rf"'objective\.{key}' \(objective '{name}' .*; did you mean '{meant}'\?"):
        objective_of(loaded)


# ---- shipped recipes and the schema


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_build_and_come_back(name):
    shipped = load_recipe(name)
    assert shipped.name == name.replace("/", "-")
    objective_of(shipped)
    assert load_recipe(parse(to_yaml(shipped), "it")) == shipped


def test_a_resolved_recipe_spells_out_every_default():
    tree = as_tree(recipe("objective.name=skl", "objective.alpha=0.2"))
    assert set(tree["train"]) == set(asdict(recipe().train))
    assert tree["objective"]["alpha"] == 0.2 and "options" not in tree["objective"]


def test_the_schema_in_the_docs_is_the_codes():
    remedy = "regenerate it with: limbeck schema > docs/recipe.schema.json"
    assert SCHEMA.exists(), remedy
    assert json.loads(SCHEMA.read_text("utf-8")) == json_schema(), remedy


def allowed(schema: dict[str, Any], node: dict[str, Any], root: dict[str, Any]) -> None:
    """Every key of the tree is a property of the schema, at any depth."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    for key, value in node.items():
        assert key in schema["properties"], key
        inner = schema["properties"][key]
        choices = [inner, *inner.get("anyOf", [])]
        reference = next((choice for choice in choices if "$ref" in choice), None)
        if isinstance(value, dict) and reference is not None:
            allowed(reference, value, root)


def test_the_schema_knows_the_recipes_and_the_objectives():
    schema = json_schema()
    for name in shipped_recipes():
        allowed(schema, as_tree(load_recipe(name)), schema)
    with pytest.raises(AssertionError, match="lerning_rate"):
        allowed(schema, {"train": {"lerning_rate": 1}}, schema)
    objective = schema["$defs"]["ObjectiveSection"]
    assert objective["properties"]["name"]["enum"] == sorted(OBJECTIVES)
    assert objective["additionalProperties"] is False
    assert schema["$defs"]["TrainSection"]["properties"]["max_steps"]["description"]
