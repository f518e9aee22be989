"""Recipes as text: a strict YAML reader, and a writer whose output is read back the same.

1e-4 is a number; on, off, yes and no, 0123, 0x1f and 2026-01-31 are words; a key twice is an error. Tags, anchors and
aliases are refused: a recipe is read from top to bottom.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.nodes import Node

from limbeck.types import LimbeckError, short_repr

_TAG = "tag:yaml.org,2002:"
_NUMBER = r"[0-9][0-9_]*"
_EXPONENT = r"[eE][-+]?[0-9]+"
# The words that are not text, by type: the core schema of YAML 1.2 with underscores between digits.
_WORDS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|false|False", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    "float": (
        rf"[-+]?(?:{_NUMBER}\.[0-9_]*(?:{_EXPONENT})?|\.{_NUMBER}(?:{_EXPONENT})?|{_NUMBER}{_EXPONENT}"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 (the base class's own attribute)

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ComposerError(None, None, "anchors and aliases are not read", event.start_mark)
        if getattr(event, "tag", None) not in (None, "!", f"{_TAG}str"):
            raise ComposerError(None, None, f"the tag {event.tag} is not read", event.start_mark)
        return super().compose_node(parent, index)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
        key = key_node.value
        if key in seen:
            raise ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this reader, or a reader of YAML 1.1, would take for something else."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Between double quotes everything has an escape; the other styles lose some line breaks of Unicode.
    return dumper.represent_scalar(f"{_TAG}str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _text)
for _name, (_pattern, _first) in _WORDS.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), _first)


def parse(text: str, what: str) -> Any:
    """The value of a YAML text: mappings with text keys, lists, text, numbers, true, false and null.

    Args:
        what: names the text in errors.

    Raises:
        LimbeckError: not YAML, with the place.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise LimbeckError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise LimbeckError(f"{what} is not valid YAML: it is nested too deeply; a recipe needs four levels") from None


def dump(tree: dict[str, Any]) -> str:
    """YAML that `parse` reads back to an equal tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def plain_tree(value: Any, path: str = "") -> Any:
    """A tree of mappings, lists and scalars as JSON has them.

    Raises:
        LimbeckError: anything else, with its dotted place.
    """
    if path.count(".") > 16:
        raise LimbeckError(f"{path.split('.')[0]} is nested more than 16 deep; a recipe needs four levels")
    if isinstance(value, Mapping):
        odd = next((key for key in map(str, value) if not key.isprintable()), None)
        if odd is not None:
            raise LimbeckError(
                f"{path or 'the recipe'} has the key {short_repr(odd)}; expected text that can be printed"
            )
        inner = {str(key): plain_tree(v, f"{path}.{key}".removeprefix(".")) for key, v in value.items()}
        if len(inner) != len(value):
            raise LimbeckError(f"{path or 'the recipe'} has two keys of the same spelling; give each once")
        return inner
    if isinstance(value, list | tuple):
        return [plain_tree(v, f"{path}.{i}") for i, v in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise LimbeckError(f"{path}: got {value}; expected a finite number")
    if isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise LimbeckError(f"{path}: got {short_repr(value)}, half a character; expected text that UTF-8 can hold")
    if value is None or isinstance(value, str | int | float):
        return value
    raise LimbeckError(f"{path}: got a {type(value).__name__}; expected text, a number, true, false, a list or keys")
