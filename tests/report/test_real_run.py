"""The report of a run that was really played: what training writes is what the page reads."""

from __future__ import annotations

from pathlib import Path

import pytest

import limbeck
from limbeck.report import write_report
from limbeck.report.on_policy import exchanges
from limbeck.report.read_run import FILES, WRITTEN, read_run
from limbeck.runtime.rundir import RunDirectory
from tests.report.hostile import complaints, mutated
from tests.report.test_report import parse, words
from tests.tiny_pair import TinyPair


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    sections = {"responses": {"source": {"name": "mixed", "share": 0.5}}, "train": {"eval_steps": 4}}
    return limbeck.run(TinyPair.write(folder).tree(folder / "run", **sections)).directory


def test_the_responses_it_was_trained_on_are_shown(played: Path) -> None:
    run = read_run(played)
    assert {row["author"] for row in run.written} == {"student", "teacher"}
    shown = {author for exchange in exchanges(run) for _, said in exchange.moments for author in said}
    assert shown == {"student", "teacher"}
    page = parse(write_report(played).read_text("utf-8"))
    assert "Responses it was trained on" in words(page) and "#responses" in page.links


def test_what_the_report_reads_is_where_a_run_has_it(played: Path) -> None:
    assert played / WRITTEN == RunDirectory(played).examples
    assert [name for name in (*FILES, WRITTEN) if not (played / name).is_file()] == []
    assert read_run(played).missing == {} and read_run(played).broken == ()


def test_mutants_of_it(played: Path, tmp_path: Path) -> None:
    for seed in range(100):
        run_dir, said = mutated(played, tmp_path, seed)
        assert complaints(run_dir, None if seed % 20 else played) == [], said
