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
from limbeck.evaluation.groups.speculation import in_turns_of_category, spelled
from limbeck.evaluation.scores.bootstrap import summarise
from limbeck.evaluation.scores.files import read_rows
from limbeck.evaluation.speculation import (
    Drafted,
    PassCosts,
    acceptance_rows,
    break_even,
    expected_speedup,
    expected_tokens_per_pass,
    position_rows,
)
from limbeck.types import LimbeckError, Prompt
from tests.limbeck_command import CommandServer
from tests.pipeline.test_bad_input import refused
from tests.tiny_pair import TinyPair, questions, write_model, write_prompts

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


def two() -> list[Drafted]:
    common = {"alone_s": 4.0, "alone_tokens": 8, "drafted_s": 1.0, "tokens": 8}
    return [
        Drafted(id="a", passes=2, accepted=6, rejected=1, by_position=((2, 2), (2, 2), (1, 2), (1, 1)), **common),
        Drafted(id="b", passes=6, accepted=1, rejected=5, by_position=((1, 6), (0, 1)), **common),
    ]


def test_acceptance_by_position_counts_what_was_looked_at() -> None:
    rows = position_rows(two())
    assert list(rows) == [1, 2, 3, 4]
    assert [row.id for row in rows[3]] == ["a"], "no draft of b came so far"
    shares = {place: summarise(some)["draft_acceptance"].mean for place, some in rows.items()}
    assert shares == pytest.approx({1: 3 / 8, 2: 2 / 3, 3: 1 / 2, 4: 1})


@given(SHARES, DRAFTS, COSTS)
def test_passes_that_cost_a_step_are_the_papers(share: float, drafts: int, cost: float) -> None:
    costs = PassCosts(draft_s=2 * cost, pass_s=dict.fromkeys(range(1, 10), 2.0))
    assert costs.ratio == pytest.approx(cost)
    assert costs.speedup(share, drafts) == pytest.approx(expected_speedup(share, drafts, cost))
    assert costs.break_even(drafts) == pytest.approx(break_even(drafts, cost))


def test_the_best_number_of_drafts_is_where_the_next_one_costs_more_than_it_brings() -> None:
    # Reading five tokens takes twice as long as reading one, and up to four nothing more.
    costs = PassCosts(draft_s=0.1, pass_s={1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 2.0})
    assert costs.best(0.8) == 3 and costs.speedup(0.8, 3) == pytest.approx((1 + 0.8 + 0.64 + 0.512) / 1.3)
    assert costs.best(0.05) == 0, "a draft that never stands is not worth its tenth of a step"
    assert costs.break_even(4) == pytest.approx(0.6222, abs=1e-4)
    assert costs.speedup(costs.break_even(4) or 0, 4) == pytest.approx(1)
    dear = PassCosts(draft_s=1.0, pass_s={1: 1.0, 2: 1.5})
    assert dear.best(1.0) == 0 and dear.break_even(1) is None


def test_the_expected_speedup_of_all_prompts_comes_from_their_common_acceptance() -> None:
    costs = PassCosts(draft_s=0.2, pass_s={1: 1.0, 3: 1.1})
    score = summarise(acceptance_rows(two(), draft_tokens=2, costs=costs))["expected_speedup"]
    assert score.mean == pytest.approx(costs.speedup(7 / 13, 2))
    assert score.low is not None and score.high is not None and score.low < score.mean < score.high


def test_prompts_are_taken_of_all_categories_in_turns() -> None:
    prompts = [Prompt(id=str(n), text="x", category=c) for n, c in enumerate(["a"] * 6 + ["b"] * 2 + [None])]
    assert [p.id for p in in_turns_of_category(prompts, 5)] == ["0", "1", "6", "7", "8"]
    assert in_turns_of_category(prompts, 99) == prompts
    plain = [Prompt(id=str(n), text="x") for n in range(4)]
    assert in_turns_of_category(plain, 3) == plain[:3]
    assert (spelled("Code / Math!"), spelled("../.."), spelled("数学")) == ("code-math", "other", "数学")


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


def test_acceptance_by_position_domain_and_temperature(tiny: TinyPair, tmp_path: Path) -> None:
    rows = [{"prompt": text, "category": ("Code/math", "reading")[n % 2]} for n, text in enumerate(questions())]
    tree = tiny.tree(
        tmp_path / "run",
        prompts={"source": str(write_prompts(tmp_path / "prompts.jsonl", rows))},
        objective={"name": "lk", "temperature": 1.0},
        evaluate={"groups": {"speculation": {"prompts": 4, "temperatures": [0]}}, "max_new_tokens": 12},
    )
    run = limbeck.run(tree)
    after = run.scores["after"]
    acceptance = {n.partition("@")[2]: s for n, s in after.items() if n.startswith("draft_acceptance@")}
    assert set(acceptance) == {
        "draft=4", *(f"draft=4,position={place}" for place in range(1, 5)), "draft=4,category=code-math",
        "draft=4,category=reading", "draft=4,T=0",
    }  # fmt: skip
    folder = run.directory / "scores"

    def sums(condition: str) -> list[tuple[float, ...]]:
        found = read_rows(folder / f"after.speculation@{condition}.jsonl")
        return [row.sums["draft_acceptance"] for row in found]

    whole = [sum(part) for part in zip(*sums("draft=4"), strict=True)]
    for parts in ([f"position={place}" for place in range(1, 5)], ["category=code-math", "category=reading"]):
        every = [row for part in parts for row in sums(f"draft=4,{part}")]
        assert [sum(part) for part in zip(*every, strict=True)] == whole, "parts add up to the whole"
    assert 0 < acceptance["draft=4"]["mean"] < 1
    detail = json.loads((folder / "after.speculation.json").read_text("utf-8"))["detail"]
    by_number = detail["draft=4"]["by_measured_passes"]
    assert list(by_number["speedup"]) == [str(drafts) for drafts in range(1, 9)]
    assert after["best_draft_tokens"]["mean"] == by_number["best_draft_tokens"]
    assert after["draft_cost"]["mean"] == pytest.approx(detail["cost_ratio"])
    assert after["expected_speedup@draft=4"]["mean"] == pytest.approx(by_number["speedup"]["4"])
    page = (run.directory / "report.html").read_text("utf-8")
    section = page.partition('<section id="drafting">')[2].partition("</section>")[0]
    for said in ("Draft 4", "code-math", "4 drafts per pass, temperature 0", "By number of drafts", "A draft costs"):
        assert said in section
    assert "position=1" not in page.partition('<section id="evidence">')[2].partition("</section>")[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"draft_tokens": [0]}, "draft_tokens"),
        ({"draft_tokens": []}, "draft_tokens is empty"),
        ({"temperatures": [0.5, 1.0]}, "expected ones that differ"),
    ],
)
def test_what_cannot_be_drafted_is_refused_before_anything_is_written(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    recipe = tiny.recipe(tmp_path / "run", evaluate={"groups": {"speculation": options}})
    refused(limbeck.run("run", recipe), said)
    assert not (tmp_path / "run" / "responses").exists()


def test_a_student_of_another_vocabulary_drafts_nothing(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    strange = write_model(tmp_path / "strange", extra=["zebra quartz " * 50, "jumbo vizier " * 50])
    recipe = tiny.recipe(
        tmp_path / "run",
        student={"init": "pretrained", "model": str(strange), "layers": None},
        evaluate={"groups": {"speculation": {}}},
    )
    refused(limbeck.run("run", recipe), "tokens")
    alone = ("--teacher", str(tiny.teacher), "--prompts", str(tiny.prompts), "--groups", "speculation")
    refused(limbeck.run("evaluate", str(strange), *alone, f"output_dir={tmp_path / 'out'}"), "speculation", "tokens")
