"""The group tasks: on answers that are known, on a real student, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from limbeck.evaluation.context import text_behind
from limbeck.evaluation.sandbox import jail
from limbeck.pipeline.evaluation_context import RunEvaluation
from limbeck.pipeline.stages.evaluate import examine
from limbeck.runtime.files import read_json
from limbeck.types import LimbeckError, Prompt, Response, Sampling
from tests.evaluation.few_problems import MBPP, ROWS, WHOLE, write
from tests.evaluation.tiny_exam import Tiny
from tests.tiny_pair import write_model

confined = pytest.mark.skipif(bool(jail.missing()), reason=f"this machine has no {jail.missing()}")

# Texts a student may give: task to the answers of each of its problems, one a sample.
GIVEN = {
    "gsm8k/1": ["I say \\boxed{4}", "It is 5"],
    "gsm8k/2": ["#### 1001.", "#### $1,001"],
    "math/a/1": ["\\boxed{0.5x}", "nothing"],
    "humaneval/T/0": [f"```python\n{WHOLE}```", "```python\ndef add(a, b):\n    while True: pass\n```"],
    "mbpp/2": ["```python\nimport sys\nsys.exit(0)\n```", f"```python\n{MBPP[0]['code']}```"],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    made = Tiny.write(folder)
    plain = write_model(folder / "plain", layers=2, window=1024, chat=False)
    return Tiny(student=plain, teacher=made.teacher, prompts=made.prompts)


def section(folder: Path, tasks: Sequence[str], **more: Any) -> dict[str, Any]:
    files = {task: str(write(folder, task)) for task in tasks}
    return {"groups": {"tasks": {"files": files, "max_new_tokens": 8, **more}}}


def plant(monkeypatch: pytest.MonkeyPatch, template: str) -> list[tuple[Sampling, tuple[str | None, ...]]]:
    """Let the student answer as GIVEN says; what it was asked, in order."""
    asked = []

    def answers(
        self: RunEvaluation, who: str, sampling: Sampling, prompts: Sequence[Prompt], *, keep_logp: bool = False
    ) -> list[Response]:
        asked.append((sampling, tuple(p.text for p in prompts)))
        tokenizer = self.tokenizer("student")
        return [
            Response(
                prompt_id=p.id,
                author="student",
                prompt_ids=tuple(tokenizer(p.text)["input_ids"]),
                response_ids=tuple(tokenizer(GIVEN[p.id][sampling.seed - 3])["input_ids"]),
                stop="eos",
            )
            for p in prompts
        ]

    monkeypatch.setattr(RunEvaluation, "answers", answers)
    monkeypatch.setattr(RunEvaluation, "template", lambda self, who: template)
    return asked


@confined
def test_the_group_on_answers_that_are_known(tiny: Tiny, tmp_path, monkeypatch):
    evaluate = section(
        tmp_path, tuple(ROWS), samples=2, temperature=0.8, pass_at=[1, 2], seed=3, timeout_s=1.0, memory_mb=256
    )
    evaluation = tiny.evaluation(tmp_path / "run", evaluate)
    asked = plant(monkeypatch, "chat")
    evaluation.settings.groups["tasks"].check(evaluation)
    tables = examine(evaluation.context, ("after",))["after"]
    means = {name: [next(iter(row.values.values())) for row in rows] for name, rows in tables.items()}
    assert means == {
        "tasks@gsm8k": [0.5, 1.0], "tasks@gsm8k,k=2": [1.0, 1.0],
        "tasks@math": [0.5], "tasks@math,k=2": [1.0],
        "tasks@humaneval,k=1": [0.5], "tasks@humaneval,k=2": [1.0],
        "tasks@mbpp,k=1": [0.5], "tasks@mbpp,k=2": [1.0],
    }  # fmt: skip
    # Ahead of everything, and where they are marked.
    assert [sampling.seed for sampling, _ in asked] == [3, 4] * 8 and all(not s.stop for s, _ in asked)
    assert all("\\boxed{}" in text for _, texts in asked[:4] for text in texts if text)
    detail = read_json(evaluation.folder / "after.tasks.json")["detail"]
    assert detail["gsm8k"] == {
        "problems": 2, "too_long": 0, "answers": 4, "right": 3, "failures": {"wrong": 1},
        "extraction": {"boxed": 1, "last number": 1, "hashes": 2},
    }  # fmt: skip
    assert detail["math"]["failures"] == {"no answer": 1} and detail["mbpp"]["failures"] == {"exit": 1}
    assert detail["humaneval"]["failures"].keys() <= {"timeout", "killed"}
    assert "seccomp" in detail["sandbox"]["system_calls"] and detail["sandbox"]["limits"]["memory_mb"] == 256
    scores = read_json(tmp_path / "run/scores.json")
    assert scores["after"]["accuracy@gsm8k"]["mean"] == 0.75 and scores["after"]["pass_at_k@mbpp,k=2"]["mean"] == 1
    assert not list((tmp_path / "run").glob(".*partial"))
    # Another evaluation of the same answers runs no program again.
    monkeypatch.setattr("limbeck.evaluation.sandbox.log.run_programs", None)
    assert evaluation.settings.groups["tasks"].measure(evaluation).tables["mbpp,k=1"][0].values["pass_at_k"] == 0.5


@confined
def test_where_programs_can_write_no_file_it_is_said(tiny: Tiny, tmp_path, monkeypatch, capsys):
    for module in ("evaluation.sandbox.host", "evaluation.sandbox.log", "evaluation.groups.tasks"):
        monkeypatch.setattr(f"limbeck.{module}.files_possible", lambda: False)
    evaluation = tiny.evaluation(tmp_path / "run", section(tmp_path, ["mbpp"], seed=4))
    plant(monkeypatch, "chat")
    measured = evaluation.settings.groups["tasks"].measure(evaluation)
    assert measured.detail["mbpp"]["right"] == 1
    assert "nothing to write: this machine lets no process mount" in measured.detail["sandbox"]["file_system"]
    assert "warning: tasks: programs have nothing to write" in capsys.readouterr().err


@confined
def test_a_student_without_a_chat_template_continues_text(tiny: Tiny, tmp_path):
    """A real, random student: it is asked in plain words, answers once, and is wrong."""
    evaluation = tiny.evaluation(tmp_path / "run", section(tmp_path, tuple(ROWS)))
    measured = evaluation.settings.groups["tasks"].measure(evaluation)
    assert set(measured.tables) == {"gsm8k", "math", "humaneval,k=1", "mbpp,k=1"}
    assert all(value == 0 for rows in measured.tables.values() for row in rows for value in row.values.values())
    assert measured.detail["humaneval"]["answers"] == 1
    evaluation.release_student()
    again = evaluation.settings.groups["tasks"].measure(evaluation)
    assert again == measured


def test_the_white_space_at_the_beginning_of_a_continuation_is_kept(tiny: Tiny):
    real = AutoTokenizer.from_pretrained(tiny.student)
    response = Response(
        prompt_id="x",
        author="student",
        prompt_ids=tuple(real("def f():\n")["input_ids"]),
        response_ids=(*real("    return 1")["input_ids"], real.eos_token_id),
        stop="eos",
    )
    assert text_behind(response, real) == "    return 1"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"files": {}}, "names no task"),
        ({"pass_at": [1, 3]}, r"pass@3 of 1 answers"),
        ({"samples": 2}, r"samples=2 at temperature 0"),
        ({"files": {"gsm8k": "nowhere.jsonl"}}, r"files.gsm8k is nowhere.jsonl, which is no file"),
        ({"pass_at": []}, r"pass_at is empty, but humaneval"),
        ({"lm_eval": ["ifeval"]}, r"pip install lm-eval"),
    ],
)
def test_what_can_be_known_to_fail_is_refused_before_all_else(more, said, tiny: Tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    evaluate = section(tmp_path, ["humaneval"])
    evaluate["groups"]["tasks"] |= more
    evaluation = tiny.evaluation(tmp_path / "run", evaluate)
    with pytest.raises(LimbeckError, match=said):
        evaluation.settings.groups["tasks"].check(evaluation)


def test_without_a_sandbox_programs_are_refused_and_maths_is_not(tiny: Tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(jail, "landlock_version", lambda: 0)
    maths = tiny.evaluation(tmp_path / "maths", section(tmp_path, ["gsm8k"]))
    maths.settings.groups["tasks"].check(maths)
    evaluation = tiny.evaluation(tmp_path / "code", section(tmp_path, ["humaneval"]))
    group = evaluation.settings.groups["tasks"]
    for act in (group.check, group.measure):
        with pytest.raises(LimbeckError, match="no Landlock"):
            act(evaluation)


def test_lm_eval(tiny: Tiny, tmp_path, monkeypatch):
    """A module of the shapes of lm-eval 0.4, with which the group was tried."""
    asked: list[dict[str, Any]] = []

    def simple_evaluate(model: Any, **options: Any) -> dict[str, Any]:
        held = evaluation.context.kept.get("student")
        asked.append(options | {"student": held is not None and model["pretrained"] is held[1].model})
        samples = [
            {"doc_id": i, "filter": name, "exact_match": right, "metrics": ["exact_match"]}
            for name, marks in (("strict", (1.0, 0.0)), ("flexible", (1.0, 1.0)))
            for i, right in enumerate(marks)
        ]
        figures = {"alias": "x", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.5, " ": " "}
        return {"results": {"x": figures, "ppl": {"bits,none": 1.0}}, "samples": {"x": samples, "ppl": [{"doc_id": 0}]}}

    parts = {
        "lm_eval": {"simple_evaluate": simple_evaluate, "__version__": "0.4.13", "__spec__": SimpleNamespace()},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **options: options},
        "lm_eval.tasks": {"TaskManager": lambda: SimpleNamespace(all_tasks=["x", "ppl"])},
    }
    for name, contents in parts.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    evaluate = {"groups": {"tasks": {"lm_eval": ["x", "ppl"], "limit": 2, "seed": 7}}}
    evaluation = tiny.evaluation(tmp_path / "run", evaluate)
    evaluation.settings.groups["tasks"].check(evaluation)
    measured = evaluation.settings.groups["tasks"].measure(evaluation)
    assert {c: [(r.id, r.values["accuracy"]) for r in rows] for c, rows in measured.tables.items()} == {
        "lm_eval,x": [("x/0", 1.0), ("x/1", 0.0)]
    }
    found = measured.detail["lm_eval"]
    assert found["version"] == "0.4.13" and found["student"] == found["teacher"]
    assert found["student"]["x"] == {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.5}
    assert found["student"]["ppl"] == {"bits,none": 1.0}
    assert [options["apply_chat_template"] for options in asked] == [False, True], "each with its own template"
    assert all(options["limit"] == 2 and options["random_seed"] == 7 for options in asked)
    assert [options["student"] for options in asked] == [True, False], "and alone in memory"
    other = tiny.evaluation(tmp_path / "other", {"groups": {"tasks": {"lm_eval": ["y"]}}})
    with pytest.raises(LimbeckError, match=r"0\.4\.13 has no task 'y'"):
        other.settings.groups["tasks"].measure(other)
