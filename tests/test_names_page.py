"""docs/names.md: what it gives in place of another tool's settings exists, with every option that it writes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import pytest
import yaml

from limbeck.objectives import OBJECTIVES
from limbeck.objectives.sequence.rules import RULES
from limbeck.recipe.foreign import FOREIGN
from limbeck.recipe.sections import AXES
from limbeck.registry import Registry
from limbeck.rollouts.engines import ENGINES
from limbeck.rollouts.registry import SOURCES
from limbeck.teachers.combinations import COMBINATIONS
from limbeck.teachers.registry import TEACHERS
from limbeck.teachers.sees import SEES
from tests.test_methods_page import ROOT, exists, options_of

PAGE = (ROOT / "docs" / "names.md").read_text("utf-8")
MEMBERS: dict[str, Registry[Any]] = {
    "objective": OBJECTIVES,
    "contrast.student": OBJECTIVES,
    "contrast.rule": RULES,
    "responses.source": SOURCES,
    "responses.engine": ENGINES,
    "teacher.where": TEACHERS,
    "teacher.sees": SEES,
    "combine": COMBINATIONS,
}
# A number of the other tool's, or what depends on the case.
PLACEHOLDER = re.compile(r"\b1 - [A-Z]\b|\b[A-Z]\b|\.\.\.")


def rows() -> list[list[str]]:
    """The cells of every row of the tables, without their heads."""
    below = [line for above, line in pairwise(PAGE.splitlines()) if line.startswith("|") and above.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in below if not line.startswith("|---")]


def given() -> list[str]:
    """What stands in backticks in the second column: a key, or a key and its value."""
    return list(dict.fromkeys(span for cells in rows() for span in re.findall(r"`([^`]+)`", cells[1])))


def members(registry: Registry[Any], said: Mapping[str, Any], extra: tuple[str, ...] = ()) -> Iterator[str]:
    """What is wrong with a member that is written as a mapping."""
    if said["name"] not in registry:
        yield f"no {said['name']}"
        return
    known = {"name", *extra, *options_of(registry[said["name"]])}
    yield from (f"{said['name']} has no option {option}" for option in said if option not in known)
    for part in said.get("parts", ()):
        yield from members(registry, part, ("weight",))


def test_the_tables_are_read() -> None:
    assert len(rows()) > 100 and len(given()) > 80
    assert all(len(cells) == 3 for cells in rows()), [cells for cells in rows() if len(cells) != 3]


@pytest.mark.parametrize("span", given())
def test_what_is_given_exists(span: str) -> None:
    key, _, value = span.partition("=")
    assert exists(key), f"{key} is no key of a recipe"
    if key not in MEMBERS or not value:
        return
    said = yaml.safe_load(PLACEHOLDER.sub("0", value))
    said = said if isinstance(said, dict) else {"name": said}
    assert list(members(MEMBERS[key], said, AXES if key == "objective" else ())) == []


def test_what_a_recipe_answers_is_on_the_page() -> None:
    """With hyphens, where it is a flag."""
    theirs = " ".join(cells[0] for cells in rows())
    assert [name for name in FOREIGN if name not in theirs and name.replace("_", "-") not in theirs] == []


@pytest.mark.parametrize(
    "tool",
    ["TRL", "SDFTTrainer", "SDPOTrainer", "ms-swift", "DistillKit", "axolotl", "Liger", "verl", "KDFlow", "DistiLLM-2"],
)
def test_every_tool_has_its_table(tool: str) -> None:
    assert tool in PAGE
