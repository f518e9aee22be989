"""`responses.source` in a recipe: the name of a response source, or a mapping with its name and options."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import PlainValidator, TypeAdapter
from pydantic_core import PydanticCustomError

from limbeck.recipe.messages import short_repr, suggestion
from limbeck.rollouts.options import SOURCE_KEY, SourceOptions
from limbeck.rollouts.registry import SOURCES
from limbeck.types import LimbeckError

# What a mapping without a name sets the options of.
DEFAULT = "teacher"


def read_source(value: object) -> SourceOptions:
    """The response source of what a recipe holds.

    Raises:
        ValueError: as pydantic takes it: no such source, no such option, or a value that the option cannot have.
    """
    if isinstance(value, SourceOptions):
        return value
    if not isinstance(value, str | Mapping):
        raise _mistake(
            f"{SOURCE_KEY} is {short_repr(value)}; expected a name such as student, or a mapping of name and options"
        )
    options = {"name": value} if isinstance(value, str) else dict(value)
    name = options.pop("name", DEFAULT)
    if not isinstance(name, str):
        raise _mistake(f"{SOURCE_KEY}.name is {short_repr(name)}; expected a name such as student")
    try:
        member = SOURCES.require(name)
    except LimbeckError as error:
        raise _mistake(f"{SOURCE_KEY}: {error}") from None
    own = SOURCES.options(name)
    if unknown := next((option for option in options if option not in own), None):
        raise _mistake(_unknown_option(name, unknown))
    # Through JSON, where strict mode still reads a list as a tuple.
    return TypeAdapter(member).validate_json(json.dumps(options))


# A response source, from its name or a mapping.
SourceSetting = Annotated[SourceOptions, PlainValidator(read_source, json_schema_input_type=Any)]


def _mistake(message: str) -> PydanticCustomError:
    return PydanticCustomError("response_source", "{message}", {"message": message})


def _unknown_option(name: str, option: str) -> str:
    readers = [other for other in SOURCES if option in SOURCES.options(other)]
    if readers:
        return (
            f"{SOURCE_KEY}.{option} is an option of {' or '.join(readers)}, not {name}; "
            f"remove it, or set {SOURCE_KEY}.name={readers[0]}"
        )
    known = [f"{SOURCE_KEY}.{own}" for own in SOURCES.options(name)]
    has = f"the options {', '.join(SOURCES.options(name))}" if known else "no options"
    key = f"{SOURCE_KEY}.{option}"
    return f"unknown key {key!r} (response source {name!r} has {has}){suggestion(key, known)}"


def source_name(source: SourceOptions) -> str:
    """The name under which a response source is registered."""
    return next(name for name, member in SOURCES.items() if member is type(source))


def source_tree(source: SourceOptions) -> dict[str, Any]:
    """A response source as plain values: its name and all its options."""
    return {"name": source_name(source), **asdict(source)}  # type: ignore[call-overload]


def source_keys() -> Iterator[str]:
    """Every dotted key below `responses.source`."""
    options = (option for name in SOURCES for option in SOURCES.options(name))
    yield from (f"{SOURCE_KEY}.{key}" for key in dict.fromkeys(["name", *options]))


def source_schema() -> list[dict[str, Any]]:
    """JSON schemas of what `responses.source` may be: a name, or the mapping of one source."""
    schemas: list[dict[str, Any]] = [{"type": "string", "enum": list(SOURCES)}]
    for name, member in SOURCES.items():
        schema = TypeAdapter(member).json_schema()
        named = {"const": name, "type": "string"}
        schema["properties"] = {"name": named, **schema.get("properties", {})}
        schemas.append(schema | {"title": name, "required": ["name"]})
    return schemas


def initial_author_of(source: object, otherwise: object) -> object:
    """Who wrote the responses that were there before training, of what stands in the recipe of a run."""
    return (_member(source) or SourceOptions).initial_author or otherwise


def sampled_before(source: object) -> bool:
    """Whether the responses are the teacher's alone, so that `responses.temperature` and the like say how."""
    member = _member(source) or SourceOptions
    return not member.on_policy and member.initial_author == "teacher"


def credit_of(source: object) -> str:
    """Who wrote the responses, as a model card says it."""
    return (_member(source) or SourceOptions).credit or f"from the source {source}"


def _member(source: object) -> type[SourceOptions] | None:
    return SOURCES.get(source) if isinstance(source, str) else None
