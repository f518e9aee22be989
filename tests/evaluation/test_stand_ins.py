"""Models that llama.cpp quantised, measured in the student's place by every group that measures it before training."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from limbeck.evaluation.scores.files import read_rows
from limbeck.evaluation.scores.metrics import describe_metric, split_stand_in
from limbeck.pipeline import evaluation_context
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.pipeline.stages.evaluate import examine
from limbeck.recipe.load import load_recipe
from limbeck.runtime.artifact_cache import ArtifactCache
from limbeck.runtime.console import QuietConsole
from tests.evaluation import few_problems
from tests.limbeck_command import CommandServer, KillAt, all_end
from tests.tiny_pair import TinyPair, questions, write_prompts

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp comes with xllamacpp: extra dev"
)
ROWS = [{"prompt": text, "completion": f"It is {text[8:20]}."} for text in questions(40)]
# Of each group the tables that it measures of the student before training, too.
TABLES = ("fidelity", "fidelity@student", "rouge", "nll", "likelihood", "diversity@T=0.7", "perplexity", "tasks@gsm8k")
OF_EVALUATION = ("scores", "scores.json", "samples.jsonl", "stages/evaluate.json", "stages/report.json")


def groups(folder: Path) -> dict[str, Any]:
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": row["prompt"]}) + "\n" for row in ROWS[:6]), "utf-8")
    return {
        "fidelity": {"whose": ["responses", "student"]},
        "rouge": {"against": ["teacher", "references"], "seeds": [1, 2]},
        "nll": {},
        "likelihood": {},
        "diversity": {"samples": 2, "temperatures": [0.7]},
        "perplexity": {"source": str(text), "max_length": 32},
        "tasks": {"files": {"gsm8k": str(few_problems.write(folder, "gsm8k"))}, "teacher": True, "max_new_tokens": 4},
        "recovery": {"baselines": ["llama_cpp", "imatrix"], "calibration": 8},
    }


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, limbeck: CommandServer) -> tuple[Path, Path]:
    """A recipe, and its run directory."""
    folder = tmp_path_factory.mktemp("baselines")
    pair = TinyPair.write(folder)
    write_prompts(pair.prompts, ROWS)
    recipe = pair.recipe(
        folder / "run",
        student={"init": "teacher", "layers": None, "quantize": {"format": "q4_0"}},
        objective={"temperature": 1.0},
        evaluate={"groups": groups(folder), "max_new_tokens": 6, "batch_size": 4},
    )
    finished = limbeck.run("run", recipe)
    assert finished.code == 0, finished.stderr[-3000:]
    return recipe, folder / "run"


def numbers(path: Path) -> list[float]:
    """All values of a table, row by row."""
    rows = read_rows(path)
    return [
        number for row in rows for part in ((row.weight, *row.values.values()), *row.sums.values()) for number in part
    ]


def content(run: Path) -> dict[str, bytes]:
    """All files of the scores."""
    paths = [run / "scores.json", run / "samples.jsonl", *(p for p in (run / "scores").rglob("*") if p.is_file())]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def without_evaluation(run: Path, copy: Path) -> Path:
    """A copy of a run that ended before its evaluation."""
    shutil.copytree(run, copy)
    for name in OF_EVALUATION:
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return copy


def test_every_group_measures_them(played: tuple[Path, Path]) -> None:
    run = played[1]
    scores = json.loads((run / "scores.json").read_text("utf-8"))
    assert list(scores["stand_ins"]) == ["llama_cpp", "imatrix"]
    named, before = scores["rows"]["after"], scores["rows"]["before"]
    of_student = {name for name in named if not split_stand_in(name)[1]}
    assert of_student == {*TABLES, "recovery", "recovery@file"}
    for stand_in in ("llama_cpp", "imatrix"):
        measured = {split_stand_in(name)[0]: name for name in named if split_stand_in(name)[1] == stand_in}
        assert set(measured) == {*TABLES, "recovery"}
        alike = {
            table: numbers(run / named[measured[table]]) == pytest.approx(numbers(run / before[table]), rel=1e-5)
            for table in TABLES
        }
        # Without an importance matrix llama.cpp rounds q4_0 to nearest, as the student begins.
        assert all(alike.values()) if stand_in == "llama_cpp" else not alike["nll"] and not alike["fidelity"], alike
    assert {"rouge_l@imatrix", "accuracy@gsm8k,imatrix", "perplexity@llama_cpp"} <= set(scores["after"])


def test_how_it_is_said(played: tuple[Path, Path], limbeck: CommandServer, tmp_path: Path) -> None:
    run = played[1]
    of_task = describe_metric("accuracy@gsm8k,imatrix")
    assert of_task.label == "Accuracy (gsm8k, quantised by llama.cpp with an importance matrix)"
    assert of_task.teacher == "teacher_accuracy@gsm8k,imatrix"
    own = describe_metric("teacher_perplexity@llama_cpp")
    assert own.label == "Teacher: Perplexity (beside the student quantised by llama.cpp)"
    page = (run / "report.html").read_text("utf-8")
    evidence, beside = (
        page.split(f'<section id="{name}">')[1].split("</section>")[0] for name in ("evidence", "untrained")
    )
    assert "llama.cpp" not in evidence and "llama.cpp" not in (run / "student/README.md").read_text("utf-8")
    # All lines but the size of the file.
    assert beside.count("<tr>") == evidence.count("<tr>") - 1
    assert beside.index("ROUGE-L") < beside.index("Share recovered")
    heads = [part.split("</th>")[0].rpartition(">")[2] for part in beside.split('<th scope="col"')[1:]]
    by = "Quantised by llama.cpp"
    assert heads == ["Metric", "Teacher", by, f"{by} with an importance matrix", "Before", "After"]
    shutil.copytree(run, tmp_path / "other")
    compared = limbeck.run("compare", run, tmp_path / "other", "--out", tmp_path / "compared.html")
    assert compared.code == 0, compared.stderr
    assert "Accuracy (gsm8k, quantised by llama.cpp)" in (tmp_path / "compared.html").read_text("utf-8")


def test_killed_while_they_are_measured(played: tuple[Path, Path], limbeck: CommandServer, tmp_path: Path) -> None:
    recipe, whole = played
    run, kept = without_evaluation(whole, tmp_path / "run"), dict[str, int]()
    moments = (
        ("scores/answers/llama_cpp-*/00001.jsonl", 0),
        ("scores/answers/llama_cpp-*.jsonl", 1),
        ("scores/after.rouge@llama_cpp.json", 0),
        ("scores/after.recovery@llama_cpp.jsonl", 0),
        ("scores/answers/imatrix-*.jsonl", 0),
        ("scores/after.tasks@gsm8k,imatrix.jsonl", 0),
        ("scores.json", 0),
    )
    for name, before in moments:
        killed = limbeck.run("run", recipe, f"output_dir={run}", killed=KillAt(run, name, before))
        assert killed.code == -signal.SIGKILL, (name, killed)
        found = {str(path): path.stat().st_ino for path in (run / "scores/answers").rglob("*.jsonl")}
        # No answers that were whole are written again.
        assert {path: found.get(path, number) for path, number in kept.items()} == kept
        kept = found
    finished = limbeck.run("run", recipe, f"output_dir={run}")
    assert finished.code == 0, finished.stderr
    assert content(run) == content(whole)


def test_two_ranks_write_the_scores_of_one(played: tuple[Path, Path], limbeck: CommandServer, tmp_path: Path) -> None:
    recipe, one = played
    two = without_evaluation(one, tmp_path / "two")
    ranks = limbeck.launch("run", recipe, f"output_dir={two}", "train.per_device_train_batch_size=2")
    all_end(ranks)
    assert content(two) == content(one)


def test_runs_of_a_sweep_share_their_answers(tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two seeds that start from the same student the second takes all but its own answers from the first."""
    written, write = list[str](), evaluation_context.write_in_batches

    def noted(sampler: Any, asked: Any, sampling: Any, folder: Path, **options: Any) -> Any:
        written.append(folder.name.partition("-")[0])
        return write(sampler, asked, sampling, folder, **options)

    monkeypatch.setattr(evaluation_context, "write_in_batches", noted)
    for seed in (0, 1):
        tree = tiny.tree(
            tmp_path / f"run-{seed}",
            student={"init": "teacher", "layers": None, "quantize": {"format": "q4_0"}},
            train={"max_steps": 4, "seed": seed},
            evaluate={"groups": {"rouge": {}, "recovery": {"baselines": ["llama_cpp"]}}, "max_new_tokens": 4},
        )
        recipe = load_recipe(tree)
        run_pipeline(recipe, stages=STAGES, until="train", console=QuietConsole())
        context = RunContext(recipe, QuietConsole())
        context.artifacts = ArtifactCache(tmp_path / "shared")
        written.clear()
        found = examine(context, ("before", "after"))["after"]
        assert written == (["after"] if seed else ["teacher", "before", "after", "llama_cpp"])
        assert {"rouge@llama_cpp", "recovery@llama_cpp"} <= set(found)
