"""Recipes: the settings of a run. Typed sections, YAML in and out, dotted overrides, unknown keys refused.

A recipe is one YAML file; its sections are the stages of a run, in order. `load_recipe` merges file and
overrides and validates them; every mistake is one `LimbeckError` line that names the key and the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from limbeck.recipe import checks, messages, yaml_text
from limbeck.recipe.evaluation import EVALUATION_GROUPS, choose_groups, open_groups
from limbeck.recipe.files import read_yaml, shipped_recipes
from limbeck.recipe.optimizers import OPTIM
from limbeck.recipe.preference import PAIRS_SETTING
from limbeck.recipe.response_engine import ENGINE
from limbeck.recipe.response_source import SOURCE
from limbeck.recipe.retired import RetiredKeyError, refuse_retired
from limbeck.recipe.sections import AXES, GENERATE, MEMBER_KEYS, ObjectiveSection, Recipe, TrainSection, sections_under
from limbeck.recipe.teacher import COMBINE, OF_EACH_TEACHER, SEES_SETTING, WHERE
from limbeck.types import LimbeckError

__all__ = ["ObjectiveSection", "Recipe", "TrainSection", "shipped_recipes"]

_ADAPTER = TypeAdapter(Recipe)


def load_recipe(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A validated recipe from a shipped name, a YAML file or a mapping, with `section.key=value` overrides on top.

    Raises:
        LimbeckError: unknown recipe, broken YAML, unknown key (with the suggestion known one), wrong type or value.
    """
    return _validate(recipe_tree(recipe, overrides))


def load_recipe_or_run(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The same, where a run directory stands for the recipe it was made from.

    Raises:
        LimbeckError: as `load_recipe`; or the run is an earlier version's.
    """
    if not isinstance(recipe, Mapping) and (resolved := Path(recipe) / "recipe.resolved.yaml").exists():
        # A run that was started elsewhere, or moved: it continues where it lies now.
        try:
            return load_recipe(resolved, [f"output_dir={json.dumps(str(recipe))}", *overrides])
        except RetiredKeyError as error:
            raise LimbeckError(f"{recipe} was made by an earlier version: {error}, in a new directory") from None
    return load_recipe(recipe, overrides)


def recipe_tree(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe as written, with the overrides on top, before `load_recipe` validates it.

    Raises:
        LimbeckError: unknown recipe, broken YAML, or an override without a value.
    """
    tree = dict(recipe) if isinstance(recipe, Mapping) else read_yaml(recipe, "recipe")
    if isinstance(groups := tree.get("evaluate"), list | tuple):
        tree["evaluate"] = {"groups": groups}
    for override in overrides:
        apply_override(tree, override)
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set a dotted key of a tree in place, from text such as `train.max_steps=20`.

    Raises:
        LimbeckError: no value, or a section where a value stands.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise LimbeckError(f"override {override!r} has no value; write section.key=value, e.g. train.max_steps=20")
    value = yaml_text.parse(text, f"the value of override {override!r}")
    if key == "evaluate" and isinstance(value, list):
        key = "evaluate.groups"
    if key.startswith("evaluate.groups.") and isinstance(section := tree.get("evaluate", {}), Mapping):
        tree["evaluate"] = open_groups(dict(section))
    *parents, leaf = key.split(".")
    node = tree
    for depth, part in enumerate(parents):
        child = node.get(part)
        if child is None:
            child = {}
        if isinstance(child, str) and ".".join(parents[: depth + 1]) in MEMBER_KEYS:
            child = {"name": child}
        if not isinstance(child, Mapping):
            raise LimbeckError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        # A copy, so that a mapping handed in by a caller is never changed.
        node[part] = dict(child)
        node = node[part]
    node[leaf] = choose_groups(value, node.get(leaf)) if key == "evaluate.groups" else value


def _validate(tree: dict[str, Any]) -> Recipe:
    tree = yaml_text.plain_tree(tree)
    refuse_retired(tree)
    objective = tree.get("objective")
    if isinstance(objective, dict) and "options" not in objective:
        options = {k: v for k, v in objective.items() if k not in AXES}
        tree["objective"] = {k: v for k, v in objective.items() if k in AXES} | {"options": options}
    one_teacher(tree)
    try:
        # Through JSON, where strict mode still reads a mapping as a section and a list as a tuple.
        recipe = _ADAPTER.validate_json(json.dumps(tree))
    except ValidationError as error:
        raise LimbeckError(messages.explain_mistake(error, (*known_keys(), *member_keys()))) from None
    checks.check(recipe)
    return recipe


def one_teacher(tree: dict[str, Any]) -> None:
    """Set `teacher` from `teachers`, in place: the only one of them, or the first, whose tokenizer makes the ids.

    Raises:
        LimbeckError: both are given, and differ.
    """
    teachers = tree.get("teachers")
    if not isinstance(teachers, dict) or not teachers:
        return
    sections = [section for section in teachers.values() if isinstance(section, dict)]
    if len({section.get("dtype") or "float32" for section in sections}) > 1:
        # Teachers of several precisions have one signal: what none of them loses by.
        teachers = {
            name: {"cache_dtype": "float32", **section} if isinstance(section, dict) else section
            for name, section in teachers.items()
        }
        tree["teachers"] = teachers
    first = next(iter(teachers.values()))
    if "teacher" in tree and tree["teacher"] != first:
        raise LimbeckError("teacher and teachers are both given; name the teachers in teachers alone")
    tree["teacher"] = first
    if len(teachers) == 1 and tree.get("combine") is None:
        del tree["teachers"]


def member_keys() -> Iterator[str]:
    """Every dotted key below those that hold a member of a registry."""
    for one in MEMBER_KEYS.values():
        yield from one.dotted_keys()


def signal_temperatures(recipe: Recipe) -> tuple[float, ...]:
    """The loss temperatures that a sparse signal of this recipe is made for."""
    objective = recipe.objective
    teacher = objective.temperature if objective.teacher_temperature is None else objective.teacher_temperature
    return tuple(sorted({*recipe.teacher.support_temperatures} or {teacher}))


def objective_of(recipe: Recipe) -> Any:
    """The recipe's objective from the registry; unknown options are refused with the nearest known one."""
    from limbeck.objectives import OBJECTIVES
    from limbeck.objectives import build_objective as build

    section = recipe.objective
    own = [f.name for f in fields(OBJECTIVES[section.name])] if section.name in OBJECTIVES else []
    for key in section.options:
        if section.name in OBJECTIVES and key not in own:
            # What is misspelt may be an option of the objective or a key of the section, which is the same for all.
            near = messages.suggestion(key, [f"objective.{known}" for known in (*AXES, *own)])
            has = f"the options {', '.join(own)}" if own else "no options"
            raise LimbeckError(f"unknown key 'objective.{key}' (objective {section.name!r} has {has} of its own){near}")
    return build(section.name, **section.options)


def named_objective(where: str, options: Mapping[str, Any]) -> Any:
    """The objective of a mapping with a name and options, such as contrast.student."""
    from limbeck.objectives import build_objective as build

    if not isinstance(options.get("name"), str):
        raise LimbeckError(f"{where} is {dict(options)}; expected a name and options, such as {{name: srkl}}")
    with at(where):
        return build(**options)


@contextmanager
def at(key: str) -> Iterator[None]:
    """Add the place in the recipe to errors that are raised inside the block."""
    try:
        yield
    except LimbeckError as error:
        raise LimbeckError(f"{key}: {error}") from None


def rule_of(recipe: Recipe) -> Any:
    """The recipe's rule over whole responses; None where it has none."""
    from limbeck.objectives.sequence.rules import build_rule as build

    if recipe.contrast.rule is None:
        return None
    with at("contrast.rule"):
        return build(**recipe.contrast.rule)


def known_keys() -> tuple[str, ...]:
    """Every dotted key of a recipe with those of evaluation groups, without options of objectives and sources."""

    def walk(section: Any, prefix: str) -> Iterable[str]:
        for f in fields(section):
            yield prefix + f.name
            for place, inner in sections_under(section, f.name):
                if place != f.name:
                    yield prefix + place
                yield from walk(inner, f"{prefix}{place}.")

    return tuple(walk(Recipe, ""))


def optional_sections() -> frozenset[str]:
    """Dotted keys of the sections that a recipe need not have: null leaves one out, {} takes it with its defaults."""

    def walk(section: Any, prefix: str) -> Iterable[str]:
        for f in fields(section):
            for place, inner in sections_under(section, f.name):
                if place == f.name and f.default is None:
                    yield prefix + place
                yield from walk(inner, f"{prefix}{place}.")

    return frozenset(walk(Recipe, ""))


def as_tree(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain nested mappings, every default spelled out; options stand beside the name."""
    assert is_dataclass(recipe)
    tree: dict[str, Any] = yaml_text.plain_tree(asdict(recipe))
    tree["objective"] |= tree["objective"].pop("options")
    for name, section in recipe.teachers.items():
        own = tree["teachers"][name]
        own |= {key: yaml_text.plain_tree(one.tree(getattr(section, key))) for key, one in OF_EACH_TEACHER.items()}
    for key, one in MEMBER_KEYS.items():
        section, _, name = key.partition(".")
        if not name:
            member = getattr(recipe, section)
            tree[section] = None if member is None else yaml_text.plain_tree(one.tree(member))
            continue
        if (member := getattr(getattr(recipe, section), name, None)) is not None:
            tree[section][name] = yaml_text.plain_tree(one.tree(member))
    return tree


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` of it gives the same recipe."""
    return yaml_text.dump(as_tree(recipe))


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe for editors, with the options of every registered objective and response source."""
    from limbeck.objectives import OBJECTIVES

    schema = _ADAPTER.json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "limbeck recipe"
    listed = {"type": "array", "items": {"enum": list(EVALUATION_GROUPS)}, "uniqueItems": True}
    schema["properties"]["evaluate"] = {"anyOf": [schema["properties"]["evaluate"], listed]}
    groups = schema["$defs"]["EvaluateSection"]["properties"]["groups"]
    del groups["type"], groups["additionalProperties"]
    schema["$defs"]["EvaluationGroups"] = _group_options(schema["$defs"])
    groups["anyOf"] = [{"$ref": "#/$defs/EvaluationGroups"}, listed]
    schema["$defs"]["TeacherSection"]["properties"]["where"]["anyOf"] = WHERE.schema()
    schema["$defs"]["TeacherSection"]["properties"]["sees"]["anyOf"] = SEES_SETTING.schema()
    schema["properties"]["combine"]["anyOf"] = [*COMBINE.schema(), {"type": "null"}]
    # One of the two, which JSON schema says by alternatives that editors do not complete.
    schema["required"] = [name for name in schema["required"] if name != "teacher"]
    schema["$defs"]["PromptsSection"]["properties"]["generate"]["anyOf"] = [*GENERATE.schema(), {"type": "null"}]
    schema["$defs"]["ResponsesSection"]["properties"]["source"]["anyOf"] = SOURCE.schema()
    schema["$defs"]["ResponsesSection"]["properties"]["engine"]["anyOf"] = ENGINE.schema()
    schema["$defs"]["TrainSection"]["properties"]["optim"]["anyOf"] = OPTIM.schema()
    schema["$defs"]["PreferenceSection"]["properties"]["pairs"]["anyOf"] = PAIRS_SETTING.schema()
    section = schema["$defs"]["ObjectiveSection"]
    del section["properties"]["options"]
    section["properties"]["name"]["enum"] = sorted(OBJECTIVES)
    for objective in OBJECTIVES.values():
        for option in fields(objective):
            section["properties"].setdefault(option.name, {})
    return schema


def _group_options(definitions: dict[str, Any]) -> dict[str, Any]:
    """Schema of the options of the evaluation groups by name; their own go among the definitions."""
    for group in EVALUATION_GROUPS.values():
        own = TypeAdapter(group).json_schema()
        definitions |= own.pop("$defs", {}) | {group.__name__: own}
    options = {name: {"$ref": f"#/$defs/{group.__name__}"} for name, group in EVALUATION_GROUPS.items()}
    return {"type": "object", "additionalProperties": False, "properties": options}
