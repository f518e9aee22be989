"""Keys of a recipe that hold a member of a registry: its name, or a mapping of its name and options."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic

from pydantic import TypeAdapter
from pydantic_core import PydanticCustomError

from limbeck.recipe.messages import suggestion
from limbeck.registry import Member, Registry
from limbeck.types import LimbeckError, short_repr

# Type of pydantic's error for a wrong member: its message is whole as it stands.
MISTAKE = "registry_member"


@dataclass(frozen=True, kw_only=True)
class MemberKey(Generic[Member]):
    """A key whose value is a member of a registry.

    Attributes:
        key: its dotted place in a recipe.
        default: the member of a mapping without a name.
        example: a name, for messages.
    """

    key: str
    registry: Registry[Member]
    default: str
    example: str

    def read(self, value: object) -> Member:
        """The member of what a recipe holds.

        Raises:
            ValueError: as pydantic takes it: no such member, no such option, or a value that the option cannot have.
        """
        if any(type(value) is member for member in self.registry.values()):
            return value  # type: ignore[return-value]
        if not isinstance(value, str | Mapping):
            raise _mistake(
                f"{self.key} is {short_repr(value)}; expected a name such as {self.example}, or a mapping of name and "
                "options"
            )
        options = {"name": value} if isinstance(value, str) else dict(value)
        name = options.pop("name", self.default)
        if not isinstance(name, str):
            raise _mistake(f"{self.key}.name is {short_repr(name)}; expected a name such as {self.example}")
        try:
            member = self.registry.require(name)
        except LimbeckError as error:
            raise _mistake(f"{self.key}: {error}") from None
        own = self.registry.options(name)
        if unknown := next((option for option in options if option not in own), None):
            raise _mistake(self._unknown_option(name, unknown))
        # Through JSON, where strict mode still reads a list as a tuple.
        return TypeAdapter(member).validate_json(json.dumps(options))

    def _unknown_option(self, name: str, option: str) -> str:
        readers = [other for other in self.registry if option in self.registry.options(other)]
        if readers:
            return (
                f"{self.key}.{option} is an option of {' or '.join(readers)}, not {name}; "
                f"remove it, or set {self.key}.name={readers[0]}"
            )
        known = [f"{self.key}.{own}" for own in self.registry.options(name)]
        has = f"the options {', '.join(self.registry.options(name))}" if known else "no options"
        key = f"{self.key}.{option}"
        return f"unknown key {key!r} ({self.registry.kind} {name!r} has {has}){suggestion(key, known)}"

    def name_of(self, member: object) -> str:
        """The name under which a member is registered."""
        return next(name for name, known in self.registry.items() if known is type(member))

    def tree(self, member: Any) -> dict[str, Any]:
        """A member as plain values: its name and all its options."""
        return {"name": self.name_of(member), **asdict(member)}

    def dotted_keys(self) -> Iterator[str]:
        """Every dotted key below this one."""
        options = (option for name in self.registry for option in self.registry.options(name))
        yield from (f"{self.key}.{key}" for key in dict.fromkeys(["name", *options]))

    def schema(self) -> list[dict[str, Any]]:
        """JSON schemas of what may stand here: a name, or the mapping of one member."""
        schemas: list[dict[str, Any]] = [{"type": "string", "enum": list(self.registry)}]
        for name, member in self.registry.items():
            schema = TypeAdapter(member).json_schema()
            named = {"const": name, "type": "string"}
            schema["properties"] = {"name": named, **schema.get("properties", {})}
            schemas.append(schema | {"title": name, "required": ["name", *schema.get("required", ())]})
        return schemas


def _mistake(message: str) -> PydanticCustomError:
    return PydanticCustomError(MISTAKE, "{message}", {"message": message})
