"""The section on drafting: what it says of good scores, and that odd ones break no page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from limbeck.report import write_report
from limbeck.report.drafting import drafting
from limbeck.report.read_run import read_run
from tests.report.hostile import ODD
from tests.report.synthetic import write_run


def with_drafts(root: Path, scores: dict[str, Any], detail: Any) -> Path:
    run_dir = write_run(root / "run", steps=3)
    document = json.loads((run_dir / "scores.json").read_text("utf-8"))
    document["after"] |= scores
    (run_dir / "scores.json").write_text(json.dumps(document), "utf-8")
    (run_dir / "scores" / "after.speculation.json").write_text(json.dumps({"detail": detail}), "utf-8")
    return run_dir


def test_it_says_what_was_measured(tmp_path: Path) -> None:
    def score(mean: float) -> dict[str, Any]:
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 12}

    scores = {
        "draft_acceptance@draft=4,category=code": score(0.7),
        "draft_acceptance@draft=4": score(0.6),
        "draft_acceptance@draft=4,T=0.5": score(0.65),
        "draft_acceptance@draft=4,position=2": score(0.5),
        "speculative_speedup@draft=4": score(1.3),
        "draft_cost": score(0.4),
        "best_draft_tokens": score(2),
        "break_even_acceptance": score(0.45),
    }
    detail = {"draft=4": {"by_measured_passes": {"speedup": {"1": 1.1}, "break_even_acceptance": {"1": None}}}}
    run_dir = with_drafts(tmp_path, scores, detail)
    found = drafting(read_run(run_dir))
    assert found is not None
    assert [[line.label for line in lines] for lines in found.tables.values()] == [
        ["4 drafts per pass", "4 drafts per pass, temperature 0.5"], ["code"], ["Draft 2"],
    ]  # fmt: skip
    assert found.tables[""][0].measured == "1.30" and found.tables[""][0].interval == "0.500 to 0.700"
    assert "costs 0.400 of a step" in found.lead and "the best number of drafts per pass is 2" in found.lead
    assert found.by_number == (("1", "1.10", "none"),)
    assert 'id="drafting"' in write_report(run_dir).read_text("utf-8")


def test_a_run_without_drafts_has_no_section(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=3)
    assert drafting(read_run(run_dir)) is None
    assert 'id="drafting"' not in write_report(run_dir).read_text("utf-8")


@pytest.mark.parametrize("place", ["score", "detail", "table", "speedup"])
def test_odd_values_break_no_page(tmp_path: Path, place: str) -> None:
    good = {"draft_acceptance@draft=4": {"mean": 0.5, "n": 3}}
    run_dir = with_drafts(tmp_path, good, {})
    before = (run_dir / "scores.json").read_text("utf-8")
    for odd in ODD:
        detail: Any = {"detail": odd, "table": {"draft=4": odd}, "score": {}}.get(
            place, {"draft=4": {"by_measured_passes": {"speedup": odd, "break_even_acceptance": odd}}}
        )
        (run_dir / "scores" / "after.speculation.json").write_text(json.dumps({"detail": detail}), "utf-8")
        if place == "score":
            document = json.loads(before)
            document["after"] |= {"draft_acceptance@draft=4": odd, "draft_cost": odd, "best_draft_tokens": odd}
            (run_dir / "scores.json").write_text(json.dumps(document), "utf-8")
        write_report(run_dir)
