"""The section `evaluate` of a recipe: which groups are measured with which options, and what they share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import InitErrorDetails, PydanticCustomError

from limbeck.evaluation.group import EvaluationGroup
from limbeck.evaluation.groups import EVALUATION_GROUPS
from limbeck.evaluation.scores.metrics import StandIn
from limbeck.fields import SAME_ARM, STRICT, Count
from limbeck.recipe.messages import suggestion

DEFAULT_GROUPS = ("fidelity", "rouge")


def _read_groups(value: object) -> object:
    """The groups of a mapping of their options, or of a list of names, in the order in which they are written."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = _listed(value)
    if not isinstance(value, Mapping):
        return value
    found: dict[str, EvaluationGroup] = {}
    mistakes: list[InitErrorDetails] = []
    for name, options in value.items():
        if name not in EVALUATION_GROUPS:
            mistakes.append(InitErrorDetails(type="unexpected_keyword_argument", loc=(name,), input=options))
            continue
        try:
            found[name] = _read_options(EVALUATION_GROUPS[name], options)
        except ValidationError as error:
            mistakes += [_under(name, mistake) for mistake in error.errors()]
    if mistakes:
        raise ValidationError.from_exception_data("groups", mistakes)
    return found


def _read_options(member: type[EvaluationGroup], options: object) -> EvaluationGroup:
    """A group with the options that are written, all of them checked."""
    if isinstance(options, member):
        return options
    # A dataclass that is not pydantic's would pass over what it does not know.
    known = {option.name for option in fields(member)}  # type: ignore[arg-type]
    if isinstance(options, Mapping) and (unknown := [name for name in options if name not in known]):
        mistakes = [InitErrorDetails(type="unexpected_keyword_argument", loc=(name,), input=None) for name in unknown]
        raise ValidationError.from_exception_data(member.__name__, mistakes)
    # Through JSON, where strict mode still reads a list as a tuple.
    return TypeAdapter(member).validate_json(json.dumps(options), strict=True)


def _listed(names: Sequence[object]) -> dict[str, dict[str, Any]]:
    """Groups by name with their default options."""
    known = tuple(EVALUATION_GROUPS)
    mistakes = []
    for place, name in enumerate(names):
        if name not in known:
            listed = ", ".join(repr(one) for one in known[:-1])
            near = suggestion(name, known) if isinstance(name, str) else ""
            said = PydanticCustomError("unknown_group", f"Input should be {listed} or {known[-1]!r}{near}")  # type: ignore[arg-type]
            mistakes.append(InitErrorDetails(type=said, loc=(place,), input=name))
        elif name in names[:place]:
            said = PydanticCustomError("group_twice", "Input should name each group once")
            mistakes.append(InitErrorDetails(type=said, loc=(place,), input=name))
    if mistakes:
        raise ValidationError.from_exception_data("groups", mistakes)
    return {str(name): {} for name in names}


def _under(name: str, mistake: Any) -> InitErrorDetails:
    """A mistake in the options of a group, as one of the mapping of groups."""
    context = {"ctx": mistake["ctx"]} if "ctx" in mistake else {}
    return InitErrorDetails(type=mistake["type"], loc=(name, *mistake["loc"]), input=mistake["input"], **context)


def _default_groups() -> dict[str, Any]:
    return {name: EVALUATION_GROUPS.build(name) for name in DEFAULT_GROUPS}


@dataclass(config=STRICT, kw_only=True)
class EvaluateSection:
    """What is measured and how; a list alone, `evaluate: [fidelity, rouge]`, stands for its groups."""

    groups: Annotated[dict[str, Any], BeforeValidator(_read_groups)] = field(default_factory=_default_groups)
    """The groups of metrics, each with its options: {fidelity: {top_k: 5}, rouge: {}}. A list has their defaults."""
    max_new_tokens: Count = 64
    """Length of the answers that are measured."""
    prompts: Count | None = None
    """Answers for at most this many held-out prompts; null for all."""
    samples: Annotated[int, Field(ge=0)] = 6
    """Answers shown side by side in the report."""
    batch_size: Annotated[Count, SAME_ARM] = 32

    @property
    def stand_ins(self) -> tuple[StandIn, ...]:
        """The models that are measured in the student's place."""
        return tuple(dict.fromkeys(name for group in self.groups.values() for name in group.stand_ins()))


def open_groups(section: dict[str, Any]) -> dict[str, Any]:
    """The tree of a section `evaluate` whose groups are a mapping, so that options can be set in them."""
    groups = section.get("groups", DEFAULT_GROUPS)
    if isinstance(groups, list | tuple):
        groups = {str(name): {} for name in groups}
    return section | {"groups": groups}


def choose_groups(chosen: object, options: object) -> object:
    """The groups of a list, with the options that were written for them before."""
    if not isinstance(chosen, list | tuple) or not isinstance(options, Mapping):
        return chosen
    if not any(isinstance(name, str) and options.get(name) for name in chosen):
        return chosen
    return {str(name): options.get(name, {}) for name in chosen}
