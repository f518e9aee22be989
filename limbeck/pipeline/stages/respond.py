"""Stage 2: the responses the student learns from, sampled or taken from the data."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from limbeck.models.fingerprints import tokenizer_fingerprint
from limbeck.models.loading import LoadedModel
from limbeck.models.vocabulary import real_vocab_size
from limbeck.pipeline.capturing import addresses_as_read, write_signals
from limbeck.pipeline.checks import check_responses, check_rounds
from limbeck.pipeline.context import RunContext, Stage
from limbeck.pipeline.documents import document_inputs, help_with_documents, respond_with_documents
from limbeck.pipeline.drafted_responses import draft_inputs, draft_record, keep_counts, with_draft
from limbeck.pipeline.hosted_responses import hosted_answers, paid_record
from limbeck.pipeline.image_prompts import expanded_lengths
from limbeck.pipeline.resumable import write_in_batches
from limbeck.pipeline.sampling import sampling_of
from limbeck.pipeline.seen_prompts import as_seen, fitting_as_seen, view_inputs
from limbeck.pipeline.served_responses import ask_server
from limbeck.pipeline.several import Answering, combination_inputs, writers
from limbeck.pipeline.store_identity import exact_codec, frame_of
from limbeck.pipeline.student_endings import same_tokens
from limbeck.pipeline.text_only import in_the_students_tokens, load_student_tokenizer, student_template, text_options
from limbeck.pipeline.verified_responses import check_references, later_sampling, verification_inputs, verified
from limbeck.prompts.io import read_prompts
from limbeck.prompts.lengths import check_lengths
from limbeck.prompts.references import require_answers_for_sft
from limbeck.prompts.templates import (
    LossOn,
    TemplateName,
    encode_prompts,
    encode_responses,
    end_token_ids,
    resolve_template,
)
from limbeck.prompts.turns import has_earlier_answers
from limbeck.recipe.keys import fingerprinted, fingerprinted_member
from limbeck.recipe.responses import CACHE_GIB
from limbeck.recipe.sections import Recipe
from limbeck.rollouts.io import read_asked, write_asked
from limbeck.rollouts.table import NumberedResponses, ResponseTable, keep_responses, open_responses
from limbeck.runtime.shared_work import Job, Share
from limbeck.sampling.local import LocalSampler, SampledBatch, SamplingProgress
from limbeck.sampling.speculative import SpeculativeSampler
from limbeck.teachers.hosted import HostedTeacher
from limbeck.types import Author, DenseSignal, Json, LimbeckError, Prompt, Response, Split, TokenPrompt

# So many answers show which blocks of a teacher matter; more would cost more time than they would change.
CALIBRATION_RESPONSES = 24


def _response_inputs(context: RunContext) -> Json:
    prompts = context.recipe.prompts
    section = fingerprinted(context.recipe.responses)
    del section["server"], section["draft"], section["verify"]
    if section["cache_gib"] == CACHE_GIB:
        del section["cache_gib"]
    # How the student writes later is no matter of this stage; whose responses are there before, and of whom, is.
    del section["source"], section["initial_author"], section["engine"]
    section["author"] = context.recipe.base_author
    if context.recipe.on_policy:
        section["answered"] = _answers_train(context.recipe)
    server = context.recipe.responses.server
    section |= {"server": fingerprinted(server)} if server else {}
    verify = context.recipe.responses.verify
    section |= {"verify": verification_inputs(verify)} if verify else {}
    section |= document_inputs(context)
    draft = context.recipe.responses.draft
    section |= {"draft": draft_inputs(draft)} if draft else {}
    chosen: Json = {
        "template": prompts.template,
        "too_long": prompts.too_long,
        "control_tokens": prompts.control_tokens,
    }
    if prompts.max_prompt_length is not None:
        chosen["max_prompt_length"] = prompts.max_prompt_length
    if prompts.chat_options:
        chosen["chat_options"] = prompts.chat_options
    captured = {"captured": context.recipe.teacher.cache_dtype} if captures(context) else {}
    if context.recipe.base_author == "data" or context.recipe.sft_on_data:
        chosen["loss_on"] = prompts.loss_on
    sft = {"sft": "data"} if context.recipe.sft_on_data else {}
    if not same_tokens(context):
        sft["read_by"] = tokenizer_fingerprint(load_student_tokenizer(context))
    return section | chosen | captured | sft | {"teacher": teacher_inputs(context), "window": context.window}


def captures(context: RunContext) -> bool:
    """Whether the teacher signal is stored while the teacher samples, which computes it anyway."""
    return may_capture(context.recipe) and "weights" in context.teacher.provides


def may_capture(recipe: Recipe) -> bool:
    """Whether the signal of a teacher in this process would be stored while it samples."""
    here = recipe.base_author == "teacher" and recipe.responses.server is None
    # Several answers to a prompt have one address: only the one that is kept gets a signal.
    once = recipe.responses.verify is None or recipe.responses.verify.samples == 1
    # States of several teachers are put together when all are known; those of its own tokens are of other positions.
    alone = recipe.combine is None and recipe.teacher.across is None
    return here and once and alone and recipe.teacher.keeps_whole and recipe.teacher.support == "full"


def teacher_inputs(context: RunContext) -> Json:
    section = context.recipe.teacher
    return {
        "weights": context.teacher_fingerprint,
        "where": fingerprinted_member("teacher.where", section.where),
        "dtype": section.dtype,
        "attention": section.attn_implementation,
        **view_inputs(context),
        **combination_inputs(context),
    }


def _run_responses(context: RunContext) -> Json:
    if context.recipe.documents:
        return respond_with_documents(context)
    run, section, author = context.run, context.recipe.responses, context.recipe.base_author
    prompts = read_prompts(run.prompts)
    # A server and the data answer without the weights being here; they come with the signal.
    writes = section.server is None and author == "teacher"
    here = writes and context.recipe.combine is None and "weights" in context.teacher.provides
    teacher = context.teacher.weights() if here else None
    # Where the two have different tokens, the student reads text in its own.
    apart = not same_tokens(context)
    own = load_student_tokenizer(context) if apart else None
    tokenizer = teacher.tokenizer if teacher else own if own and author == "data" else context.teacher.tokenizer
    template = resolve_template(context.recipe.prompts.template, tokenizer, prompts)
    asked, dropped = _token_prompts(context, tokenizer, prompts, template)
    asked, unseen = fitting_as_seen(context, asked)
    reader = (own or tokenizer, student_template(context, own, prompts) if own else template)
    read, more_dropped = _token_prompts(context, reader[0], prompts, reader[1]) if own else (asked, ())
    if own is not None:
        # What either model cannot read, neither gets.
        both = {p.id for p in asked} & {p.id for p in read}
        asked, read = (tuple(p for p in side if p.id in both) for side in (asked, read))
    if context.recipe.on_policy:
        train = [p for p in read if p.split == "train"]
        check_rounds(context, len(train))
        write_asked(run.responses / "asked.jsonl", train)
    more: Json = {}
    if context.recipe.sft_on_data:
        require_answers_for_sft([p for p in prompts if p.split == "train"])
        train = [p for p in asked if p.split == "train"]
        answers = _from_data(context, prompts, train, *reader, loss_on=context.recipe.prompts.loss_on)
        keep_responses(run.responses / "sft.jsonl", answers)
        more["sft"] = {"responses": len(answers), "tokens": sum(r.tokens for r in answers)}
    if context.recipe.on_policy:
        asked = _answered(context, asked)
    if author == "data":
        # Pairs are two answers to one prompt.
        loss_on = "last" if context.recipe.responses.source.paired else context.recipe.prompts.loss_on
        responses = _from_data(context, prompts, asked, tokenizer, template, loss_on=loss_on)
    else:
        check_references(context, asked)
        if writes:
            _say_what_is_answered(context, prompts)

        def write(some: Sequence[TokenPrompt], attempt: int) -> tuple[list[Response], Json]:
            if writes:
                return _sample_all(context, some, template, attempt)
            read_by_teacher = prompts if context.seen is None else context.seen.prompts(prompts)
            how = later_sampling(sampling_of(section), attempt)
            place = _folder(attempt)
            return ask_server(context, tokenizer, read_by_teacher, as_seen(context, some), template, how, place)

        responses, served = write(asked, 0)
        more |= served
        if section.verify is not None:
            responses, marked = verified(context, responses, asked, tokenizer, lambda *some: write(*some)[0])
            more |= marked
    if own is not None and author == "teacher":
        responses, retokenised = in_the_students_tokens(context, prompts, responses, tokenizer, read)
        more |= retokenised
    for split in ("train", "heldout"):
        written = [r for r in responses if r.split == split]
        if written and all(_is_empty(r) for r in written):
            raise LimbeckError(
                f"all {split} responses are empty: the {author} ended every answer at once; "
                "check prompts.template, or the teacher"
            )
    keep_responses(run.responses / f"{author}.jsonl", responses)
    return {
        "template": template,
        "responses": len(responses),
        "empty": sum(_is_empty(r) for r in responses),
        "dropped_too_long": len({*dropped, *unseen, *more_dropped}),
        "ended": sum(r.stop != "length" for r in responses),
        "tokens": sum(r.tokens for r in responses),
    } | (more | paid_record(context))


def _folder(attempt: int) -> str:
    """Name of the folder of the answers of an attempt."""
    return f"attempt-{attempt}" if attempt else "batches"


def _from_data(
    context: RunContext,
    prompts: Sequence[Prompt],
    asked: Sequence[TokenPrompt],
    tokenizer: Any,
    template: TemplateName,
    *,
    loss_on: LossOn,
) -> list[Response]:
    """Reference answers of the data, as responses."""
    kept = {prompt.id for prompt in asked}
    return encode_responses(
        [p for p in prompts if p.id in kept],
        tokenizer,
        template,
        max_new_tokens=context.recipe.responses.max_new_tokens,
        control_tokens=context.recipe.prompts.control_tokens,
        chat_options=text_options(context, tokenizer),
        loss_on=loss_on,
    )


def _say_what_is_answered(context: RunContext, prompts: Sequence[Prompt]) -> None:
    if earlier := sum(has_earlier_answers(prompt) for prompt in prompts):
        context.console.say(
            f"respond: {earlier} prompts are conversations; the teacher answers the last turn of each, the data's "
            "earlier answers are context"
        )


def _answers_train(recipe: Recipe) -> Literal["all", "some", "none"]:
    """Number of training prompts that are answered before training; the student may answer the others itself."""
    if recipe.sft_on_responses or recipe.responses.source.trains_on_initial:
        return "all"
    weighed = recipe.student.quantize is not None and recipe.student.quantize.grid == "importance"
    return "some" if recipe.student.measured or weighed else "none"


def _answered(context: RunContext, asked: Sequence[TokenPrompt]) -> tuple[TokenPrompt, ...]:
    """The prompts that are answered before training: held-out ones, and training prompts whose responses are used."""
    most = {"all": len(asked), "some": CALIBRATION_RESPONSES, "none": 0}[_answers_train(context.recipe)]
    train = [p for p in asked if p.split == "train"][:most]
    return (*train, *(p for p in asked if p.split == "heldout"))


def _is_empty(response: Response) -> bool:
    """Whether a response has no tokens beside its end."""
    return response.tokens <= (response.stop == "eos")


def _token_prompts(
    context: RunContext, tokenizer: Any, prompts: Sequence[Any], template: TemplateName
) -> tuple[tuple[TokenPrompt, ...], tuple[str, ...]]:

    section = context.recipe.prompts
    encoded = encode_prompts(
        prompts,
        tokenizer,
        template,
        control_tokens=section.control_tokens,
        chat_options=text_options(context, tokenizer),
    )
    fitting = check_lengths(
        encoded,
        window=context.window or sys.maxsize,
        max_new_tokens=context.recipe.responses.max_new_tokens,
        too_long=section.too_long,
        longest=section.max_prompt_length,
        lengths=expanded_lengths(context, encoded),
    )
    if fitting.dropped:
        context.console.warn(f"{len(fitting.dropped)} prompts are longer than {fitting.limit} tokens and were dropped")
    return fitting.kept, fitting.dropped


def _sample_all(
    context: RunContext, asked: Sequence[TokenPrompt], template: TemplateName, attempt: int = 0
) -> tuple[list[Response], Json]:
    """Responses of the teacher, or of each of several to its own prompts, one in memory at a time; see `_sample`."""
    found: dict[int, Response] = {}
    record: Json = {}
    for writer in writers(context, asked):
        own = [asked[place] for place in writer.places]
        written, more = _written_by(context, writer, own, template, attempt)
        found |= dict(zip(writer.places, written, strict=True))
        if writer.folder:
            writer.teacher.release()
            record.setdefault("by_teacher", {})[writer.folder] = {"responses": len(written)} | more
        else:
            record |= more
    return [found[place] for place in range(len(asked))], record


def _written_by(
    context: RunContext, writer: Answering, asked: Sequence[TokenPrompt], template: TemplateName, attempt: int
) -> tuple[list[Response], Json]:
    """Responses of one teacher: sampled here, written elsewhere for money, or those that it has written before."""
    if "weights" in writer.teacher.provides:
        fields: Json = {"template": template, "attempt": attempt, "folder": writer.folder}
        with context.work.posted("respond", fields, lambda folder: write_asked(folder / "asked.jsonl", asked)) as share:
            teacher = writer.teacher.weights()
            return _sample(context, teacher, asked, template, attempt, folder=writer.folder, share=share)
    sampling = later_sampling(sampling_of(context.recipe.responses), attempt)
    if isinstance(hosted := writer.teacher.scorer, HostedTeacher):
        return hosted_answers(context, hosted, asked, template, sampling)
    return writer.teacher.answers(asked, sampling), {}


def _help(context: RunContext, job: Job) -> None:
    """Another rank's share of the teacher's responses."""
    fields, asked = job.fields, read_asked(job.folder / "asked.jsonl")
    folder: str = fields["folder"]
    teacher = context.run_teachers[folder] if folder else context.teacher
    _sample(context, teacher.weights(), asked, fields["template"], fields["attempt"], folder=folder, share=job)
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
) -> tuple[list[Response], Json]:
    """Responses of the teacher and their record for the manifest; batches on disk are not sampled again.

    While it samples, the teacher computes the very hidden states that are its signal, so they are kept beside.

    Args:
        attempt: answers that were wrong are written once more, with another seed and in a folder of their own.
        folder: inside it, of one of several teachers.
        share: this rank's part of them.
    """
    section, place = context.recipe.responses, context.run.responses / _folder(attempt)
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
    """A sampler for any model of the run; answers end where the template ends them."""
    return LocalSampler(
        model=model,
        eos_token_ids=end_token_ids(tokenizer, template, context.recipe.prompts.chat_options),
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


def load_responses(context: RunContext, split: Split) -> NumberedResponses:
    """The non-empty responses of a split by their row in the file, where they stay until one is asked for."""
    return open_responses(context.run.responses / f"{context.recipe.base_author}.jsonl").answered(split)


def load_sft_answers(context: RunContext) -> ResponseTable:
    """The data's answers that a first stage trains on, without empty ones."""
    return open_responses(context.run.responses / "sft.jsonl").answered("train").responses


STAGE = Stage(
    name="respond",
    check=check_responses,
    inputs=_response_inputs,
    run=_run_responses,
    outputs=lambda run: (run.responses,),
    working=("responses/batches/*", "responses/attempt-*/*"),
    handed_on=("responses/batches/*.safetensors",),
    hands_on_teacher=True,
    helped={"respond": _help, "documents": help_with_documents},
)
