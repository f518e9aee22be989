"""`responses.engine` in a recipe: the name of an engine, or a mapping with its name and options."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator

from limbeck.recipe.member import MemberKey
from limbeck.rollouts.engines import ENGINE_KEY, ENGINES, Engine

ENGINE: MemberKey[Engine] = MemberKey(key=ENGINE_KEY, registry=ENGINES, default="in_process", example="in_process")
# An engine, from its name or a mapping.
EngineSetting = Annotated[Engine, PlainValidator(ENGINE.read, json_schema_input_type=Any)]
