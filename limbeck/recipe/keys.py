"""Keys of a recipe without effect on results, by their annotations; read by fingerprints and comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from limbeck.fields import LATER, NEUTRAL, SAME_ARM, Effect
from limbeck.recipe.sections import MEMBER_KEYS, Recipe, sections_under


def neutral_keys() -> frozenset[str]:
    """Dotted keys in which two runs may differ and be the same run."""
    return frozenset(_marked(Recipe, (NEUTRAL,)))


def same_arm_keys() -> frozenset[str]:
    """Dotted keys in which two runs may differ and belong to one arm of a comparison; the neutral ones among them."""
    return frozenset(_marked(Recipe, (NEUTRAL, SAME_ARM)))


def fingerprinted_member(key: str, member: Any) -> dict[str, Any]:
    """Value of a key that holds a member of a registry: its name and options, without neutral ones."""
    return {"name": MEMBER_KEYS[key].name_of(member), **fingerprinted(member)}


def fingerprinted(section: Any) -> dict[str, Any]:
    """A section as plain values, sections inside it too, without its neutral keys and later ones at their defaults."""
    left_out, later = _own(type(section), (NEUTRAL,)), _own(type(section), (LATER,))
    left_out |= {f.name for f in fields(section) if f.name in later and getattr(section, f.name) == f.default}
    return {f.name: _plain(getattr(section, f.name)) for f in fields(section) if f.name not in left_out}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return fingerprinted(value)
    return {key: _plain(one) for key, one in value.items()} if isinstance(value, dict) else value


def _marked(section: type, effects: tuple[Effect, ...], prefix: str = "") -> Iterator[str]:
    yield from (prefix + name for name in _own(section, effects))
    for f in fields(section):
        for place, inner in sections_under(section, f.name):
            yield from _marked(inner, effects, f"{prefix}{place}.")
        if (key := f"{prefix}{f.name}") in MEMBER_KEYS:
            for member in MEMBER_KEYS[key].registry.values():
                yield from (f"{key}.{name}" for name in _own(member, effects))


@cache
def _own(section: type, effects: tuple[Effect, ...]) -> frozenset[str]:
    """Names of a section's own keys that bear one of the marks."""
    try:
        hints = get_type_hints(section, include_extras=True)
    except NameError:
        # A member from outside whose annotations only type checkers can read: it marks nothing.
        return frozenset()
    return frozenset(name for name, hint in hints.items() if set(effects) & _marks(hint))


def _marks(hint: Any) -> set[Effect]:
    return {mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Effect)}
