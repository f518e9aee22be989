"""Answers that a teacher samples in this process, and what samples them: batch by batch, shared over the ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from limbeck.models.loading import LoadedModel
from limbeck.models.vocabulary import real_vocab_size
from limbeck.pipeline.capturing import addresses_as_read, write_signals
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.drafted_responses import draft_record, keep_counts, with_draft
from limbeck.pipeline.hosted_responses import hosted_answers
from limbeck.pipeline.resumable import write_in_batches
from limbeck.pipeline.sampling import sampling_of
from limbeck.pipeline.seen_prompts import as_seen
from limbeck.pipeline.several import Answering, writers
from limbeck.pipeline.store_identity import exact_codec, frame_of
from limbeck.pipeline.verified_responses import later_sampling
from limbeck.prompts.templates import TemplateName
from limbeck.recipe.sections import Recipe
from limbeck.rollouts.asked import at_places, open_asked, write_table
from limbeck.rollouts.batches import InterleavedResponses
from limbeck.runtime.shared_work import Job, OneProcess, Share
from limbeck.sampling.local import LocalSampler, SampledBatch, SamplingProgress
from limbeck.sampling.speculative import SpeculativeSampler
from limbeck.student.endings import answer_ends
from limbeck.teachers.base import Teacher
from limbeck.teachers.hosted import HostedTeacher
from limbeck.types import Author, DenseSignal, Json, Response, TokenPrompt

# The prompts of a job, for the ranks that share it.
ASKED = "asked.arrow"


def captures(context: RunContext) -> bool:
    """Whether the teacher signal is stored while the teacher samples, which computes it anyway."""
    return may_capture(context.recipe) and "writing" in context.teacher.provides


def may_capture(recipe: Recipe) -> bool:
    """Whether the signal of a teacher in this process would be stored while it samples."""
    here = recipe.base_author == "teacher" and recipe.responses.server is None
    # Several answers to a prompt have one address: only the one that is kept gets a signal.
    once = recipe.responses.verify is None or recipe.responses.verify.samples == 1
    # States of several teachers are put together when all are known; those of its own tokens are of other positions.
    alone = recipe.combine is None and recipe.teacher.across is None
    return here and once and alone and recipe.teacher.keeps_whole and recipe.teacher.support == "full"


def folder_of(attempt: int) -> str:
    """Name of the folder of the answers of an attempt."""
    return f"attempt-{attempt}" if attempt else "batches"


def sample_all(
    context: RunContext, asked: Sequence[TokenPrompt], template: TemplateName, attempt: int = 0
) -> tuple[Sequence[Response], Json]:
    """Responses of the teacher, or of each of several to its own prompts, one in memory at a time; see `_sample`."""
    if context.recipe.combine is None:
        (only,) = writers(context, asked)
        return _written_by(context, only, asked, template, attempt)
    found: list[tuple[Sequence[Response], Sequence[int]]] = []
    record: Json = {}
    for writer in writers(context, asked):
        written, more = _written_by(context, writer, at_places(asked, writer.places), template, attempt)
        found.append((written, writer.places))
        writer.teacher.release()
        record.setdefault("by_teacher", {})[writer.folder] = {"responses": len(written)} | more
    return InterleavedResponses(found), record


def _written_by(
    context: RunContext, writer: Answering, asked: Sequence[TokenPrompt], template: TemplateName, attempt: int
) -> tuple[Sequence[Response], Json]:
    """Responses of one teacher: sampled here, written elsewhere for money, or those that it has written before."""
    if "writing" in writer.teacher.provides:
        fields: Json = {"template": template, "attempt": attempt, "folder": writer.folder}
        with posted_prompts(context, writer.teacher, "respond", fields, asked) as share:
            teacher = writer.teacher.writing()
            return _sample(context, teacher, asked, template, attempt, folder=writer.folder, share=share)
    sampling = later_sampling(sampling_of(context.recipe.responses), attempt)
    if isinstance(hosted := writer.teacher.scorer, HostedTeacher):
        return hosted_answers(context, hosted, asked, template, sampling)
    return writer.teacher.answers(asked, sampling), {}


def posted_prompts(
    context: RunContext, teacher: Teacher | None, kind: str, fields: Json, asked: Sequence[TokenPrompt]
) -> AbstractContextManager[Share]:
    """This rank's share of answering some prompts.

    Args:
        teacher: who answers; None is the student.
    """
    # A placed teacher takes the devices and the memory of all ranks of its host.
    alone = teacher is not None and "weights" not in teacher.provides
    return (OneProcess() if alone else context.work).posted(
        kind, fields, lambda folder: write_table(folder / ASKED, asked)
    )


def help_to_sample(context: RunContext, job: Job) -> None:
    """Another rank's share of the teacher's responses."""
    fields, asked = job.fields, open_asked(job.folder / ASKED)
    folder: str = fields["folder"]
    teacher = context.run_teachers[folder] if folder else context.teacher
    _sample(context, teacher.writing(), asked, fields["template"], fields["attempt"], folder=folder, share=job)
    if folder:
        # One of several is in memory at a time.
        teacher.release()


def _sample(
    context: RunContext,
    teacher: LoadedModel,
    asked: Sequence[TokenPrompt],
    template: TemplateName,
    attempt: int = 0,
    *,
    folder: str = "",
    share: Share,
) -> tuple[Sequence[Response], Json]:
    """Responses of the teacher and their record for the manifest; batches on disk are not sampled again.

    While it samples, the teacher computes the very hidden states that are its signal, so they are kept beside.

    Args:
        attempt: answers that were wrong are written once more, with another seed and in a folder of their own.
        folder: inside it, of one of several teachers.
        share: this rank's part of them.
    """
    section, place = context.recipe.responses, context.run.responses / folder_of(attempt)
    sampling = later_sampling(sampling_of(section), attempt)
    if captures(context):
        # A head that is not understood is refused here, and not after the answers are there.
        _ = context.teacher.head
    sampler = sampler_for(context, teacher.model, teacher.tokenizer, template, "teacher", section.batch_size)
    sampler = with_draft(context, section.draft, sampler) if section.draft else sampler

    def beside(sampler: LocalSampler | SpeculativeSampler, batch: SampledBatch, path: Path) -> None:
        if batch.hidden is not None:
            states = [DenseSignal(hidden_ND=hidden_TD, head=context.teacher.head) for hidden_TD in batch.hidden]
            addresses = addresses_as_read(batch.responses, context.teacher.reads)
            codec, frame = exact_codec(context.recipe), frame_of(context)
            write_signals(path.with_suffix(".safetensors"), addresses, batch.responses, states, codec, frame)
        keep_counts(sampler, path)

    answers, paths = write_in_batches(
        sampler,
        as_seen(context, asked),
        sampling,
        place / folder,
        stop=context.stop,
        watching=lambda done: sampling_meter(context, "respond", len(asked), done),
        capture_hidden=captures(context),
        beside=beside,
        share=share,
    )
    return answers, draft_record(section.draft, paths) if share.joins else {}


def sampler_for(
    context: RunContext, model: Any, tokenizer: Any, template: TemplateName, author: Author, batch_size: int
) -> LocalSampler:
    """A sampler for any model of the run; answers end where the template or the model itself ends them."""
    return LocalSampler(
        model=model,
        eos_token_ids=answer_ends(model, tokenizer, template, context.recipe.prompts.chat_options),
        pad_token_id=pad_token_id(tokenizer),
        vocab_size=real_vocab_size(tokenizer),
        tokenizer=tokenizer,
        author=author,
        batch_size=batch_size,
        cache_gib=context.recipe.responses.cache_gib,
    )


def pad_token_id(tokenizer: Any) -> int:
    """Id of the padding token; any real token will do, since nothing attends to it or is scored on it."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


@contextmanager
def sampling_meter(
    context: RunContext, label: str, responses: int, done: int = 0
) -> Iterator[Callable[[SamplingProgress], None]]:
    """Progress bar over answers that also shows tokens per second."""
    started = time.monotonic()
    with context.console.meter(label, responses, "answers", done) as meter:
        ended = 0

        def watch(progress: SamplingProgress) -> None:
            nonlocal ended
            rate = progress.tokens / max(time.monotonic() - started, 1e-9)
            meter.advance(progress.responses_done - ended, f"{rate:,.0f} tokens/s")
            ended = progress.responses_done

        yield watch
