"""A teacher that sees another prompt than the student: what it writes, what is stored, trained on and measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.pipeline.stages.respond import load_responses
from limbeck.pipeline.stages.teach import open_teacher
from limbeck.prompts.io import read_prompts
from limbeck.prompts.templates import encode_prompts
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.collate import collate
from limbeck.rollouts.io import read_responses
from limbeck.teachers.base import TeacherModel
from limbeck.teachers.in_process import InProcessTeacher
from limbeck.types import DenseSignal, LimbeckError, Prompt, Response
from tests.tiny_pair import TinyPair, questions, write_model, write_prompts

HINT = "privileged_context"
CPU = torch.device("cpu")
ALONE = {"groups": ["fidelity"]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    folder = tmp_path_factory.mktemp("pair")
    rows = [{"prompt": text, "completion": f"It is {i}.", HINT: f"Say {i}."} for i, text in enumerate(questions())]
    return TinyPair(teacher=write_model(folder / "teacher"), prompts=write_prompts(folder / "prompts.jsonl", rows))


def tree_of(tiny: TinyPair, output: Path, **sections: Any) -> dict[str, Any]:
    """A run whose student begins as its teacher."""
    base: dict[str, Any] = {"student": {"init": "teacher", "layers": None}, "evaluate": ALONE}
    tree = tiny.tree(output, **base | sections)
    tree["train"] |= {"max_steps": 3, **sections.get("train", {})}
    return tree


def played(tree: dict[str, Any]) -> RunContext:
    recipe = load_recipe(tree)
    run_pipeline(recipe, stages=STAGES)
    return RunContext(recipe)


def seen_by_hand(context: RunContext, response: Response, text: str) -> tuple[int, ...]:
    """The ids of what the teacher should see: this text as the only user turn."""
    tokenizer = context.teacher.tokenizer
    (prompt,) = encode_prompts([Prompt(id=response.prompt_id, text=text)], tokenizer, "chat")
    return prompt.ids


def states_by_hand(tiny: TinyPair, responses: list[Response]) -> torch.Tensor:
    teacher = InProcessTeacher(model=TeacherModel(model=str(tiny.teacher)), device=CPU)
    signal = teacher.signal(collate(responses, range(len(responses)), pad_id=0))
    assert isinstance(signal, DenseSignal)
    return signal.hidden_ND


def test_the_teacher_writes_and_scores_under_what_it_sees(tiny: TinyPair, tmp_path: Path) -> None:
    """Its answers are those to the longer prompt; what is kept and trained on has the student's prompt."""
    tree = tree_of(tiny, tmp_path / "run", teacher={"sees": "column"}, responses={"temperature": 0.0})
    context = played(tree)
    prompts = {p.id: p for p in read_prompts(context.run.prompts)}
    responses = list(load_responses(context, "train").values())[:4]
    model: Any = context.teacher.weights().model
    for response in responses:
        prompt = prompts[response.prompt_id]
        own = seen_by_hand(context, response, prompt.text or "")
        seen = seen_by_hand(context, response, f"{prompt.text}\n\n{prompt.columns[HINT]}")
        assert response.prompt_ids == own != seen
        ids = torch.tensor([seen])
        most = len(response.response_ids)
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False)
        assert tuple(written[0, len(seen) :].tolist()) == response.response_ids
    # Off-policy signals, as sampling captured them.
    stored = open_teacher(context).signal(collate(responses, range(4), pad_id=0))
    as_seen = [
        replace(
            r,
            prompt_ids=seen_by_hand(context, r, f"{prompts[r.prompt_id].text}\n\n{prompts[r.prompt_id].columns[HINT]}"),
        )
        for r in responses
    ]
    assert isinstance(stored, DenseSignal)
    torch.testing.assert_close(stored.hidden_ND, states_by_hand(tiny, as_seen), rtol=1e-4, atol=1e-4)
    # The student begins as the teacher: all that lies between them is what the teacher sees.
    scores = json.loads((context.run.root / "scores.json").read_text("utf-8"))
    assert scores["before"]["forward_kl"]["mean"] > 1e-3


def test_stored_signals_of_the_data_are_those_of_a_teacher_that_runs_beside(tiny: TinyPair, tmp_path: Path) -> None:
    losses: list[list[float]] = []
    for cache in (True, False):
        run = tmp_path / f"cache-{cache}"
        see = {"name": "template", "text": "{privileged_context}\n\n{prompt}"}
        tree = tree_of(tiny, run, teacher={"sees": see, "cache": cache}, responses={"source": "data"})
        played(tree)
        losses.append([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()])
    assert losses[0][0] > 1e-3
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-6)


SOURCES = [{"name": "student", "refresh": 3}, {"name": "pairs"}, {"name": "speculative", "refresh": 3}]


@pytest.mark.parametrize("source", SOURCES, ids=[str(source["name"]) for source in SOURCES])
def test_rounds_are_scored_under_what_the_teacher_sees(tiny: TinyPair, tmp_path: Path, source: dict[str, Any]) -> None:
    sections: dict[str, Any] = {"responses": {"source": source}, "prompts": {"ignore_columns": [HINT]}}
    see = {"name": "system", "text": "Be short."}
    context = played(tree_of(tiny, tmp_path / "run", teacher={"sees": see}, **sections))
    losses = [json.loads(line)["loss"] for line in context.run.metrics.read_text("utf-8").splitlines()]
    # Behind the same prompt the first step would find nothing between a student and the teacher that it began as.
    assert losses[0] > 1e-3
    path = next((context.run.rounds / "000" / "student").glob("[0-9]*.jsonl"))
    assert all(r.prompt_ids == context_prompt(context, r) for r in read_responses(path))


def context_prompt(context: RunContext, response: Response) -> tuple[int, ...]:
    prompts = {p.id: p for p in read_prompts(context.run.prompts)}
    return seen_by_hand(context, response, prompts[response.prompt_id].text or "")


def test_the_students_prompt_in_other_words_is_the_run_without_the_key(tiny: TinyPair, tmp_path: Path) -> None:
    runs = []
    for name, teacher in (("plain", {}), ("named", {"sees": "prompt"})):
        tree = tree_of(tiny, tmp_path / name, teacher=teacher, prompts={"ignore_columns": [HINT]})
        runs.append(played(tree).run)
    for file in ("student/model.safetensors", "responses/teacher.jsonl", "prompts.jsonl"):
        assert (runs[0].root / file).read_bytes() == (runs[1].root / file).read_bytes()
    prints = [json.loads((run.root / "stages/evaluate.json").read_text("utf-8"))["fingerprint"] for run in runs]
    assert prints[0] == prints[1]


def test_a_row_without_the_column_is_named_before_a_model_is_loaded(tiny: TinyPair, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in tiny.prompts.read_text("utf-8").splitlines()]
    for row, value, got in ((6, None, "holds None"), (9, "  ", "holds '  '"), (3, ..., "is missing")):
        broken = [dict(one) for one in rows]
        if value is ...:
            del broken[row][HINT]
        else:
            broken[row][HINT] = value
        path = write_prompts(tmp_path / "broken.jsonl", broken)
        tree = tree_of(tiny, tmp_path / f"run-{row}", teacher={"sees": "column"}, prompts={"source": str(path)})
        with pytest.raises(LimbeckError) as caught:
            run_pipeline(load_recipe(tree), stages=STAGES)
        said = str(caught.value)
        assert f"broken.jsonl, line {row + 1}" in said and f"'{HINT}'" in said and got in said and "\n" not in said
        assert not (tmp_path / f"run-{row}" / "responses").exists()


def test_the_column_is_refused_where_no_key_reads_it(tiny: TinyPair, tmp_path: Path) -> None:
    with pytest.raises(LimbeckError, match=r"privileged_context.*teacher\.sees=column"):
        run_pipeline(load_recipe(tree_of(tiny, tmp_path / "run")), stages=STAGES)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"evaluate": {"groups": ["speculation"]}}, "leave speculation out"),
    ({"prompts": {"ignore_columns": [HINT]}}, "prompts.ignore_columns leaves out 'privileged_context'"),
    ({"prompts": {"template": "plain"}, "teacher": {"sees": {"name": "system", "text": "x"}}}, "template plain has no"),
    ({"teacher": {"sees": "colum"}}, "view 'colum' is unknown (nearest: 'column')"),
    ({"teacher": {"sees": {"name": "system", "column": "x"}}}, "teacher.sees.column is an option of column"),
    ({"teacher": {"sees": {"name": "template", "text": f"{{prompt}} {{{HINT}}}" + " no" * 60}}}, "as the teacher sees"),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED)
def test_what_cannot_see_two_prompts_is_refused_in_one_line(
    tiny: TinyPair, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    tree = tree_of(tiny, tmp_path / "run", **{"teacher": {"sees": "column"}} | sections)
    if HINT not in str(sections) and "system" in str(sections):
        tree["prompts"]["ignore_columns"] = [HINT]
    with pytest.raises(LimbeckError) as caught:
        run_pipeline(load_recipe(tree), stages=STAGES)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("responses/batches/*"))


def test_conversations_whose_every_answer_is_trained_on_are_refused(tiny: TinyPair, tmp_path: Path) -> None:
    turns = ({"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."})
    rows = [{"messages": [*turns, {"role": "user", "content": q}, turns[1]], HINT: "C."} for q in questions()]
    path = write_prompts(tmp_path / "talks.jsonl", rows)
    sections: dict[str, Any] = {"prompts": {"source": str(path)}, "responses": {"source": "data"}}
    tree = tree_of(tiny, tmp_path / "run", teacher={"sees": "column"}, **sections)
    with pytest.raises(LimbeckError, match=r"earlier answers.*prompts\.loss_on=last"):
        run_pipeline(load_recipe(tree), stages=STAGES)
    tree["prompts"]["loss_on"] = "last"
    played(tree)
