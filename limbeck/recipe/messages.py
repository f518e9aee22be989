"""Messages about mistakes in a recipe: the key, what it got, what was expected, the nearest known key."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from limbeck.recipe.foreign import said_here
from limbeck.types import short_repr

if TYPE_CHECKING:
    from pydantic import ValidationError


def explain_mistake(error: ValidationError, known: Sequence[str]) -> str:
    """One line for up to four mistakes; the alternatives a value could have been are one mistake."""
    lines: dict[str, str] = {}
    for mistake in error.errors():
        # Pydantic marks alternatives and keys with parts of its own.
        parts = [str(p) for p in mistake["loc"] if not str(p).startswith(("literal[", "constrained-", "[key]"))]
        path = ".".join(parts)
        lines[path] = f"{lines[path]}, or {_lower(mistake['msg'])}" if path in lines else _explain(mistake, path, known)
    return "; ".join(list(lines.values())[:4])


def _explain(mistake: Any, path: str, known: Sequence[str]) -> str:
    if mistake["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key {path!r}{suggestion(path, known)}"
    if mistake["type"] == "registry_member":
        return mistake["msg"]
    if mistake["type"] in ("missing", "missing_argument"):
        return f"{path} is missing; add it to the recipe or give it as {path}=..."
    if mistake["type"] in ("dataclass_type", "dataclass_exact_type"):
        return f"{path} is {short_repr(mistake['input'])}; expected a section with keys"
    if mistake["type"] in ("tuple_type", "list_type"):
        return f"{path}: got {short_repr(mistake['input'])}; expected a list{_as_list(path, mistake['input'])}"
    return f"{path}: got {short_repr(mistake['input'])}; {_lower(mistake['msg'])}"


def _as_list(path: str, value: object) -> str:
    """A single value, written as a list, where a list of such values is expected."""
    if not isinstance(value, str | int | float) or len(str(value)) > 40:
        return ""
    inner = json.dumps(value, ensure_ascii=False)
    bare = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w.-]*", value)
    return f", such as {path}=[{value if bare else inner}]"


def _lower(message: str) -> str:
    return message[0].lower() + message[1:]


def suggestion(key: str, known: Sequence[str]) -> str:
    """'; did you mean X?' where a known key is close, what is set here for a key of another tool, else nothing."""
    if here := said_here(key):
        return f"; what other tools call {key.rpartition('.')[2]} is {here} here"
    # A bare name belongs to the training proper rather than to a stage before it.
    known = [name for name in known if not name.startswith("sft.") or key.startswith("sft")]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        # The right name in the wrong section, or a bare name: compare last parts alone.
        leaves = {name.rpartition(".")[2]: name for name in known}
        close = [leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], leaves, n=1)]
    return f"; did you mean {close[0]!r}?" if close else ""
