"""Stage 6: measure the student before and after training on held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from limbeck.evaluation.context import Part, Who, greedy
from limbeck.evaluation.group import EvaluationGroup, table_name
from limbeck.evaluation.scores.files import read_rows, write_rows, write_scores
from limbeck.evaluation.scores.metrics import STAND_INS, with_stand_in
from limbeck.models.assets import ASSETS
from limbeck.models.sources import resolve
from limbeck.pipeline.context import RunContext, Stage
from limbeck.pipeline.evaluation_context import RunEvaluation, help_answer, help_measure
from limbeck.pipeline.sharing import initial_student, once
from limbeck.recipe.keys import fingerprinted
from limbeck.report.model_card import write_card
from limbeck.runtime.files import write_json, write_text
from limbeck.runtime.records import read_fields
from limbeck.runtime.rundir import RunDirectory
from limbeck.types import Json, Response, ScoredRow

ScoreTables = dict[str, Sequence[ScoredRow]]


def evaluation_inputs(context: RunContext) -> Json:
    """Inputs of the evaluation: its section, and those of its groups."""
    section, evaluation = fingerprinted(context.recipe.evaluate), RunEvaluation(context=context, part="after")
    for name, group in context.recipe.evaluate.groups.items():
        section["groups"][name] |= group.inputs(evaluation)
    return section


def check_groups(context: RunContext) -> None:
    """Let each group check that it can be measured.

    Raises:
        LimbeckError: something is missing.
    """
    for group in context.recipe.evaluate.groups.values():
        group.check(RunEvaluation(context=context, part="after"))


def _run_evaluation(context: RunContext) -> Json:
    """Measure the student before and after training; each group of each part that is on disk is kept."""
    parts = examine(context, ("before", "after"))
    write_answers(context, parts)
    base_model, license = _origin(context)
    write_card(context.run.root, base_model=base_model, license=license)
    if context.run.asked.exists():
        # The last stage that asks the teacher anything.
        context.teacher.settled()
    return {"heldout_prompts": len(RunEvaluation(context=context, part="after").prompts)}


def examine(context: RunContext, parts: Sequence[Part]) -> dict[Part, ScoreTables]:
    """The rows of all groups for some parts, and `scores.json` of them.

    What stand-ins score is, as a condition, among the scores after training.
    """
    found: dict[Part, ScoreTables] = {"before": {}, "after": {}}
    for part in (*parts, *(context.recipe.evaluate.stand_ins if "after" in parts else ())):
        evaluation = RunEvaluation(context=context, part=part)
        groups = {n: group for n, group in context.recipe.evaluate.groups.items() if _measures(group, part)}
        with _once_a_sweep(evaluation):
            evaluation.write_ahead(group for name, group in groups.items() if not _record(evaluation, name).exists())
            for name, group in groups.items():
                found[_scored_as(part)] |= _rows_of(evaluation, name, group)
        evaluation.release_student()
    write_scores(context.run.root, before=found["before"], after=found["after"], seed=0)
    return found


def _measures(group: EvaluationGroup, part: Part) -> bool:
    """Whether a group measures a student, or a stand-in, which is measured like the student before training."""
    return part in group.parts or (part in STAND_INS and (part in group.stand_ins() or "before" in group.parts))


def _scored_as(part: Part) -> Part:
    """The part among whose scores a part's are."""
    return "after" if part in STAND_INS else part


def _once_a_sweep(evaluation: RunEvaluation) -> AbstractContextManager[None]:
    """Share the scores before training among runs of a sweep that start from the same student.

    Of stand-ins the answers alone are shared: the share that training brought back is the run's own.
    """
    part = evaluation.part
    if part == "after":
        return nullcontext()
    made_from = {part: initial_student(evaluation.context), "evaluate": evaluation_inputs(evaluation.context)}
    shared = (f"answers/{part}-*.jsonl",) if part in STAND_INS else ("before.*", "answers/before-*.jsonl")
    return once(evaluation.context, made_from, evaluation.folder, shared)


def _rows_of(evaluation: RunEvaluation, name: str, group: EvaluationGroup) -> ScoreTables:
    """The tables of a group by GROUP or GROUP@CONDITION, measured unless they are on disk.

    The record of a group is written last and names its tables: without it nothing of the group counts as measured.
    """
    record = _record(evaluation, name)
    if not record.exists():
        # pyright takes no cached_property for what a protocol has as a property.
        measured = group.measure(evaluation)  # type: ignore[arg-type]
        for condition, rows in measured.tables.items():
            write_rows(_file(evaluation, _table(evaluation, name, condition), "jsonl"), rows)
        write_json(record, {"conditions": list(measured.tables), "detail": measured.detail})
    conditions = read_fields(record, {"conditions": list})["conditions"]
    tables = [_table(evaluation, name, condition) for condition in conditions]
    return {table: read_rows(_file(evaluation, table, "jsonl")) for table in tables}


def _record(evaluation: RunEvaluation, name: str) -> Path:
    """File of the record of a group."""
    return _file(evaluation, _table(evaluation, name, ""), "json")


def _table(evaluation: RunEvaluation, name: str, condition: str) -> str:
    """Name of a table of a group among the scores."""
    stand_in = evaluation.part if evaluation.part in STAND_INS else ""
    return table_name(name, with_stand_in(condition, stand_in) if stand_in else condition)


def _file(evaluation: RunEvaluation, table: str, ending: str) -> Path:
    return evaluation.folder / f"{_scored_as(evaluation.part)}.{table}.{ending}"


def _origin(context: RunContext) -> tuple[str | None, str | None]:
    """Hub id and licence of the model that the student started from, where they are known."""
    section = context.recipe.student if context.recipe.student.model else context.recipe.teacher
    assert section.model is not None
    source = resolve(section.model, revision=section.revision, weights=False)
    if context.recipe.student.init == "scratch":
        return None, source.license
    hub_id = ASSETS[section.model].hub_id if source.kind == "asset" else section.model if source.kind == "hub" else None
    return hub_id, source.license


def write_answers(context: RunContext, parts: Mapping[Part, ScoreTables]) -> None:
    """Write some held-out prompts with the greedy answers of the teacher and of the student before and after training.

    Each answer comes with its `Response.id`, and with the author and the round that the id is made of.
    """
    # Against the references alone no greedy answers were written.
    scored: dict[Part, dict[str, float]] = {}
    for part, tables in parts.items():
        if rows := {row.id: row.values["rouge_l"] for row in tables.get("rouge", ()) if "rouge_l" in row.values}:
            scored[part] = rows
    if not scored:
        return
    after = RunEvaluation(context=context, part="after")
    sides: dict[str, dict[str, tuple[Response, str]]] = {"teacher": _greedy_answers(after, "teacher")}
    for part in scored:
        sides[part] = _greedy_answers(RunEvaluation(context=context, part=part), "student")
    lines = []
    shown = [p for p in after.prompts if all(p.id in answers for answers in sides.values())]
    for prompt in shown[: context.recipe.evaluate.samples]:
        asked = prompt.text if prompt.text is not None else "\n".join(m.content for m in prompt.messages or ())
        answers = {side: answers[prompt.id] for side, answers in sides.items()}
        line: Json = {"prompt_id": prompt.id, "prompt": asked} | {side: text for side, (_, text) in answers.items()}
        line["responses"] = {
            side: {"id": r.id, "author": r.author, "round": r.round} for side, (r, _) in answers.items()
        }
        line |= {f"rouge_{part}": rows[prompt.id] for part, rows in scored.items()}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(context.run.samples, "".join(lines))


def _greedy_answers(evaluation: RunEvaluation, who: Who) -> dict[str, tuple[Response, str]]:
    """Greedy answers of the teacher or the student, by prompt id, with their text."""
    sampling = greedy(evaluation.settings)
    texts = evaluation.texts(who, sampling)
    return {r.prompt_id: (r, texts[r.prompt_id]) for r in evaluation.answers(who, sampling)}


def _cards(run: RunDirectory) -> tuple[Path, ...]:
    """Where model cards may be: beside the student that the run hands on."""
    return run.student / "README.md", run.preferred / "README.md"


STAGE = Stage(
    name="evaluate",
    check=check_groups,
    inputs=evaluation_inputs,
    run=_run_evaluation,
    outputs=lambda run: (run.scores, run.samples, run.root / "scores.json", *_cards(run)),
    working=("scores/answers/*",),
    helped={"answer": help_answer, "measure": help_measure},
)
