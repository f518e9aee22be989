"""Runs in a sweep's directory that the sweep no longer names, as after a change of its grid or seeds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

SHOWN = 4


def left_out(sweep: Path, listed: Iterable[str]) -> str | None:
    """What is said of the runs that lie beside those of a sweep; None where there are none.

    Runs that only tuned an arm do not count.

    Args:
        listed: directories of the sweep's own runs, relative to the sweep's.
    """
    begun = [path.parent for path in sorted(sweep.glob("arms/*/seed=*/recipe.resolved.yaml"))]
    own = {sweep / directory for directory in listed}
    others = [path.relative_to(sweep).as_posix() for path in begun if path not in own]
    if not others:
        return None
    runs = "1 run in arms/ is" if len(others) == 1 else f"{len(others)} runs in arms/ are"
    shown = ", ".join(others[:SHOWN]) + (f" and {len(others) - SHOWN} more" if len(others) > SHOWN else "")
    return f"{runs} not part of this sweep: {shown}; to compare them too, name their arms and seeds in it"
