"""`responses.source` in a recipe: the name of a response source, or a mapping with its name and options."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator

from limbeck.recipe.member import MemberKey
from limbeck.rollouts.options import SOURCE_KEY, SourceOptions
from limbeck.rollouts.registry import SOURCES

SOURCE: MemberKey[SourceOptions] = MemberKey(key=SOURCE_KEY, registry=SOURCES, default="teacher", example="student")
# A response source, from its name or a mapping.
SourceSetting = Annotated[SourceOptions, PlainValidator(SOURCE.read, json_schema_input_type=Any)]


def source_name(source: SourceOptions) -> str:
    """The name under which a response source is registered."""
    return SOURCE.name_of(source)


def initial_author_of(source: object, otherwise: object) -> object:
    """Author of the responses that were written before training, by the recipe of a run."""
    return (_member(source) or SourceOptions).initial_author or otherwise


def sampled_before(source: object) -> bool:
    """Whether all responses are sampled from the teacher, so that `responses.temperature` and the like apply."""
    member = _member(source) or SourceOptions
    return not member.on_policy and member.initial_author == "teacher"


def credit_of(source: object) -> str:
    """Authors of the responses, in the words of the model card."""
    return (_member(source) or SourceOptions).credit or f"from the source {source}"


def _member(source: object) -> type[SourceOptions] | None:
    return SOURCES.get(source) if isinstance(source, str) else None
