"""No damage to a file of a run directory ends in a traceback, a wall, or silently in another student."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.limbeck_command import CommandServer
from tests.recovery.mutants import Bases, play

SEED, MUTANTS, PARTS = 20261128, 120, 6


@pytest.fixture(scope="module")
def bases(limbeck: CommandServer, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """A finished run, one before its training and one within it."""
    return Bases.make(limbeck, tmp_path_factory.mktemp("mutants"))


@pytest.mark.parametrize("part", range(PARTS))
def test_mutants(limbeck: CommandServer, bases: Bases, part: int) -> None:
    mutants = [play(limbeck, bases, number, SEED) for number in range(part, MUTANTS, PARTS)]
    assert [mutant for mutant in mutants if mutant.wrong] == []
    # The harness damages something: some are refused, and all of a run is reached.
    assert len({mutant.mutation for mutant in mutants}) > 4
    assert Counter("|" in mutant.end for mutant in mutants)[False] > 0


def test_a_difference_would_be_seen(limbeck: CommandServer, bases: Bases, tmp_path: Path) -> None:
    other = Bases(bases.recipe, bases.place, bases.runs, bases.expected | {"scores.json": b"{}"})
    ends = [play(limbeck, other, number, SEED) for number in range(2)]
    assert all(mutant.wrong == "silently different: scores.json" for mutant in ends)
