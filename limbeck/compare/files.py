"""The four files of a comparison, side by side; files that no comparison wrote are never replaced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from limbeck.types import LimbeckError

# What each begins to be known by; any one will do. The second of a kind is what earlier versions wrote.
KNOWN_BY: Mapping[str, tuple[str, ...]] = {
    ".html": ('<meta name="generator" content="limbeck compare">', 'href="#ranking">Ranking</a>'),
    ".md": ("<!-- written by limbeck compare -->", "Arms that share a letter are not separated."),
    ".csv": ("arm,seed,run,tuning,",),
    ".svg": ("<!-- written by limbeck compare -->", 'viewBox="0 0 640 514"', 'viewBox="0 0 1280 514"'),
}


def page_of(out: Path) -> Path:
    """The page that `out` names: as it is, or with .html in place of another of the four, or behind the whole name."""
    return out.with_suffix(".html") if out.suffix in KNOWN_BY else out.with_name(f"{out.name}.html")


def require_free(page: Path) -> None:
    """The page and its neighbours are not there, or were written by a comparison.

    Raises:
        LimbeckError: one of them was written by something else.
    """
    for suffix, marks in KNOWN_BY.items():
        path = page.with_suffix(suffix)
        if path.is_symlink() or path.exists():
            text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
            if not any(mark in text for mark in marks):
                raise LimbeckError(
                    f"{path} is there and was not written by `limbeck compare`, which would write "
                    f"{page.name} with .md, .csv and .svg beside it; name another page with --out, or move the file"
                )
