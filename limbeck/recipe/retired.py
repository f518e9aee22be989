"""Keys that recipes had under other names: refused with the current names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from limbeck.types import LimbeckError

# A key, or a section of keys, by what took its place; options that kept their names are not listed.
RENAMED = {
    "signal.support": "teacher.support",
    "signal.k": "teacher.support_k",
    "signal.temperatures": "teacher.support_temperatures",
    "signal.cache": "teacher.cache",
    "signal.dtype": "teacher.cache_dtype",
    "responses.author": "responses.source",
    "responses.base": "responses.initial_author",
    "responses.on_policy": "responses.source",
    "responses.on_policy.buffer": "responses.source.capacity",
    "evaluate.fidelity": "evaluate.groups.fidelity",
    "evaluate.rouge": "evaluate.groups.rouge",
    "evaluate.diversity": "evaluate.groups.diversity",
    "evaluate.judge": "evaluate.groups.judge",
    "evaluate.tasks": "evaluate.groups.tasks",
    "evaluate.speculation": "evaluate.groups.speculation",
    "evaluate.cost": "evaluate.groups.cost",
    "evaluate.nll": "evaluate.groups.nll",
}
SHOWN_KEYS = 4


class RetiredKeyError(LimbeckError):
    """A recipe that was written for an earlier limbeck."""


def refuse_retired(tree: Mapping[str, Any]) -> None:
    """Refuse a recipe with a retired key.

    Raises:
        RetiredKeyError: with the current names.
    """
    found = list(_retired(tree, ""))
    if found:
        renamed = [f"{old} is now {new}" for old, new in found[:SHOWN_KEYS]]
        more = f", and {len(found) - SHOWN_KEYS} more" if len(found) > SHOWN_KEYS else ""
        raise RetiredKeyError(f"keys of a recipe have new names: {', '.join(renamed)}{more}; write those instead")


def _retired(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        inside = isinstance(value, Mapping) and value
        if inside and any(old.startswith(key) for old in RENAMED):
            yield from _retired(value, f"{key}.")
        elif key in RENAMED:
            yield key, RENAMED[key]
        elif (section := key.rpartition(".")[0]) in RENAMED:
            yield key, f"{RENAMED[section]}.{name}"
