"""Every reader of a run directory makes a page of whatever stands there, or refuses it in one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from limbeck.compare import write_comparison
from limbeck.report import write_report
from limbeck.report.model_card import write_card
from limbeck.report.read_run import read_run, score
from limbeck.runtime.rundir import RunDirectory
from limbeck.types import LimbeckError
from tests.compare.compare_runs import write_arm_run, write_sweep
from tests.report.hostile import complaints, mutated
from tests.report.synthetic import write_on_policy, write_run

MUTANTS, BATCH = 300, 25


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("good")
    return write_on_policy(write_run(folder / "run", steps=12), steps=12), write_run(folder / "other", steps=12, seed=1)


@pytest.mark.parametrize("first", range(0, MUTANTS, BATCH))
def test_mutants(pair: tuple[Path, Path], tmp_path: Path, first: int) -> None:
    good, other = pair
    for seed in range(first, first + BATCH):
        run_dir, said = mutated(good, tmp_path, seed)
        # A comparison takes many times as long as a report.
        assert complaints(run_dir, None if seed % 5 else other) == [], said


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("scores.json", '{"after": {"forward_kl": {"mean": 1' + "0" * 400 + '}}, "metrics": []}'),
        ("scores.json", '{"before": [1], "after": {"rouge_l": {"mean": NaN}}, "metrics": {"rouge_l": NaN}}'),
        ("stages/train.json", '{"stage": "train", "started": 1e308, "seconds": 5e-324, "peak_memory_mib": 1e308}'),
        (
            "student/student.json",
            '{"parameters": 3, "kept_blocks": [0], "removed_blocks": [[]], "teacher_layers": 1e9}',
        ),
        ("provenance.json", '{"versions": 3, "\\ud800": "\\udfff"}'),
        ("metrics.jsonl", '{"step": 1e100, "loss": 5e-324}\n{"step": 1e100, "loss": -1e308}\n[]\nnull\n'),
        ("samples.jsonl", '{"prompt": ["\\ud800"], "teacher": {}, "after": 3, "rouge_after": 1e400}'),
        ("prompts.jsonl", '{"id": [], "messages": 3}\n{"id": "p0", "messages": 3, "text": []}'),
        ("recipe.resolved.yaml", "a: &a [x]\nb: [*a, *a]\n"),
        ("recipe.resolved.yaml", "[" * 3000),
        ("recipe.resolved.yaml", "- a\n- b\n"),
        ("recipe.resolved.yaml", "teacher: 3\nevaluate: []\ntrain: x\n"),
    ],
)
def test_what_the_outside_check_found(pair: tuple[Path, Path], tmp_path: Path, name: str, text: str) -> None:
    run_dir = write_on_policy(write_run(tmp_path / "run", steps=12), steps=12)
    (run_dir / name).write_text(text, "utf-8")
    assert complaints(run_dir, pair[1]) == []


def test_what_cannot_be_written_is_marked(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=12)
    (run_dir / "samples.jsonl").write_text(json.dumps({"prompt": "a\ud800b\x1b[2J", "after": "x"}) + "\n", "utf-8")
    assert "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}[2J" in write_report(run_dir).read_text("utf-8")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x1c"])
def test_lines_end_at_a_line_feed_alone(tmp_path: Path, separator: str) -> None:
    run_dir = write_on_policy(write_run(tmp_path / "run", steps=12), steps=12)
    for name in ("samples.jsonl", "prompts.jsonl"):
        rows = [json.loads(line) for line in (run_dir / name).read_text("utf-8").split("\n") if line]
        for row in rows:
            if "after" in row:
                row["after"] = f"one{separator}two"
            else:
                row["messages"][0]["content"] = f"three{separator}four"
        (run_dir / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    assert read_run(run_dir).broken == ()
    text = write_report(run_dir).read_text("utf-8")
    shown = separator if separator >= "\x7f" else "\N{REPLACEMENT CHARACTER}"
    assert f"one{shown}two" in text and f"three{shown}four" in text


def test_a_condition_with_a_dot_in_it_is_shown(tmp_path: Path) -> None:
    run_dir = write_arm_run(tmp_path / "run", diversity=(0.5,))
    assert score(read_run(run_dir), "after", "distinct_2@T=0.5") is not None
    assert "Distinct-2 (T=0.5)" in write_report(run_dir).read_text("utf-8")
    assert "Distinct-2 (T=0.5)" in write_card(run_dir).read_text("utf-8")


def test_a_clock_that_was_set_back_has_measured_nothing(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=12)
    path = RunDirectory(run_dir).manifest_path("train")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": -7199.03, "tokens_per_s": 2.87e11}))
    text = write_report(run_dir).read_text("utf-8")
    stages = text.partition('id="stages"')[2].partition("</section>")[0]
    assert "3 min 03 s" in text and "under 0.1 s" not in text and "287" not in stages
    page = write_comparison([run_dir, write_run(tmp_path / "other", steps=12, seed=1)], tmp_path / "c.html", title="x")
    # The rows alone: a note below them names the runs, and pytest numbers their folder.
    cost = page.with_suffix(".md").read_text("utf-8").partition("## Cost")[2]
    rows = [line for line in cost.splitlines() if line.startswith("|")]
    assert rows and not any("-7" in row for row in rows)


def test_lines_of_a_sweep_that_are_none(tmp_path: Path) -> None:
    root = write_sweep(tmp_path / "sweep", objectives=("fkl",), temperatures=(1,), seeds=(0, 1))
    path = root / "arms.jsonl"
    for odd in ('{"arm": "x"' + ', "keys": ' + '{"a":' * 5000, '{"arm": 3}', '"x"', "\x00"):
        path.write_text(odd, "utf-8")
        with pytest.raises(LimbeckError, match="got no object with an arm"):
            write_comparison([root], root / "compare.html", title="x")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(LimbeckError, match="not UTF-8"):
        write_comparison([root], root / "compare.html", title="x")


class TestNeighbours:
    """A comparison writes four files, and none in place of somebody else's."""

    @pytest.mark.parametrize("suffix", [".html", ".md", ".csv", ".svg"])
    def test_notes_of_somebody_else_stay(self, pair: tuple[Path, Path], tmp_path: Path, suffix: str) -> None:
        mine = tmp_path / f"notes{suffix}"
        mine.write_text("# mine\n")
        with pytest.raises(LimbeckError, match=r"was not written by `limbeck compare`.*--out"):
            write_comparison(pair, tmp_path / "notes.html", title="x")
        assert [path.name for path in tmp_path.iterdir()] == [mine.name] and mine.read_text() == "# mine\n"

    def test_its_own_are_written_anew(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        names = {"notes.html", "notes.md", "notes.csv", "notes.svg"}
        for _ in range(2):
            write_comparison(pair, tmp_path / "notes.html", title="x")
            assert {path.name for path in tmp_path.iterdir()} == names

    def test_a_link_is_not_followed(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        (tmp_path / "notes.svg").symlink_to(tmp_path / "nowhere")
        with pytest.raises(LimbeckError, match=r"notes\.svg is there"):
            write_comparison(pair, tmp_path / "notes.html", title="x")

    @pytest.mark.parametrize(("out", "page"), [("n", "n.html"), ("n.v2", "n.v2.html"), ("n.md", "n.html")])
    def test_what_a_name_stands_for(self, pair: tuple[Path, Path], tmp_path: Path, out: str, page: str) -> None:
        assert write_comparison(pair, tmp_path / out, title="x") == tmp_path / page


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t", "\r"])
def test_no_cell_of_the_table_is_a_formula(tmp_path: Path, begin: str) -> None:
    evil = f'{begin}HYPERLINK("http://x")'
    runs = [write_arm_run(tmp_path / f"r{n}", recipe={"prompts.source": s}) for n, s in enumerate((evil, "-1.5", "b"))]
    page = write_comparison(runs, tmp_path / "compare.html", title="x")
    with page.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cells = [cell for row in rows for cell in row.values()]
    assert f"'{evil}" in cells and "-1.5" in cells
    assert not [cell for cell in cells if cell.startswith(tuple("=+-@\t\r")) and cell != "-1.5"]


def test_a_model_card_shows_versions_as_text(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=12)
    evil = "[x](http://x) <script>a</script> | `b` ![y](http://y)"
    (run_dir / "provenance.json").write_text(json.dumps({"versions": {evil: evil}, "code_revision": evil}))
    (run_dir / "recipe.resolved.yaml").write_text(f"name: {json.dumps(evil)}\nteacher: {{model: {json.dumps(evil)}}}\n")
    _, _, body = write_card(run_dir).read_text("utf-8").partition("\n---\n")
    assert "[x](" not in body and "![y](" not in body and "<script>" not in body
    assert "\\[x\\](http://x)" in body
