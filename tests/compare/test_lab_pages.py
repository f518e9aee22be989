"""The pages of the laboratory: the same bytes for the same runs, unfinished sweeps marked, and no section lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import lab_pages
from limbeck.recipe.files import shipped_sweeps
from tests.compare.compare_runs import write_sweep

BENCH = lab_pages.Bench(
    title="A bench of the tests",
    lead=("forward_kl", "forward KL"),
    beside={"rouge_l": "ROUGE-L", "not_measured": "nothing"},
    measured="An arm's forward KL is that of its runs",
)


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command, with sweeps and page in a folder of the test."""
    monkeypatch.setitem(lab_pages.BENCHES, "task", BENCH)
    page = tmp_path / "page" / "lab-task.md"
    page.parent.mkdir()

    def built() -> str:
        monkeypatch.setattr(sys, "argv", ["lab_pages", "task", "--sweeps", str(tmp_path), "--page", str(page)])
        lab_pages.main()
        return page.read_text("utf-8")

    return built


def test_a_page_is_the_same_for_the_same_runs(build, tmp_path: Path) -> None:
    write_sweep(tmp_path / "lab-task-temperature", seeds=(0, 1, 2, 3))
    first = build()
    picture = (tmp_path / "page" / "lab-task-temperature.svg").read_bytes()
    assert build() == first and (tmp_path / "page" / "lab-task-temperature.svg").read_bytes() == picture
    lines = first.splitlines()
    assert "# A bench of the tests" in lines and f"## {lab_pages.QUESTIONS['temperature'].asks}" in lines
    (head,) = [line for line in lines if line.startswith("| arm |")]
    assert head == "| arm | forward KL | group | ROUGE-L | learning rate | training, s |"
    rows = [line.split(" | ") for line in lines[lines.index(head) + 2 :] if line.startswith("| ")]
    assert len(rows) == 9 and rows[0][0] == "| fkl, temperature=2"
    means = [float(row[1].split()[0]) for row in rows]
    assert means == sorted(means)
    # Four seeds, of which a failed run lacks one.
    assert " to each side with 3 seeds (" in first.replace("\n", " ") and " with 4 seeds (" not in first
    assert "What would change it: " in first


def test_half_of_the_runs_make_a_page_that_says_so_and_names_what_failed(build, tmp_path: Path) -> None:
    write_sweep(tmp_path / "lab-task-direction", objectives=("fkl", "rkl"), temperatures=(1,))
    said = build().replace("\n", " ")
    assert "**Unfinished: " in said and "Failed: rkl" in said
    assert " to each side with 2 seeds (" in said


def test_a_question_without_its_sweep_keeps_its_section(build, tmp_path: Path) -> None:
    write_sweep(tmp_path / "lab-task-direction", objectives=("fkl", "rkl"), temperatures=(1,))
    before = build()
    (tmp_path / "lab-task-direction").rename(tmp_path / "elsewhere")
    write_sweep(tmp_path / "lab-task-temperature", objectives=("fkl", "rkl"), temperatures=(1,))
    after = build()
    section = before[before.index("## ") :].rstrip()
    assert section in after
    order = [lab_pages.QUESTIONS[name].asks for name in ("temperature", "direction")]
    assert after.index(f"## {order[0]}") < after.index(f"## {order[1]}")


def test_no_sweep_at_all_names_the_command(build) -> None:
    with pytest.raises(SystemExit, match="limbeck sweep lab/task-temperature"):
        build()


def test_every_sweep_of_a_bench_is_a_question() -> None:
    """A sweep that is shipped and not asked on the page would never be shown."""
    names = [name.removeprefix("lab/") for name in shipped_sweeps() if name.startswith(("lab/task-", "lab/smol-"))]
    assert {name.partition("-")[2] for name in names} == set(lab_pages.QUESTIONS)
