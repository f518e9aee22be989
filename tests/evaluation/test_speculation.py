"""Speculative decoding: theory against enumeration, and the group on a student that is its teacher."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import limbeck
from limbeck.evaluation.scores.bootstrap import summarise
from limbeck.evaluation.scores.files import read_rows
from limbeck.evaluation.speculation import (
    Drafted,
    acceptance_rows,
    break_even,
    expected_speedup,
    expected_tokens_per_pass,
)
from limbeck.types import LimbeckError
from tests.tiny_pair import TinyPair

SHARES = st.floats(0, 1)
DRAFTS = st.integers(1, 8)
COSTS = st.floats(0, 2)


@given(SHARES, st.integers(1, 6))
def test_tokens_a_pass_are_the_mean_over_every_outcome(share: float, drafts: int) -> None:
    expected = 0.0
    for stands in itertools.product((True, False), repeat=drafts):
        chance = math.prod(share if one else 1 - share for one in stands)
        kept = sum(itertools.takewhile(bool, stands))
        expected += chance * (kept + 1)
    assert expected_tokens_per_pass(share, drafts) == pytest.approx(expected)


@given(st.floats(0, 0.999), DRAFTS, COSTS)
def test_the_formulas_of_the_paper(share: float, drafts: int, cost: float) -> None:
    tokens = (1 - share ** (drafts + 1)) / (1 - share)
    assert expected_tokens_per_pass(share, drafts) == pytest.approx(tokens)
    assert expected_speedup(share, drafts, cost) == pytest.approx(tokens / (drafts * cost + 1))


@given(DRAFTS, COSTS)
def test_break_even_divides_gain_from_loss(drafts: int, cost: float) -> None:
    share = break_even(drafts, cost)
    if share is None:
        assert cost > 1 and expected_speedup(1.0, drafts, cost) < 1
        return
    assert cost <= 1 or cost == pytest.approx(1)
    assert expected_speedup(share, drafts, cost) >= 1 - 1e-12
    assert share < 1e-12 or expected_speedup(share * (1 - 1e-6), drafts, cost) < 1


def test_limits() -> None:
    assert break_even(4, 0.0) == pytest.approx(0)
    assert break_even(4, 1.0) == pytest.approx(1)
    assert break_even(1, 0.3) == pytest.approx(0.3), "one draft pays where it stands more often than it costs"
    assert break_even(4, 1.5) is None
    for share, drafts in ((1.2, 4), (-0.1, 4), (math.nan, 4), (0.5, 0)):
        with pytest.raises(LimbeckError, match=r"evaluate\.groups\.speculation\.draft_tokens"):
            expected_tokens_per_pass(share, drafts)


def test_scores_are_ratios_of_sums_over_the_prompts() -> None:
    """An answer twice as long counts twice; a mean of the prompts' own ratios would be another number."""
    prompts = [
        Drafted(id="a", passes=2, tokens=8, accepted=6, rejected=1, alone_s=4.0, alone_tokens=8, drafted_s=1.0),
        Drafted(id="b", passes=6, tokens=6, accepted=0, rejected=6, alone_s=1.0, alone_tokens=2, drafted_s=3.0),
    ]
    scores = summarise(acceptance_rows(prompts))
    assert scores["draft_acceptance"].mean == pytest.approx(6 / 13)
    assert scores["tokens_per_pass"].mean == pytest.approx(14 / 8)
    assert scores["speculative_speedup"].mean == pytest.approx((5 / 10) / (4 / 14))
    assert all(score.n == 2 and score.low is not None for score in scores.values())


def play(tiny: TinyPair, out: Path, **speculation: Any) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """A run whose student is its teacher: a step with next to no learning rate leaves it so."""
    tree = tiny.tree(
        out,
        student={"init": "pretrained", "model": str(tiny.teacher), "layers": None},
        train={"max_steps": 1, "learning_rate": 1e-30},
        evaluate={"groups": {"fidelity": {}, "speculation": speculation}, "max_new_tokens": 12},
    )
    run = limbeck.run(tree)
    detail = json.loads((run.directory / "scores/after.speculation.json").read_text("utf-8"))["detail"]
    return run.scores["after"], detail, run.directory


def test_a_student_that_is_the_teacher_is_never_corrected(tiny: TinyPair, tmp_path: Path) -> None:
    after, detail, root = play(tiny, tmp_path / "run", draft_tokens=[2, 3, 2], prompts=3)
    assert after["draft_acceptance@draft=2"]["mean"] == after["draft_acceptance@draft=3"]["mean"] == 1
    assert 2 < after["tokens_per_pass@draft=2"]["mean"] <= 3 < after["tokens_per_pass@draft=3"]["mean"] <= 4
    assert after["speculative_speedup@draft=2"]["mean"] > 0
    assert {key for key in detail if "draft=" in key} == {"draft=2", "draft=3"}
    expected = detail["draft=3"]["expected_from_acceptance"]
    assert expected["measured"]["tokens_per_pass"] == 4
    assert expected["fidelity"]["acceptance"] == pytest.approx(after["acceptance"]["mean"])
    assert expected["fidelity"]["acceptance"] == pytest.approx(1, abs=1e-5)
    assert expected["measured"]["speedup"] == pytest.approx(4 / (3 * detail["cost_ratio"] + 1))
    found = read_rows(root / "scores/after.speculation@draft=2.jsonl")
    held = [json.loads(line) for line in (root / "prompts.jsonl").read_text("utf-8").splitlines()]
    assert [row.id for row in found] == [p["id"] for p in held if p["split"] == "heldout"][:3]
    assert not (root / "scores/before.speculation.json").exists()


def test_greedy_drafts(tiny: TinyPair, tmp_path: Path) -> None:
    after, detail, _ = play(tiny, tmp_path / "run", temperature=0.0, prompts=2)
    assert after["draft_acceptance@draft=4"]["mean"] == 1
    assert "fidelity" not in detail["draft=4"]["expected_from_acceptance"], "1 - TV holds at temperature 1"
