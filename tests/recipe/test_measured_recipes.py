"""What a shipped recipe's header, docs/recipes.md and the page of measurements say of it agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from limbeck.recipe.files import shipped_recipes

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
NOT_YET = "not measured"
SHIPPED = [name for name in shipped_recipes() if "/" not in name]


def header(name: str) -> str:
    """The comment at the top of a recipe, as one line."""
    text = (ROOT / "limbeck" / "recipe" / "shipped" / f"{name}.yaml").read_text("utf-8")
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    return " ".join(lines)


def cells(page: str, name: str) -> list[str]:
    """The cells of a recipe's row; empty where a page has none."""
    rows = [line for line in (DOCS / page).read_text("utf-8").splitlines() if line.startswith(f"| `{name}` |")]
    return [cell.strip() for cell in rows[0].strip("|").split("|")] if rows else []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_measured_recipe_is_so_everywhere(name: str) -> None:
    said, takes, row = header(name), cells("recipes.md", name)[-1], cells("results/recipes.md", name)
    if not row:
        return
    forward, reverse, top = (float(row[n].split()[0]) for n in (1, 2, 4))
    assert f"-> {forward:.2f}, reverse {reverse:.2f}, top-1 {top:.3f}" in said
    assert NOT_YET not in said and NOT_YET not in takes
    (minutes,) = re.findall(r"About (\d+) min", said)
    assert minutes in re.findall(r"\d+", takes)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_that_loses_to_kd_says_so_first(name: str) -> None:
    """Of those that begin with the same student and prompts: behind it in all of its measures."""
    row, kd = cells("results/recipes.md", name), cells("results/recipes.md", "kd")
    if not row or "forward KL 2.29 ->" not in header(name):
        return
    ours, its = ([float(each[n].split()[0]) for n in (1, 2, 3, 4, 5)] for each in (row, kd))
    behind = all(our > it for our, it in zip(ours[:3], its[:3], strict=True)) and all(
        our < it for our, it in zip(ours[3:], its[3:], strict=True)
    )
    first, _, rest = header(name).partition("Settings:")
    assert behind == ("worse than kd here" in first)
    assert not behind or "The right choice all the same where" in rest


@pytest.mark.parametrize("name", SHIPPED)
def test_an_unmeasured_recipe_is_so_everywhere(name: str) -> None:
    assert (NOT_YET in cells("recipes.md", name)[-1]) == bool(re.search(r"Expected: not measured", header(name)))
