"""`limbeck evaluate STUDENT --teacher T --prompts FILE`: any pair on any prompts, without a run."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from limbeck import evaluate
from limbeck.rollouts.io import read_responses
from tests.limbeck_command import CommandServer, KillAt
from tests.tiny_pair import questions, write_model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Student and teacher with one tokenizer."""
    folder = tmp_path_factory.mktemp("pair")
    return write_model(folder / "student", layers=2, seed=3), write_model(folder / "teacher", layers=3, seed=1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"instruction": q, "input": "", "output": f"It is {i}."} for i, q in enumerate(questions(6))]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


SIDES = {"teacher": "teacher", "after": "student"}


def options(out: Path, *more: str) -> tuple[str, ...]:
    return (f"output_dir={out}", "evaluate.max_new_tokens=8", *more)


def test_a_pair_on_a_file(limbeck: CommandServer, pair: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    student, teacher = pair
    command = ("evaluate", student, "--teacher", teacher, "--prompts", data, *options(tmp_path / "out"))
    finished = limbeck.run(*command)
    assert finished.code == 0, finished.stderr
    scores = json.loads((tmp_path / "out/scores.json").read_text("utf-8"))
    assert scores["before"] == {} and scores["change"] == {}
    assert scores["after"]["forward_kl"]["mean"] > 0 and 0 <= scores["after"]["rouge_l"]["mean"] < 1
    assert all(score["n"] == 6 for score in scores["after"].values())
    lines = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 6 and set(lines[0]) == {"prompt_id", "prompt", "teacher", "after", "rouge_after", "responses"}
    answers = [read_responses(path) for path in (tmp_path / "out/scores/answers").glob("*.jsonl")]
    known = {r.id: {"id": r.id, "author": r.author, "round": r.round} for responses in answers for r in responses}
    assert all(line["responses"][side] == known[line["responses"][side]["id"]] for line in lines for side in SIDES)
    assert all(line["responses"][side]["author"] == author for line in lines for side, author in SIDES.items())
    page = (tmp_path / "out/report.html").read_text("utf-8")
    assert all(f'data-response="{line["responses"]["after"]["id"]}"' in page for line in lines)
    assert "What was measured" in page and "not complete" not in page and "before training" not in page
    again = limbeck.run(*command)
    assert again.code == 0 and "evaluate: done earlier" in again.stderr


def test_the_teacher_is_as_far_from_itself_as_nothing(pair: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    found = evaluate(pair[1], *options(tmp_path / "out"), prompts=data, teacher=pair[1]).scores["after"]
    assert found["forward_kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert found["top1_agreement"]["mean"] == 1 and found["rouge_l"]["mean"] == 1


def test_without_a_teacher(limbeck: CommandServer, pair: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    finished = limbeck.run("evaluate", pair[0], "--prompts", data, *options(tmp_path / "out"))
    assert finished.code == 0, finished.stderr
    after = json.loads((tmp_path / "out/scores.json").read_text("utf-8"))["after"]
    assert "rouge_l_references" in after
    refused = limbeck.run("evaluate", pair[0], "--prompts", data, "--groups", "fidelity", *options(tmp_path / "other"))
    assert refused.code == 2 and "needs a teacher" in refused.error_line and not (tmp_path / "other").exists()


def test_another_tokenizer(limbeck: CommandServer, pair: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    """What compares texts works, what compares tokens is refused with the reason."""
    stranger = write_model(tmp_path / "stranger", layers=2, seed=5, extra=["zebra quokka xylophone zebra quokka"] * 9)
    words = ("evaluate", stranger, "--teacher", pair[1], "--prompts", data)
    refused = limbeck.run(*words, *options(tmp_path / "refused"))
    assert refused.code == 2 and "different tokens" in refused.error_line and "rouge" in refused.error_line
    finished = limbeck.run(*words, "--groups", "rouge,diversity", *options(tmp_path / "out"))
    assert finished.code == 0, finished.stderr
    after = json.loads((tmp_path / "out/scores.json").read_text("utf-8"))["after"]
    assert "rouge_l" in after and any(name.startswith("distinct_2@") for name in after)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--groups", "rogue"), "no group 'rogue'"),
        (("--groups", "forward_kl"), "forward_kl is a metric"),
        (("evaluate.groups=[fidelty]",), "did you mean 'fidelity'?"),
        (("evaluate.groups.fidelity.whose=[students]",), "evaluate.groups.fidelity.whose.0"),
        (("evaluate.groups.fidelity.who=[student]",), "did you mean 'evaluate.groups.fidelity.whose'?"),
        (("prompts.source=nowhere.jsonl",), "nowhere.jsonl"),
    ],
)
def test_mistakes(
    limbeck: CommandServer, pair: tuple[Path, Path], data: Path, tmp_path: Path, change: tuple[str, ...], said: str
) -> None:
    student, teacher = pair
    refused = limbeck.run(
        "evaluate", student, "--teacher", teacher, "--prompts", data, *options(tmp_path / "out"), *change
    )
    assert refused.code == 2 and said in refused.error_line


def test_files_with_nothing_in_them_and_torn_ones(
    limbeck: CommandServer, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    for name, text, said in (
        ("empty", "", "empty"),
        ("torn", '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl', "line 2"),
        ("bare", '{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n', "line 2"),
    ):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(text, "utf-8")
        refused = limbeck.run("evaluate", pair[0], "--prompts", path, *options(tmp_path / name))
        assert refused.code == 2 and said in refused.error_line, refused.stderr


def test_a_teacher_without_prompts(limbeck: CommandServer, pair: tuple[Path, Path]) -> None:
    refused = limbeck.run("evaluate", pair[0], "--teacher", pair[1])
    assert refused.code == 2 and "--prompts" in refused.error_line


def test_killed_while_answering(limbeck: CommandServer, pair: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    student, teacher = pair
    whole, out = tmp_path / "whole", tmp_path / "out"
    command = ("evaluate", student, "--teacher", teacher, "--prompts", data, "--groups", "rouge")
    assert limbeck.run(*command, *options(whole, "evaluate.batch_size=2")).code == 0
    for name in ("scores/answers/teacher-*.jsonl", "scores/answers/after-*/00001.jsonl", "scores/after.rouge.json"):
        killed = limbeck.run(*command, *options(out, "evaluate.batch_size=2"), killed=KillAt(out, name))
        assert killed.code == -signal.SIGKILL, name
    assert limbeck.run(*command, *options(out, "evaluate.batch_size=2")).code == 0
    for name in ("scores.json", "samples.jsonl", "scores/after.rouge.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
