"""The template engine of all pages: reports, comparisons, model cards."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from limbeck.report import format

if TYPE_CHECKING:
    import jinja2


@cache
def environment(*, escaped: bool) -> jinja2.Environment:
    """An engine that compiles each template of `limbeck/report/templates` once a process.

    Args:
        escaped: all text is escaped as HTML; Markdown escapes cells and code itself.
    """
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("limbeck.report"),
        autoescape=escaped,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters.update(
        duration=format.duration,
        memory=format.memory,
        count=format.count,
        figure=format.figure,
        megabytes=format.megabytes,
        cell=format.markdown,
        code=format.code,
    )
    return made
