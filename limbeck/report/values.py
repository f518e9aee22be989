"""Cleaning of values from a run's files, so that any content can be shown on a page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

# Beyond these, sums and quotients of two numbers would leave what a float can hold.
LARGEST, SMALLEST = 1e100, 1e-100
# Nothing that a run writes comes near.
DEEPEST = 16
# Halves of a character, which no file can hold, and control characters, which no SVG may hold.
_UNSHOWN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def parsed(text: str) -> Any:
    """A JSON value, cleaned.

    Raises:
        ValueError: it is none, in one line.
    """
    try:
        return cleaned(json.loads(text))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def cleaned(value: Any, depth: int = 0) -> Any:
    """The value with numbers that can be reckoned with, text that can be written, and no more levels than a run needs.

    A number that is not finite, or too large, becomes None, as does what is nested too deeply; a tiny one becomes 0.
    """
    # Most of a run's values are numbers: they are asked for first.
    if isinstance(value, int):
        return None if abs(value) > LARGEST else value
    if isinstance(value, float):
        within = math.isfinite(value) and abs(value) <= LARGEST
        return (value if abs(value) >= SMALLEST else 0.0) if within else None
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, Mapping | list | tuple) and depth == DEEPEST:
        return None
    if isinstance(value, Mapping):
        return {shown(str(key)): cleaned(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(inner, depth + 1) for inner in value]
    return value


def shown(text: str) -> str:
    """The text with a mark in place of what cannot be written."""
    return _UNSHOWN.sub("\N{REPLACEMENT CHARACTER}", text)


def of_mappings(value: Any) -> dict[str, dict[str, Any]]:
    """Only those entries of a mapping that are mappings themselves; empty where it is none."""
    return {name: inner for name, inner in value.items() if isinstance(inner, dict)} if isinstance(value, dict) else {}
