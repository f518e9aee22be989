"""The table of docs/objectives.md, made from the registry: one row an objective, then a section with its docstring.

python -m benchmarks.gallery --table    writes it between the markers of the page
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from limbeck.objectives import OBJECTIVES
from limbeck.objectives.base import HiddenObjective, Objective

PAGE = Path(__file__).resolve().parents[1] / "docs" / "objectives.md"
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
FACTORS = {0: "1", 1: "tau", 2: "tau^2"}
SUPPORTS = {"full": "full", "topk_renorm": "renorm", "topk_tail": "tail", "sampled": "sampled"}
LINE = 120


def page() -> str:
    """The whole page, what stands between the markers made anew."""
    return between_markers(PAGE.read_text("utf-8"), generated())


def between_markers(text: str, made: str) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, "a page with a generated part has both markers"
    return f"{before}{BEGIN}\n\n{made}\n{END}{after}"


def generated() -> str:
    rows = ["| name | class | neutral factor | supports | options |", "|---|---|---|---|---|"]
    rows += [row(name, kind()) for name, kind in OBJECTIVES.items()]
    return "\n".join([*rows, "", *(section(name, kind()) for name, kind in OBJECTIVES.items())])


def row(name: str, objective: Any) -> str:
    options = ", ".join(f"`{field.name}`" for field in dataclasses.fields(objective)) or "none"
    cells = (f"[`{name}`](#{name})", type(objective).__name__, factor(objective), supports(objective), options)
    return f"| {' | '.join(cells)} |"


def factor(objective: Any) -> str:
    """What scale "auto" multiplies the loss by."""
    if "teacher" not in objective.reads:
        return "none"
    return "its parts'" if objective.order is None else FACTORS[objective.order]


def supports(objective: Any) -> str:
    if "hidden" in objective.reads:
        return "hidden states"
    return ", ".join(short for support, short in SUPPORTS.items() if support in objective.supports)


def section(name: str, objective: Any) -> str:
    """Heading, the docstring's prose, each option with its default, and the caution of the defaults."""
    prose, _, attributes = inspect.cleandoc(type(objective).__doc__ or "").partition("\nAttributes:\n")
    words = option_words(attributes)
    paragraphs = [wrapped(part) for part in prose.strip().split("\n\n")]
    options = [option(objective, field, words) for field in dataclasses.fields(objective)]
    told = [f"Warns at a temperature other than 1: {objective.caution}."] if cautious(objective) else []
    return "\n\n".join([f"### {name}", *paragraphs, *filter(None, ["\n".join(options)]), *map(wrapped, told)]) + "\n"


def cautious(objective: Any) -> bool:
    return "hidden" not in objective.reads and bool(objective.caution)


def wrapped(text: str) -> str:
    """One paragraph, its papers linked; "Limits:" starts a paragraph of its own."""
    linked = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", " ".join(text.split()))
    parts = linked.replace(" Limits: ", "\nLimits: ").split("\n")
    return "\n\n".join(textwrap.fill(part, LINE, break_long_words=False, break_on_hyphens=False) for part in parts)


def option_words(attributes: str) -> dict[str, str]:
    """What a docstring says about each option; options described together share the words."""
    words: dict[str, str] = {}
    for names, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n     +.*)*)", attributes, re.MULTILINE):
        words |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return words


def option(objective: Any, field: dataclasses.Field[Any], words: dict[str, str]) -> str:
    hint = get_type_hints(type(objective))[field.name]
    value = getattr(objective, field.name)
    choices = f"; one of {', '.join(f'`{c}`' for c in get_args(hint))}" if get_origin(hint) is Literal else ""
    line = f"- `{field.name}` = `{shown(value)}`{choices}: {words.get(field.name, '')}"
    return textwrap.fill(line.rstrip(": "), LINE, subsequent_indent="  ", break_on_hyphens=False)


def shown(value: Any) -> str:
    """A default as a recipe writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(f"{{name: {part.name}, weight: {weight:g}}}" for weight, part in value) + "]"
    return value.name if isinstance(value, (Objective, HiddenObjective)) else str(value)
