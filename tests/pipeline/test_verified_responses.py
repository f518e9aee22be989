"""Prompts that are problems, answers of the teacher that are checked, and the held-out problems in the evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from limbeck.evaluation.context import text_behind
from limbeck.evaluation.sandbox import jail
from limbeck.evaluation.tasks import marking
from limbeck.evaluation.tasks.math_answers import extract
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.problems import read_prompt_problems
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.io import read_responses
from limbeck.runtime.files import read_json
from limbeck.runtime.rundir import RunDirectory
from limbeck.types import Json, LimbeckError
from tests.evaluation.few_problems import write
from tests.limbeck_command import CommandServer, KillAt
from tests.tiny_pair import TinyPair, questions, write_model

ATTEMPTS = 3


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that writes a digit now and then."""
    return write_model(tmp_path_factory.mktemp("pair") / "teacher", window=512, extra=["0 1 2 3 4 5 6 7 8 9 " * 40])


def rows(answers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    return [{"question": text, "answer": f"So.\n#### {(answers or {}).get(text, '-7')}"} for text in questions(32)]


def tree_of(teacher: Path, problems: Path, output: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    tree = TinyPair(teacher=teacher, prompts=problems).tree(output, **sections)
    tree["prompts"]["task"] = "gsm8k"
    tree["responses"] |= {"max_new_tokens": 24, "temperature": 1.0, "seed": 5}
    tree["train"]["max_steps"] = 2
    tree["evaluate"] = {"groups": ["fidelity"], "max_new_tokens": 8, "samples": 0}
    return tree


def said_by(teacher: Path, folder: Path, seed: int) -> dict[str, str]:
    """The answer that the teacher gives to each problem with a seed, by its question."""
    problems = write(folder, "gsm8k", rows())
    tree = tree_of(teacher, problems, folder / f"seed-{seed}")
    tree["responses"]["seed"] = seed
    run = run_pipeline(load_recipe(tree), stages=STAGES, until="respond")
    tokenizer, asked = AutoTokenizer.from_pretrained(teacher), read_prompt_problems(run.problems)
    responses = read_responses(run.responses / "teacher.jsonl")
    return {asked[r.prompt_id].request.partition("\n")[0]: extract(text_behind(r, tokenizer)).answer for r in responses}


@pytest.fixture(scope="module")
def problems(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems of which the teacher solves some at the first attempt, some at the second, and some never."""
    folder = tmp_path_factory.mktemp("problems")
    first, second = said_by(teacher, folder, 5), said_by(teacher, folder, 6)
    wanted: dict[str, str] = {}
    for number, question in enumerate(questions(32)):
        answer = (first, second, {})[number % 3].get(question, "")
        if answer and (number % 3 == 0 or first[question] != answer):
            wanted[question] = answer
    assert 6 <= len(wanted) < 24
    return write(folder, "gsm8k", rows(wanted))


def responses_of(run: RunDirectory) -> dict[str, dict[str, Any]]:
    return {r.prompt_id: {"split": r.split, "seed": r.sampling.seed if r.sampling else None, "ids": r.response_ids}
            for r in read_responses(run.responses / "teacher.jsonl")}  # fmt: skip


def test_only_right_answers_are_learnt_from(teacher: Path, problems: Path, tmp_path: Path) -> None:
    plain = run_pipeline(load_recipe(tree_of(teacher, problems, tmp_path / "plain")), stages=STAGES, until="respond")
    tree = tree_of(teacher, problems, tmp_path / "run")
    tree["responses"]["verify"] = {"samples": ATTEMPTS}
    tree["evaluate"]["groups"] = {"fidelity": {}, "tasks": {"heldout": True, "teacher": True, "max_new_tokens": 8}}
    run = run_pipeline(load_recipe(tree), stages=STAGES)
    record = read_json(run.root / "stages/respond.json")["verified"]
    first, kept = responses_of(plain), responses_of(run)
    train = {id for id, one in first.items() if one["split"] == "train"}
    assert record["prompts"] == len(train) and record["right"] == sum(record["by_attempt"])
    assert record["left_out"] == len(train) - record["right"] > 0 and len(record["by_attempt"]) == ATTEMPTS
    assert record["by_attempt"][0] and record["by_attempt"][1]
    # Held-out answers are the first ones, whatever they say.
    assert {id: one for id, one in kept.items() if one["split"] == "heldout"} == {
        id: one for id, one in first.items() if one["split"] == "heldout"
    }
    tokenizer, asked = AutoTokenizer.from_pretrained(teacher), read_prompt_problems(run.problems)
    for response in read_responses(run.responses / "teacher.jsonl"):
        if response.split == "train":
            assert extract(text_behind(response, tokenizer)).answer == asked[response.prompt_id].answer
    seeds = [one["seed"] for one in kept.values() if one["split"] == "train"]
    assert [seeds.count(5 + attempt) for attempt in range(ATTEMPTS)] == record["by_attempt"]
    after = read_json(run.root / "scores.json")["after"]
    assert after["accuracy@heldout"]["n"] == after["teacher_accuracy@heldout"]["n"] == len(first) - len(train)
    report = (run.root / "report.html").read_text("utf-8")
    assert f"answers that failed: {record['failures']['wrong']} wrong" in report
    assert f"for {record['right']} of {len(train)} training prompts" in report and "Accuracy (heldout)" in report


def test_unverified_answers_may_be_kept(teacher: Path, problems: Path, tmp_path: Path) -> None:
    tree = tree_of(teacher, problems, tmp_path / "run")
    tree["responses"]["verify"] = {"unverified": "keep"}
    run = run_pipeline(load_recipe(tree), stages=STAGES, until="respond")
    record = read_json(run.root / "stages/respond.json")["verified"]
    assert record["left_out"] == 0 and 0 < record["right"] < record["prompts"]
    assert len(responses_of(run)) == len(questions(32))


def test_a_kill_between_two_attempts_repeats_nothing(
    limbeck: CommandServer, teacher: Path, problems: Path, tmp_path: Path
) -> None:
    def recipe(name: str) -> Path:
        tree = tree_of(teacher, problems, tmp_path / name)
        tree["responses"]["verify"] = {"samples": ATTEMPTS}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(tree), "utf-8")
        return path.rename(path.with_suffix(".yaml"))

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert limbeck.run("respond", recipe("straight")).code == 0
    interrupted = recipe("killed")
    limbeck.run("respond", interrupted, killed=KillAt(killed, "responses/attempt-1/00001.jsonl"))
    there = {p: p.stat().st_mtime_ns for p in (killed / "responses").glob("*/*.jsonl")}
    assert there and not (killed / "responses" / "teacher.jsonl").exists()
    assert limbeck.run("respond", interrupted).code == 0
    assert all(path.stat().st_mtime_ns == written for path, written in there.items() if path.exists())
    assert (killed / "responses/teacher.jsonl").read_bytes() == (straight / "responses/teacher.jsonl").read_bytes()


@pytest.mark.skipif(bool(jail.missing()), reason=f"this machine has no {jail.missing()}")
def test_programs_are_run_and_none_that_is_right_ends_the_run(teacher: Path, tmp_path: Path) -> None:
    given = [
        {"task_id": i, "text": f"Write {text}", "code": "def f():\n    return 1\n", "test_list": ["assert f() == 1"]}
        for i, text in enumerate(questions(8))
    ]
    tree = tree_of(teacher, write(tmp_path, "mbpp", given), tmp_path / "run")
    tree["prompts"] |= {"task": "mbpp", "eval_fraction": 0.4}
    tree["responses"]["verify"] = {"timeout_s": 5.0, "memory_mb": 256}
    said = r"none of \d training prompts got a right answer in 1, such as .*raise responses\.verify\.samples, .*=keep"
    with pytest.raises(LimbeckError, match=said):
        run_pipeline(load_recipe(tree), stages=STAGES, until="respond")
    assert (tmp_path / "run/responses/program_verdicts.jsonl").exists()
    completion = next(iter(read_prompt_problems(tmp_path / "run/problems.jsonl").values())).solution
    assert completion == "```python\ndef f():\n    return 1\n```"


@pytest.mark.skipif(bool(jail.missing()), reason=f"this machine has no {jail.missing()}")
@pytest.mark.parametrize(
    ("code", "limits", "said"),
    (
        ("    while True: pass", {}, r"\(failures: \{'timeout': \d+\}\); raise responses\.verify\.timeout_s, set"),
        (
            "    return 1",
            {"memory_mb": 1},
            r"failed its trial.*raise responses\.verify\.memory_mb or .*leave resp",
        ),
    ),
)
def test_a_limit_of_programs_is_named_by_its_key(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, limits: Json, said: str
) -> None:
    monkeypatch.setattr(marking, "program_of", lambda *_, **__: (f"def f():\n{code}\n", "block"))
    given = [
        {"task_id": i, "text": f"Write {text}", "code": "def f():\n    return 1\n", "test_list": ["assert f() == 1"]}
        for i, text in enumerate(questions(3))
    ]
    tree = tree_of(teacher, write(tmp_path, "mbpp", given), tmp_path / "run")
    tree["prompts"] |= {"task": "mbpp", "eval_fraction": 0.4}
    tree["responses"]["verify"] = {"timeout_s": 1.0, "memory_mb": 256} | limits
    with pytest.raises(LimbeckError, match=said):
        run_pipeline(load_recipe(tree), stages=STAGES, until="respond")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"prompts.task": None}, ("responses.verify", "prompts.task", "gsm8k")),
        ({"responses.source": "data"}, ("the data's", "responses.source=teacher")),
        ({"responses.source": "student"}, ("trains on none of them", "source=student")),
        ({"responses.source": "pairs"}, ("resample_teacher=false",)),
        ({"responses.temperature": 0.0}, ("temperature 0", "samples=1")),
        ({"prompts.fields": {"prompt": "question"}}, ("prompts.task=gsm8k", "remove prompts.fields")),
        ({"prompts.task": "gsm9k"}, ("prompts.task", "gsm8k")),
    ],
)
def test_what_cannot_be_verified_is_refused(
    teacher: Path, problems: Path, tmp_path: Path, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    tree = tree_of(teacher, problems, tmp_path / "run")
    tree["responses"]["verify"] = {"samples": ATTEMPTS}
    for key, value in changes.items():
        section, name = key.split(".")
        tree[section][name] = value
    with pytest.raises(LimbeckError) as error:
        load_recipe(tree)
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), str(error.value)


def test_heldout_problems_need_problems(teacher: Path, tmp_path: Path) -> None:
    tree = TinyPair.write(tmp_path).tree(tmp_path / "run")
    tree["evaluate"]["groups"] = {"tasks": {"heldout": True}}
    with pytest.raises(LimbeckError, match=r"evaluate.groups.tasks.heldout .* prompts.task"):
        run_pipeline(load_recipe(tree), stages=STAGES)
    assert not (tmp_path / "run" / "prompts.jsonl").exists()


def test_a_row_without_an_answer_is_named_before_anything_is_written(teacher: Path, tmp_path: Path) -> None:
    broken = rows()
    broken[6]["answer"] = "I do not know."
    tree = tree_of(teacher, write(tmp_path, "gsm8k", broken), tmp_path / "run")
    with pytest.raises(LimbeckError, match=r"gsm8k.jsonl, line 7.*'#### NUMBER'"):
        run_pipeline(load_recipe(tree), stages=STAGES)
    assert not (tmp_path / "run" / "prompts.jsonl").exists()
