"""The YAML files of recipes and sweeps: those of the package, and those of users."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from limbeck.recipe.messages import suggestion
from limbeck.recipe.yaml_text import parse
from limbeck.types import LimbeckError

# What a YAML file of the package, or of a user, describes: one run, or many runs around one recipe.
DocumentKind = Literal["recipe", "sweep"]
_OF_A_SWEEP = re.compile(r"^recipe:", re.MULTILINE)


def shipped_recipes() -> tuple[str, ...]:
    """Names of the recipes in the package; those in folders with their folder, such as lab/teacher."""
    return tuple(sorted(name for name, text in _shipped().items() if not _OF_A_SWEEP.search(text)))


def shipped_sweeps() -> tuple[str, ...]:
    """Names of the sweeps in the package: files with the key `recipe`."""
    return tuple(sorted(name for name, text in _shipped().items() if _OF_A_SWEEP.search(text)))


@cache
def _shipped() -> dict[str, str]:
    """The texts of the package's YAML files by name."""

    def walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, str]]:
        for entry in folder.iterdir():
            if entry.is_dir():
                yield from walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml"):
                yield prefix + entry.name.removesuffix(".yaml"), entry.read_text("utf-8")

    return dict(walk(resources.files("limbeck.recipe") / "shipped", ""))


def recipe_text(source: str) -> str:
    """The text of a recipe that can be read, of the package or of a user's file."""
    return _shipped()[source] if source in shipped_recipes() else Path(source).read_text("utf-8")


def read_yaml(source: str | Path, kind: DocumentKind) -> dict[str, Any]:
    """The mapping in a shipped or a user's file; its `name` is the file's where it has none.

    Raises:
        LimbeckError: there is no such file, or it holds something else.
    """
    names = shipped_recipes() if kind == "recipe" else shipped_sweeps()
    path = Path(source)
    if str(source) in names:
        # runs/lab-teacher, not a folder in a folder.
        name, text = str(source).replace("/", "-"), _shipped()[str(source)]
    elif path.is_file():
        name = path.stem
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            raise LimbeckError(f"{path} is not UTF-8 text; a {kind} is a YAML file") from None
    elif str(source) in _shipped():
        raise _other_kind(str(source), kind)
    else:
        near = suggestion(str(source), names)
        listed = ", ".join(names) or "there are none"
        raise LimbeckError(f"no {kind} {str(source)!r}: neither a file nor a shipped {kind} ({listed}){near}")
    tree = parse(text, f"{kind} {source}")
    if not isinstance(tree, dict):
        got = "nothing" if tree is None else type(tree).__name__
        expected = "sections such as 'teacher:' and 'student:'" if kind == "recipe" else "'recipe:' and 'grid:'"
        raise LimbeckError(f"{kind} {source} holds {got}; expected {expected}")
    if ("recipe" in tree) != (kind == "sweep") and ("teacher" in tree) != (kind == "recipe"):
        raise _other_kind(str(source), kind)
    return {"name": name, **tree}


def _other_kind(source: str, kind: DocumentKind) -> LimbeckError:
    if kind == "recipe":
        return LimbeckError(f"{source} is a sweep, not a recipe; run it with: limbeck sweep {source}")
    return LimbeckError(f"{source} is a recipe, not a sweep; run it with: limbeck run {source}")
