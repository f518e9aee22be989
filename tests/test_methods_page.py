"""docs/methods.md: every key and option it names exists, and what it says that a recipe sets is what it sets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from limbeck.objectives import OBJECTIVES
from limbeck.objectives.sequence.rules import RULES
from limbeck.recipe.load import known_keys, load_recipe, member_keys, shipped_recipes
from limbeck.recipe.response_source import source_name
from limbeck.rollouts.options import SOURCE_KEY

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "methods.md").read_text("utf-8")
NAME = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)+")


def sections() -> list[tuple[str, str]]:
    """Each method's heading and text."""
    parts = [part.partition("\n") for part in PAGE.split("\n## ")[1:]]
    return [(heading, text) for heading, _, text in parts]


def recipes_of(text: str) -> list[str]:
    """The recipes that a section opens with."""
    opening = re.match(r"\s*Recipes? ((`[a-z0-9-]+`( and )?)+)", text)
    return re.findall(r"`([a-z0-9-]+)`", opening[1]) if opening else []


def spans(text: str) -> list[str]:
    """What stands in backticks in the rows of the tables, below their heads."""
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    return re.findall(r"`([^`]+)`", "\n".join(rows))


def options_of(member: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(member)}


def exists(name: str) -> bool:
    """A key of a recipe, an option of a response source, an objective or a rule."""
    owner, _, option = name.partition(".")
    if owner in OBJECTIVES or owner in RULES:
        return option in options_of(OBJECTIVES[owner] if owner in OBJECTIVES else RULES[owner])
    if name.startswith(("contrast.rule.", "contrast.student.", "objective.")) and name not in known_keys():
        option = name.rpartition(".")[2]
        return option == "name" or any(option in options_of(m) for m in (*OBJECTIVES.values(), *RULES.values()))
    return name in (*known_keys(), *member_keys())


def value_in(recipe: Any, name: str) -> Any:
    """What a recipe has under a dotted key; options that it leaves out have the value of their dataclass."""
    if name == SOURCE_KEY:
        return source_name(recipe.responses.source)
    found = recipe
    *path, last = name.split(".")
    for part in path:
        found = found[part] if isinstance(found, Mapping) else getattr(found, part)
    if isinstance(found, Mapping):
        if last in found:
            return found[last]
        registry = RULES if path[-1] == "rule" else OBJECTIVES
        return getattr(registry[found["name"]](), last)
    return getattr(found, last) if hasattr(found, last) else found.options[last]


def test_what_the_page_links_exists() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target


def test_every_method_that_is_promised_has_a_table() -> None:
    headings = " ".join(heading for heading, text in sections() if "\n|---|" in text)
    for method in (
        "DistiLLM-2", "DistiLLM ", "MiniLLM", "Speculative KD", "ImitKD", "TAID", "AMiD", "AdaKD", "CSD", "GKD", "DPKD",
    ):  # fmt: skip
        assert method in headings


@pytest.mark.parametrize(("heading", "text"), sections(), ids=lambda value: value.split(" (")[0].split("\n")[0][:20])
def test_what_a_table_names_exists(heading: str, text: str) -> None:
    named = [span.partition("=")[0] for span in spans(text)]
    missing = [name for name in named if NAME.fullmatch(name) and not exists(name)]
    assert not missing, f"{heading}: neither a recipe's key nor an option"


def test_what_a_table_says_of_a_recipe_is_what_it_sets() -> None:
    checked = 0
    for heading, text in sections():
        for name in recipes_of(text):
            assert name in shipped_recipes(), heading
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
        for cells in rows if recipes_of(text) else []:
            for span in re.findall(r"`([^`]+)`", cells[-1]):
                key, equals, value = span.partition("=")
                if not equals:
                    continue
                for name in recipes_of(text):
                    assert value_in(load_recipe(name), key) == yaml.safe_load(value), f"{heading}: {span} in {name}"
                    checked += 1
    assert checked > 40


def test_the_readme_claims_no_more_than_the_tables() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "docs/methods.md" in readme
    for claim in ("whole paper", "Every published", "every published"):
        assert claim not in readme, f"{claim!r}: docs/methods.md says what is absent"
