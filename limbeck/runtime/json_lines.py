"""JSON lines: one JSON value per line; a line ends at a line feed alone."""

from __future__ import annotations

from collections.abc import Iterator


def json_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1.

    JSON leaves U+0085, U+2028 and U+2029 as they are inside a text; `str.splitlines` would cut there.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line
