"""What a judge can tell: right answers beside answers to another prompt, by the log-probabilities of its letter.

    python -m benchmarks.judge BASE_URL dolly/dev.jsonl             # 24 pairs, 48 questions
    python -m benchmarks.judge BASE_URL dolly/dev.jsonl --pairs 100 --model NAME

The rows have `instruction`, `input` and `output`. Those without an input and with an answer of 20 to 300 characters are
shuffled; the answer of each is judged beside that of the next, which answers something else. A judge that cannot order
these is of no use for closer ones.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.head_to_head import judge_at
from limbeck.evaluation.judge.asking import Judge
from limbeck.evaluation.judge.questions import AnswerPair, questions_of
from limbeck.evaluation.judge.verdicts import JudgedPair

LEAST, MOST = 20, 300


def pairs_of(path: Path, count: int) -> list[AnswerPair]:
    """Prompts with their own answer (the student's place) and that of another prompt."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    rows = [row for row in rows if not row["input"] and LEAST < len(row["output"]) < MOST]
    random.Random(0).shuffle(rows)
    if len(rows) <= count:
        raise SystemExit(f"{path} has {len(rows)} such rows; expected more than {count}")
    return [
        AnswerPair(id=str(n), request=row["instruction"], student=row["output"], other=rows[n + 1]["output"])
        for n, row in enumerate(rows[:count])
    ]


def judged(judge: Judge, pairs: Sequence[AnswerPair]) -> Iterator[JudgedPair]:
    for pair, orders in zip(pairs, questions_of(pairs, judge.model, "logprobs"), strict=True):
        first, second = (next(iter(judge.ask([question]))) for question in orders)
        yield JudgedPair(
            id=pair.id, first=first.opinion, second=second.opinion, lengths=(len(pair.student), len(pair.other))
        )


def row(name: str, found: Sequence[JudgedPair], seconds: float) -> str:
    """A row of the table on the page."""
    read = [pair for pair in found if pair.value is not None]
    if not read:
        return f"| {name} | {len(found)} | {len(found)} | | | | | {seconds:.1f} |"
    values = [pair.value for pair in read if pair.value is not None]
    right = sum(value > 0.5 for value in values)
    # Of as many right ones or more by tossing a coin.
    chance = sum(math.comb(len(values), k) for k in range(right, len(values) + 1)) / 2 ** len(values)
    orders = [pair.for_student for pair in read if pair.for_student is not None]
    agree = sum(one == other for one, other in orders)
    places = [lean for pair in read for one in (pair.first, pair.second) if (lean := one.leaning) is not None]
    return (
        f"| {name} | {len(found)} | {len(found) - len(read)} | {right} (p {chance:.3f}) | "
        f"{statistics.mean(values):.3f} (sd {statistics.pstdev(values):.3f}) | {agree} | "
        f"{statistics.mean(places):.2f} | {seconds:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url", help="of an OpenAI-compatible server, such as http://localhost:8000/v1")
    parser.add_argument("data", type=Path, help="JSONL with instruction, input and output")
    parser.add_argument("--model", help="the judge's name there; without it the only one")
    parser.add_argument("--pairs", type=int, default=24)
    arguments = parser.parse_args()
    judge, pairs = judge_at(arguments.base_url, arguments.model), pairs_of(arguments.data, arguments.pairs)
    judge.require_logprobs()
    began = time.monotonic()
    found = list(judged(judge, pairs))
    print(
        "| judge | pairs | unread | right by the mean | mean, deviation | orders agree | first place | s a question |"
    )
    print("|---|---:|---:|---|---|---:|---:|---:|")
    print(row(judge.model, found, (time.monotonic() - began) / (2 * len(pairs))))


if __name__ == "__main__":
    main()
