"""The starts of the preference benchmark beside each other by a judge, from runs that were made up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from benchmarks.head_to_head import JUDGEMENTS, answers_of, judge_at, judge_section, judged_arms
from benchmarks.preference import ROWS, TUNED, page
from limbeck.compare.runs import Comparison, gather
from limbeck.evaluation.scores.files import write_rows
from limbeck.models.loading import load_tokenizer
from limbeck.prompts.io import write_prompts
from limbeck.rollouts.io import write_responses
from limbeck.runtime.console import QuietConsole
from limbeck.types import LimbeckError, Prompt, Response, Sampling, ScoredRow
from tests.compare.compare_runs import write_arm_run
from tests.evaluation.judge_server import JUDGE, JudgeState, judging, lengths
from tests.tiny_pair import questions, write_model

SEEDS, PROMPTS = (0, 1), 5


def said(arm: int, seed: int, prompt: int) -> str:
    """An answer; the first two arms say the same to the first prompt."""
    return "Yes." if prompt == 0 and arm < 2 else "It is so. " * (1 + (2 * arm + seed + prompt) % 4) + "abc"[arm]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    rows = []
    for arm, name in enumerate(TUNED):
        for seed in SEEDS:
            folder = write_arm_run(tmp_path / "arms" / name / f"seed={seed}", seed=seed, name=name)
            write_model(folder / "student", layers=1)
            prompts = [
                Prompt(id=f"p{n}", text=text, split="heldout" if n < PROMPTS else "train")
                for n, text in enumerate(questions(PROMPTS + 2))
            ]
            write_prompts(folder / "prompts.jsonl", prompts)
            tokenizer: Any = load_tokenizer(str(folder / "student"))
            for file, temperature in (("after-0a.jsonl", 1.0), ("after-1b.jsonl", 0.0)):
                answers = [
                    Response(
                        prompt_id=prompt.id,
                        author="student",
                        prompt_ids=(1,),
                        response_ids=tuple(tokenizer(said(arm, seed, n) if not temperature else "No.")["input_ids"]),
                        stop="eos",
                        sampling=Sampling(max_new_tokens=64, temperature=temperature),
                        round=-1,
                    )
                    for n, prompt in enumerate(prompts[:PROMPTS])
                ]
                write_responses(folder / "scores" / "answers" / file, answers)
            likely = [
                ScoredRow(id=f"p{n}", weight=1.0, values={"answer_logp": -float(n + arm)}) for n in range(PROMPTS)
            ]
            write_rows(folder / "scores" / ROWS, likely)
            rows.append({"arm": name, "seed": seed, "state": "done", "directory": f"arms/{name}/seed={seed}"})
    (tmp_path / "arms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def comparison(sweep: Path) -> Comparison:
    return gather([sweep], None, sweep)


@pytest.fixture
def served() -> Iterator[tuple[str, JudgeState]]:
    with judging() as running:
        yield running


def value(own: str, other: str) -> float:
    """What the judge of lengths makes of a pair, as the definition says it."""
    if own == other:
        return 0.5
    one, two = ((p["A"] + p[" A"]) / (p["A"] + p[" A"] + p["B"]) for p in (lengths(own, other), lengths(other, own)))
    return (one + 1 - two) / 2


def test_win_rates_are_those_of_the_definition(
    sweep: Path, comparison: Comparison, served: tuple[str, JudgeState]
) -> None:
    url, state = served
    sides = judged_arms(comparison, TUNED, judge_at(url, None), sweep / JUDGEMENTS, QuietConsole())
    expected = list(combinations(range(3), 2))
    assert [(side.first, side.second) for side in sides] == [
        (TUNED[first], TUNED[second]) for second, first in expected
    ]
    for side, (second, first) in zip(sides, expected, strict=True):
        for seed in SEEDS:
            found = {f"p{n}": value(said(first, seed, n), said(second, seed, n)) for n in range(PROMPTS)}
            assert side.won[seed] == pytest.approx(found)
    asked = len(state.judged)
    assert asked == len(set(state.judged)) and not any("No." in text for text in state.judged)
    # All is on disk now, without what a kill cut off.
    with (sweep / JUDGEMENTS).open("a") as file:
        file.write('{"key": "cut o')
    again = judged_arms(comparison, TUNED, judge_at(url, JUDGE), sweep / JUDGEMENTS, QuietConsole())
    assert len(state.judged) == asked and [side.won for side in again] == [side.won for side in sides]
    text = "\n".join(judge_section(sides, JUDGE))
    assert "## Beside each other, by a judge" in text and f"`{JUDGE}`" in text
    rates = [sum(won.values()) / PROMPTS for won in sides[0].won.values()]  # type: ignore[arg-type]
    assert f"| {TUNED[1]} over {TUNED[0]} | {', '.join(f'{rate:.3f}' for rate in rates)} | " in text
    whole = page(comparison, "python -m benchmarks.preference", judge_section(sides, JUDGE))
    assert whole.index("## Beside each other\n") < whole.index(text) < whole.index("## Preference tuning itself")
    assert "by a judge" not in page(comparison, "python -m benchmarks.preference")
    # Of five prompts one was answered alike, in both seeds.
    assert f" | {len(SEEDS) * PROMPTS} | 0.200 | 0.000 | " in text


def test_what_is_unread_leaves_its_prompt_out(
    sweep: Path, comparison: Comparison, served: tuple[str, JudgeState]
) -> None:
    url, state = served
    state.letters = lambda a, b: {"The": 0.9} if a.endswith("c") and len(a) > 30 else lengths(a, b)
    sides = judged_arms(comparison, TUNED, judge_at(url, JUDGE), sweep / JUDGEMENTS, QuietConsole())
    unread = [sum(one is None for won in side.won.values() for one in won.values()) for side in sides]
    assert unread[0] == 0 < unread[1] == unread[2]
    row = judge_section(sides, JUDGE)[-2]
    assert f" | {unread[1] / (len(SEEDS) * PROMPTS):.3f} | " in row and "nan" not in row
    state.letters = lambda a, b: {"The": 0.9}
    silent = judged_arms(comparison, TUNED, judge_at(url, JUDGE), sweep / "silent.jsonl", QuietConsole())
    assert judge_section(silent, JUDGE)[-1].endswith("| 1.000 |  |")


def test_a_run_without_answers_is_named(sweep: Path) -> None:
    folder = sweep / "arms" / TUNED[0] / "seed=0"
    (folder / "scores" / "answers" / "after-1b.jsonl").unlink()
    with pytest.raises(LimbeckError, match=r"seed=0 holds no greedy answers in scores/answers .*; delete .* and run"):
        answers_of(folder)
