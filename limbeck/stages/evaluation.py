"""Stage 5: measure the student before and after training on held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from limbeck.card import write_card
from limbeck.evaluation.fidelity import FidelityChunk, measure
from limbeck.evaluation.rouge import rouge_l
from limbeck.evaluation.scores import read_rows, write_rows, write_scores
from limbeck.flow import Response, Sampling, TokenPrompt
from limbeck.models.assets import ASSETS
from limbeck.models.heads import head_of
from limbeck.models.hidden import hidden_states
from limbeck.models.loading import load_model, load_tokenizer
from limbeck.models.sources import resolve
from limbeck.models.vocabulary import real_vocab_size
from limbeck.prompts.record import read_prompts
from limbeck.responses.records import read_responses, write_responses
from limbeck.rundir import Json, write_text
from limbeck.stages.responses import load_responses, sampler_for, sampling_meter
from limbeck.stages.signal import JUDGE_ROWS, open_teacher
from limbeck.stages.student import build_initial_student
from limbeck.story import Stage, Story
from limbeck.student.batches import collate


def _evaluation_inputs(story: Story) -> Json:
    return asdict(story.recipe.evaluate)


def _play_evaluation(story: Story) -> Json:
    """Measure the student before and after training on held-out responses; each part that is on disk is kept."""
    run, groups = story.run, story.recipe.evaluate.groups
    parts: dict[str, dict[str, Any]] = {"before": {}, "after": {}}
    for part, rows_of in parts.items():
        missing = [g for g in groups if not (run.scores / f"{part}.{g}.jsonl").exists()]
        measured = _measure_part(story, part, missing) if missing else {}
        for group, rows in measured.items():
            write_rows(run.scores / f"{part}.{group}.jsonl", rows)
        for group in groups:
            rows_of[group] = read_rows(run.scores / f"{part}.{group}.jsonl")
    write_scores(run.root, before=parts["before"], after=parts["after"], seed=0)
    if "rouge" in groups:
        _write_samples(story, parts)
    base_model, license = _origin(story)
    write_card(run.root, base_model=base_model, license=license)
    return {"heldout_responses": len(next(iter(parts["after"].values()), []))}


def _origin(story: Story) -> tuple[str | None, str | None]:
    """Hub id and licence of the model whose weights the student began as, where they are known."""
    section = story.recipe.student if story.recipe.student.model else story.recipe.teacher
    assert section.model is not None
    source = resolve(section.model, revision=section.revision, weights=False)
    if story.recipe.student.init == "scratch":
        return None, source.license
    hub_id = ASSETS[section.model].hub_id if source.kind == "asset" else section.model if source.kind == "hub" else None
    return hub_id, source.license


def _measure_part(story: Story, part: str, groups: Sequence[str]) -> dict[str, Any]:
    """The rows of some groups for the student before or after training."""
    model, tokenizer = _student_at(story, part)
    rows: dict[str, Any] = {}
    if "fidelity" in groups:
        rows["fidelity"] = measure(_fidelity_chunks(story, part, model, tokenizer))
    if "rouge" in groups:
        answers = greedy_answers(story, part, model, tokenizer)
        references = greedy_answers(story, "teacher", None, tokenizer)
        rows["rouge"] = rouge_l(
            [r.prompt_id for r in answers],
            candidates=[_text(r, tokenizer) for r in answers],
            references=[_text(r, tokenizer) for r in references],
        )
    return rows


def _student_at(story: Story, part: str) -> tuple[Any, Any]:
    """Model and tokenizer of the student before or after training."""
    if part == "before":
        student = build_initial_student(story)
        return student.model.eval(), student.tokenizer
    section = story.recipe.student
    loaded = load_model(
        story.run.student,
        dtype=section.dtype,
        attn_implementation=section.attn_implementation,
        trust_remote_code=story.student_trusted,
    )
    loaded.model.to(story.device)  # type: ignore[arg-type]
    return loaded.model, loaded.tokenizer


def _text(response: Response, tokenizer: Any) -> str:
    return str(tokenizer.decode(list(response.response_ids), skip_special_tokens=True)).strip()


def _fidelity_chunks(story: Story, part: str, model: Any, tokenizer: Any) -> Iterator[Any]:
    """Held-out responses as the student and the teacher see them, a few rows at a time."""
    by_row = load_responses(story, "heldout")
    responses = list(by_row.values())
    teacher = open_teacher(story, list(by_row))
    head = head_of(model, real_vocab_size(tokenizer))
    order = sorted(range(len(responses)), key=lambda i: (-responses[i].length, i))
    with story.console.meter(f"evaluate {part}", sum(len(r.response_ids) for r in responses), "tokens") as meter:
        for start in range(0, len(order), JUDGE_ROWS):
            batch = collate(responses, order[start : start + JUDGE_ROWS], pad_id=0)
            with torch.inference_mode():
                hidden_ND = hidden_states(model, batch.to(story.device))
            yield FidelityChunk(
                student_hidden_ND=hidden_ND,
                student_head=head,
                teacher=teacher.signal(batch),  # type: ignore[arg-type]
                label_ids_N=batch.labels_N.to(story.device),
                ids=tuple(responses[i].prompt_id for i in batch.rows),
                lengths=tuple(len(responses[i].response_ids) for i in batch.rows),
            )
            meter.advance(len(batch.labels_N))


def greedy_answers(story: Story, writer: str, model: Any, tokenizer: Any) -> list[Response]:
    """Greedy answers to held-out prompts by "teacher", "before" or "after"; written once to scores/greedy.*.jsonl."""
    section, path = story.recipe.evaluate, story.run.scores / f"greedy.{writer}.jsonl"
    if not path.exists():
        heldout = list(load_responses(story, "heldout").values())[: section.prompts]
        asked = [TokenPrompt(id=r.prompt_id, ids=r.prompt_ids, split="heldout") for r in heldout]
        if model is None:
            model = story.load_teacher().model
        template = (story.run.manifest("responses") or {})["template"]
        author = "teacher" if writer == "teacher" else "student"
        sampler = sampler_for(story, model, tokenizer, template, author, section.batch_size)
        sampling = Sampling(max_new_tokens=section.max_new_tokens, temperature=0.0)
        with sampling_meter(story, f"answer {writer}", len(asked)) as watched:
            write_responses(path, replace(sampler, on_progress=watched).respond(asked, sampling))
    return read_responses(path)


def _write_samples(story: Story, parts: dict[str, dict[str, Any]]) -> None:
    """A handful of held-out prompts with the answers of teacher, student before and student after."""
    section = story.recipe.teacher
    tokenizer = load_tokenizer(section.model, revision=section.revision, trust_remote_code=section.trust_remote_code)
    prompts = {p.id: p for p in read_prompts(story.run.prompts)}
    rouge = {part: {row.id: row.values["rouge_l"] for row in parts[part]["rouge"]} for part in parts}
    sides = {side: greedy_answers(story, side, None, tokenizer) for side in ("teacher", "before", "after")}
    lines = []
    for i, answer in enumerate(sides["teacher"][: story.recipe.evaluate.samples]):
        prompt = prompts[answer.prompt_id]
        asked = prompt.text if prompt.text is not None else "\n".join(m.content for m in prompt.messages or ())
        line = {"prompt": asked} | {side: _text(sides[side][i], tokenizer) for side in sides}
        line |= {f"rouge_{part}": rouge[part][answer.prompt_id] for part in rouge}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(story.run.samples, "".join(lines))


STAGE = Stage(
    name="evaluation",
    verb="evaluate",
    inputs=_evaluation_inputs,
    play=_play_evaluation,
    outputs=lambda run: (run.scores, run.samples, run.root / "scores.json"),
)
