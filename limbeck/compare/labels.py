"""Names of arms, made of the keys that differ between them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def differing(flats: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all, in the order in which they are met."""
    keys = dict.fromkeys(key for flat in flats for key in flat)
    return [key for key in keys if len({_text(flat, key) for flat in flats}) > 1]


def _text(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key], sort_keys=True, default=str) if key in flat else ""


def arm_label(keys: Mapping[str, Any], varied: Sequence[str]) -> str:
    """An arm in words: the objective's name alone, other keys as name=value, as short as stays clear."""
    leaves = Counter(_leaf(key) for key in varied)
    parts = []
    for key in sorted(varied, key=lambda key: key != "objective.name"):
        leaf = _leaf(key)
        short = leaf if leaves[leaf] == 1 else key
        if key in keys:
            parts.append(plain_value(keys[key]) if key == "objective.name" else f"{short}={plain_value(keys[key])}")
    return ", ".join(parts)


def _leaf(key: str) -> str:
    """The last word of a key, but of responses.source.name `source`."""
    return key.removesuffix(".name").rpartition(".")[2]


def plain_value(value: Any) -> str:
    """A recipe's value as one writes it: 2.0 as 2."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float) and math.isfinite(value):
        return short_number if float(short_number := f"{value:g}") == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def value_of(keys: Mapping[str, Any], key: str) -> str:
    """The value of a key, or a dash."""
    return plain_value(keys[key]) if key in keys else "\N{EN DASH}"


def titled(name: str) -> str:
    """The name that a sweep gives a directory, as one reads it: "name=fkl,temperature=2" as "fkl, temperature=2"."""
    return re.sub(r"(?:(?<=, )|^)(?:objective\.)?name=", "", re.sub(r",(?=[\w.]+=)", ", ", name))


def extra(name: str, keys: Mapping[str, Any], varied: Sequence[str]) -> str:
    """Keys that differ between arms and are not in the arm's name."""
    values = {key: plain_value(keys[key]) for key in varied if key in keys}
    named = re.split(r"[, =]+", name)
    return ", ".join(f"{key}={value}" for key, value in values.items() if value not in named)


def short_value(text: str, most: int = 30) -> str:
    """A label cut to where charts have room for it."""
    return text if len(text) <= most else f"{text[: most - 1].rstrip(' ,')}…"
