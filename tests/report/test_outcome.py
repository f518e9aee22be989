"""What the report says first of a student that got worse, and the pictures of the search for the learning rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from limbeck.evaluation.scores.files import write_scores
from limbeck.report import write_report
from limbeck.report.outcome import harm
from limbeck.report.rate_search import search_charts
from limbeck.report.read_run import read_run
from limbeck.types import ScoredRow
from tests.report.synthetic import write_run


def _scored(run_dir: Path, change: dict[str, float], *, noise: float = 0.0) -> Path:
    """A finished run whose scores after training differ from those before by so much."""
    write_run(run_dir)
    start = {"forward_kl": 1.5, "reverse_kl": 1.4, "top1_agreement": 0.5}

    def rows(of: dict[str, float], sign: int) -> list[ScoredRow]:
        return [
            ScoredRow(
                id=str(i),
                values={name: value + sign * noise * (-1) ** i for name, value in of.items()},
                weight=10.0,
            )
            for i in range(24)
        ]

    after = {name: value + change.get(name, 0.0) for name, value in start.items()}
    write_scores(run_dir, before={"fidelity": rows(start, 1)}, after={"fidelity": rows(after, -1)}, seed=0)
    return run_dir


def test_a_student_that_got_worse_is_said_first_with_the_remedy(tmp_path: Path):
    run_dir = _scored(tmp_path, {"forward_kl": 2.6, "reverse_kl": 1.0, "top1_agreement": -0.26})
    sentence = harm(read_run(run_dir))
    assert sentence is not None and "\n" not in sentence
    assert "Forward KL 1.50 → 4.10 nats/token" in sentence and "Top-1 agreement 0.500 → 0.240" in sentence
    assert "train.learning_rate=auto (it is 0.0003)" in sentence
    page = write_report(run_dir).read_text("utf-8")
    assert page.index("ends worse than it began") < page.index('class="headline"')


@pytest.mark.parametrize(
    ("change", "noise"),
    [
        ({"forward_kl": -0.5}, 0.0),
        # Within noise.
        ({"forward_kl": 0.01}, 2.0),
        # A student that seeks modes.
        ({"forward_kl": 0.5, "reverse_kl": -0.5}, 0.0),
        ({}, 0.0),
    ],
)
def test_a_student_that_did_not_is_not(tmp_path: Path, change: dict[str, float], noise: float):
    run_dir = _scored(tmp_path, change, noise=noise)
    assert harm(read_run(run_dir)) is None
    assert "ends worse" not in write_report(run_dir).read_text("utf-8")


def test_the_remedy_knows_what_was_tried(tmp_path: Path):
    run_dir = _scored(tmp_path, {"forward_kl": 1.0})
    recipe = run_dir / "recipe.resolved.yaml"
    recipe.write_text(recipe.read_text("utf-8").replace("learning_rate: 0.0003", "learning_rate: auto"), "utf-8")
    assert "train.eval_steps=50" in (harm(read_run(run_dir)) or "")


def test_each_search_is_a_picture(tmp_path: Path):
    run_dir = write_run(tmp_path)
    (run_dir / "learning_rate").mkdir()
    found = {
        "metric": "loss",
        "before": 2.0,
        "length_factor": 0.7,
        "chosen": 1.9e-4,
        "trials": [
            {"learning_rate": 3e-4, "loss": 1.5},
            {"learning_rate": 9.5e-4, "loss": None},
            {"learning_rate": 9.5e-5, "loss": 1.6},
        ],
    }
    for name in ("sft", "train"):
        (run_dir / "learning_rate" / f"{name}.json").write_text(json.dumps(found), "utf-8")
    charts = search_charts(read_run(run_dir))
    assert [chart.title for chart in charts] == ["Trials of sft", "Trials of train"]
    assert [mark.label for mark in charts[0].x_marks] == ["9.5e-05", "3.0e-04", "9.5e-04"]
    assert charts[0].last == "0.00019 chosen"
    page = write_report(run_dir).read_text("utf-8")
    assert "Search for the learning rate" in page and "0.00019 chosen" in page


@pytest.mark.parametrize("odd", [[], {}, {"before": 1.0, "chosen": 0, "trials": []}, {"before": "x", "trials": 3}])
def test_an_odd_file_of_a_search_is_no_picture(tmp_path: Path, odd: object):
    run_dir = write_run(tmp_path)
    (run_dir / "learning_rate").mkdir()
    (run_dir / "learning_rate" / "train.json").write_text(json.dumps(odd), "utf-8")
    assert search_charts(read_run(run_dir)) == []
    write_report(run_dir)
