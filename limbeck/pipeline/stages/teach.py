"""Stage 3: the teacher signal of every response token, stored once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from limbeck.objectives import SparseForm
from limbeck.pipeline.build import sparse_form
from limbeck.pipeline.context import RunContext, Stage
from limbeck.pipeline.several import rows_by_teacher
from limbeck.pipeline.stages.respond import captures, load_responses, teacher_inputs
from limbeck.rollouts.collate import collate
from limbeck.runtime.console import Meter
from limbeck.runtime.files import link
from limbeck.runtime.folders import remove
from limbeck.teachers.base import Teacher
from limbeck.teachers.several import SeveralTeachers
from limbeck.teachers.stored import StoredTeacher, dense_rows, sparse_rows, write_head, write_signal
from limbeck.types import DenseSignal, Json, Response, SampledSignal, SignalSource, TokenBatch, TopKSignal

# Rows of one shard of the signal, the unit that is redone after an interruption, and of one forward pass.
SHARD_ROWS = 64
SCORING_BATCH_SIZE = 16


def _signal_inputs(context: RunContext) -> Json:
    form = sparse_form(context.recipe)
    inputs = {
        "cache": context.recipe.teacher.cache,
        "dtype": context.recipe.teacher.cache_dtype,
        "teacher": teacher_inputs(context),
    }
    if context.recipe.teacher.across is not None:
        inputs["across"] = True
    if not captures(context) and not _scores_train(context):
        inputs["split"] = "heldout"
    return inputs if form is None else inputs | {"sparse": asdict(form)}


def _run_signal(context: RunContext) -> Json:
    if "captured" in context.teacher.provides:
        return {"cached": False, "captured": _locate(context)}
    if not context.recipe.teacher.cache:
        return {"cached": False}

    run = context.run
    captured = sorted((run.responses / "batches").glob("[0-9]*.safetensors"))
    for path in captured:
        target = run.signal / path.name
        if not target.exists():
            link(path, target)
    tokens = 0 if captured else _score(context)
    # Last, so that nothing is left of a teacher whose numbers are none.
    write_head(run.signal, context.teacher.head)
    size = sum(path.stat().st_size for path in run.signal.iterdir())
    return {"cached": True, "captured_while_sampling": bool(captured), "tokens": tokens, "mib": size >> 20}


def _score(context: RunContext) -> int:
    """One pass of the teacher over all responses, a shard at a time; shards on disk are not scored again.

    With a sparse support the held-out rows are kept whole: evaluation measures over the whole vocabulary.
    """
    responses = _scored(context)
    form, dtype = sparse_form(context.recipe), getattr(torch, context.recipe.teacher.cache_dtype)
    shards: list[list[int]] = []
    for group in rows_by_teacher(context, responses):
        rows = sorted(group, key=lambda row: (-responses[row].length, row))
        shards += [rows[start : start + SHARD_ROWS] for start in range(0, len(rows), SHARD_ROWS)]
    scored, parts = "", _parts_of_mean(context, responses, shards)
    tokens = sum(r.tokens for r in responses.values())
    with context.console.meter("teach", tokens, "tokens") as meter:
        paths = {context.run.signal / f"{number:05d}.safetensors": shard for number, shard in enumerate(shards)}
        if form is not None and "hidden" not in context.teacher.provides:
            _score_likeliest(context.teacher, responses, paths, form, meter)
            return tokens
        for path, shard in paths.items():
            if not path.exists():
                if len(shards) > 1 and context.recipe.routing is not None:
                    # One of several teachers in memory at a time.
                    now = context.member_of(responses[shard[0]].prompt_id)
                    if scored not in ("", now):
                        context.teacher.release()
                    scored = now
                if parts is None:
                    hidden = _hidden_states(context.teacher, responses, shard)
                else:
                    hidden = _joined_parts(context, parts, path.name, responses, shard)
                whole = {row: h for row, h in hidden.items() if form is None or responses[row].split == "heldout"}
                tensors = dense_rows({responses[row].id: h for row, h in whole.items()}, dtype=dtype)
                if form is not None:
                    # The seed of a row's draws is its number: an interrupted pass draws what a whole one would.
                    kept = hidden.keys() - whole.keys()
                    signals = {row: DenseSignal(hidden_ND=hidden[row], head=context.teacher.head) for row in kept}
                    tensors |= sparse_rows({responses[row].id: form.of(s, seed=row) for row, s in signals.items()})
                write_signal(path, tensors)
                context.teacher.settled(_batches(responses, shard))
            meter.advance(sum(responses[row].tokens for row in shard))
    if parts is not None:
        remove(parts)
    return tokens


def _parts_of_mean(
    context: RunContext, responses: Mapping[int, Response], shards: Sequence[Sequence[int]]
) -> Path | None:
    """The folder with each teacher's states of all shards, where the signal is a mean of several; one of them is in
    memory at a time."""
    if context.recipe.mixing is None:
        return None
    folder = context.run.signal / "parts"
    for name, member in context.run_teachers.items():
        reading = member if context.seen is None else context.seen.teacher(member)
        for number, shard in enumerate(shards):
            file = f"{number:05d}.safetensors"
            if not (context.run.signal / file).exists() and not (folder / name / file).exists():
                hidden = _hidden_states(reading, responses, shard)
                rows = dense_rows({responses[row].id: h for row, h in hidden.items()}, dtype=torch.float32)
                write_signal(folder / name / file, rows)
        member.release()
    return folder


def _joined_parts(
    context: RunContext, folder: Path, file: str, responses: Mapping[int, Response], shard: Sequence[int]
) -> dict[int, Tensor]:
    """The states of a shard, put together from those of each teacher."""
    from safetensors.torch import load_file

    several = context.teacher.scorer
    assert isinstance(several, SeveralTeachers), "a mean is one of several teachers"
    found = {name: load_file(folder / name / file) for name in several.members}
    return {row: several.joined({name: own[responses[row].id] for name, own in found.items()}) for row in shard}


def _scored(context: RunContext) -> dict[int, Response]:
    """The responses whose signal the run reads, by row."""
    responses = load_responses(context, "heldout")
    return responses | load_responses(context, "train") if _scores_train(context) else responses


def _locate(context: RunContext) -> int:
    """Check that captured signals are there for all responses of the run; their number."""
    responses = _scored(context)
    rows = list(responses)
    batches = (rows[start : start + SCORING_BATCH_SIZE] for start in range(0, len(rows), SCORING_BATCH_SIZE))
    context.teacher.locate(collate(responses, batch, pad_id=0) for batch in batches)
    return len(responses)


def _score_likeliest(
    teacher: Teacher,
    responses: Mapping[int, Response],
    paths: Mapping[Path, Sequence[int]],
    form: SparseForm,
    meter: Meter,
) -> None:
    """The same with a teacher that says no more than its likeliest tokens, of held-out rows too."""
    left = {path: shard for path, shard in paths.items() if not path.exists()}
    meter.advance(sum(responses[row].tokens for path in paths.keys() - left.keys() for row in paths[path]))
    batches = (collate(responses, (row,), pad_id=0) for shard in left.values() for row in shard)
    teacher.fetch_ahead(batches, meter.advance)
    for path, shard in left.items():
        write_signal(path, _likeliest(teacher, responses, shard, form))
    teacher.settled()


def _likeliest(
    teacher: Teacher, responses: Mapping[int, Response], shard: Sequence[int], form: SparseForm
) -> dict[str, Tensor]:
    """The stored tensors of a teacher that says no more than its likeliest tokens at temperature 1.

    Of a temperature of the grid at which log Z is not known it is NaN, and refused where it is read.
    """
    signal = teacher.signal(collate(responses, shard, pad_id=0))
    assert isinstance(signal, TopKSignal), "all that it provides"
    known_G = torch.tensor([0.0 if tau == 1 else torch.nan for tau in form.temperatures])
    signals: dict[str, TopKSignal | SampledSignal] = {}
    lengths = [responses[row].tokens for row in shard]
    for row, ids, logp in zip(shard, signal.ids_NK.split(lengths), signal.logp_NK.split(lengths), strict=True):
        log_z_NG = known_G.expand(len(ids), len(known_G))
        signals[responses[row].id] = TopKSignal(
            ids_NK=ids, logp_NK=logp, temperatures=form.temperatures, log_z_NG=log_z_NG
        )
    return sparse_rows(signals)


def _hidden_states(teacher: Teacher, responses: Mapping[int, Response], rows: Sequence[int]) -> dict[int, Tensor]:
    """The teacher's hidden states of some responses by row."""
    hidden: dict[int, Tensor] = {}
    teacher.fetch_ahead(_batches(responses, rows), lambda tokens: None)
    for batch in _batches(responses, rows):
        signal = teacher.signal(batch)
        assert isinstance(signal, DenseSignal), "all that a teacher can provide: see limbeck.pipeline.provisions"
        lengths = [responses[row].tokens for row in batch.rows]
        hidden |= dict(zip(batch.rows, signal.hidden_ND.split(lengths), strict=True))
    return hidden


def _batches(responses: Mapping[int, Response], rows: Sequence[int]) -> Iterator[TokenBatch]:
    """Some responses in batches of the size that they are scored in."""
    for start in range(0, len(rows), SCORING_BATCH_SIZE):
        yield collate(responses, rows[start : start + SCORING_BATCH_SIZE], pad_id=0)


def _scores_train(context: RunContext) -> bool:
    """Whether the teacher scores the training responses that were written before training."""
    return not context.recipe.on_policy or context.recipe.sft_on_responses


def open_teacher(context: RunContext, beside: Teacher | None = None) -> SignalSource:
    """Source of teacher signals for training and evaluation: files, or the teacher where the run has none.

    Args:
        beside: the teacher that a training asks; None takes that of the run.
    """
    if "captured" in context.teacher.provides:
        # In one pass, not batch by batch.
        _locate(context)
    elif context.recipe.teacher.cache:
        form = sparse_form(context.recipe)
        temperatures = () if form is None else form.temperatures
        return StoredTeacher.open(context.run.signal, device=context.device, temperatures=temperatures)
    return beside or context.teacher


STAGE = Stage(
    name="teach",
    inputs=_signal_inputs,
    run=_run_signal,
    outputs=lambda run: (run.signal,),
    intermediate=True,
    hands_on_teacher=True,
)
