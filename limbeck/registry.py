"""Registries: names of frozen dataclasses whose fields are their options.

Objective, sequence rule, response source, teacher and evaluation group are a `Registry` each. To add a member: write
the dataclass, add one line to the registry; recipe keys, JSON schema, lists, docs tables and generic tests read it
there. From outside the package, `REGISTRY.register(name, Member)` does the same, and so does an entry point of the
registry's group in an installed package:

    [project.entry-points."limbeck.objectives"]
    mine = "my_package:MyObjective"
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_origin, get_type_hints

from limbeck.types import LimbeckError, short_repr

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Member = TypeVar("Member")
ReadOption = Callable[[str, dataclasses.Field[Any], object], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """An option of a member, as lists and tables show it.

    Attributes:
        default: as Python writes it; None where the option must be given.
    """

    name: str
    kind: str
    default: str | None


def installed(group: str) -> Iterable[EntryPoint]:
    """Entry points of a group in the packages that are installed."""
    return _every_entry_point().select(group=group)


@cache
def _every_entry_point() -> Any:
    """Read once for all registries: it takes 20 ms."""
    from importlib.metadata import entry_points

    return entry_points()


class Registry(Mapping[str, type[Member]], Generic[Member]):
    """Names of frozen dataclasses, in the order in which they are listed.

    Args:
        kind: what messages call a member, such as "objective".
        entry_points: the group of entry points that other packages add members by.
        read_option: gives the value of an option from what was written; the default checks it against the kind of the
            field's default. Members that are pydantic dataclasses check themselves.
    """

    def __init__(
        self,
        kind: str,
        members: Mapping[str, type[Member]],
        *,
        entry_points: str,
        read_option: ReadOption | None = None,
    ):
        self.kind, self._group, self._read = kind, entry_points, read_option or checked
        self._members: dict[str, type[Member]] = {}
        self._discovered = False
        for name, member in members.items():
            self.register(name, member)

    def register(self, name: str, member: type[Member]) -> type[Member]:
        """Add a member.

        Raises:
            LimbeckError: the name is taken by another, or the member is no frozen dataclass.
        """
        if self._members.get(name, member) is not member:
            raise LimbeckError(f"{self.kind} {name!r} is registered already; choose another name")
        if not dataclasses.is_dataclass(member) or not member.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise LimbeckError(
                f"{self.kind} {name!r} is {member!r}; expected a frozen dataclass, whose fields are options"
            )
        self._members[name] = member
        return member

    def unregister(self, name: str) -> None:
        """Take a member out again, as a test does."""
        self._members.pop(name, None)

    def __getitem__(self, name: str) -> type[Member]:
        if name not in self._members:
            self._discover()
        return self._members[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._members:
            self._discover()
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(self._members)

    def __len__(self) -> int:
        self._discover()
        return len(self._members)

    def _discover(self) -> None:
        """Members that installed packages bring, looked for once, when a name is not among our own."""
        if self._discovered:
            return
        self._discovered = True
        for point in installed(self._group):
            self.register(point.name, point.load())

    def options(self, name: str) -> dict[str, Option]:
        """The options of a member by name."""
        return dict(_options_of(self[name]))

    def summary(self, name: str) -> str:
        """The first line of a member's docstring."""
        return (self[name].__doc__ or "").strip().splitlines()[0]

    def build(self, name: str, **options: object) -> Member:
        """The member of this name with these options.

        Raises:
            LimbeckError: for an unknown name or option, with the nearest known one, or a value of the wrong kind.
        """
        member = self.require(name)
        fields = {field.name: field for field in dataclasses.fields(member)}  # type: ignore[arg-type]
        for option in options:
            if option not in fields:
                has = f"it has {', '.join(fields)}" if fields else "it has no options"
                raise LimbeckError(f"{self.kind} {name!r} has no option {option!r}{nearest(option, fields)}: {has}")
        if hasattr(member, "__pydantic_validator__"):
            return _validated(f"{self.kind} {name!r}", member, options)
        return member(**{option: self._read(name, fields[option], value) for option, value in options.items()})

    def require(self, name: str) -> type[Member]:
        """The member of this name.

        Raises:
            LimbeckError: there is none; names the nearest.
        """
        # A recipe may give anything in a name's place, such as a list.
        if not isinstance(name, str) or name not in self:  # pyright: ignore[reportUnnecessaryIsInstance]
            near = nearest(str(name), self)
            raise LimbeckError(f"{self.kind} {short_repr(name)} is unknown{near}: choose from {', '.join(self)}")
        return self[name]


def checked(name: str, field: dataclasses.Field[Any], value: object) -> object:
    """The value of an option whose kind is that of its default; whole numbers are taken where fractions may stand.

    Raises:
        LimbeckError: another kind.
    """
    kind = type(field.default)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise LimbeckError(f"{name} {field.name}={value!r}: expected a {kind.__name__}, such as {field.default!r}")
    try:
        return float(value) if kind is float and isinstance(value, int) else value
    except OverflowError:
        raise LimbeckError(f"{name} {field.name}={value!r}: expected a number of less than 309 digits") from None


def _validated(what: str, member: type[Any], options: Mapping[str, object]) -> Any:
    from pydantic import TypeAdapter, ValidationError

    try:
        # Through JSON, where strict mode still reads a list as a tuple.
        return TypeAdapter(member).validate_json(json.dumps(dict(options)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise LimbeckError(f"{what} {where}={first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


@cache
def _options_of(member: type[Any]) -> Mapping[str, Option]:
    """Read once: a mistake in a recipe is compared with the options of every member there is."""
    try:
        hints = get_type_hints(member)
    except NameError:
        hints = {}
    fields = dataclasses.fields(member)
    return {f.name: Option(name=f.name, kind=_kind(hints.get(f.name), f), default=_default(f)) for f in fields}


def _kind(hint: Any, field: dataclasses.Field[Any]) -> str:
    """Type of an option, without the bounds that are marked on it."""
    if hint is None:
        # A name that only type checkers import: as it is written.
        return str(field.type)
    if isinstance(hint, type) and get_origin(hint) is None:
        return hint.__name__
    plain = re.sub(r"\b[a-z_.]+\.(?=[A-Z])", "", str(hint))
    return re.sub(r"Optional\[(\w+)\]", r"\1 | None", plain)


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return None


def nearest(word: str, known: Iterable[str]) -> str:
    """' (nearest: x)' where a known word is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (nearest: {close[0]!r})" if close else ""
