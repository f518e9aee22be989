"""Stage 2: the responses the student learns from, sampled or taken from the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from limbeck.models.fingerprints import tokenizer_fingerprint
from limbeck.pipeline.checks import check_responses, check_rounds
from limbeck.pipeline.context import RunContext, Stage
from limbeck.pipeline.documents import document_inputs, help_with_documents, respond_with_documents
from limbeck.pipeline.drafted_responses import draft_inputs
from limbeck.pipeline.fitting_prompts import fitting_prompts
from limbeck.pipeline.hosted_responses import paid_record
from limbeck.pipeline.image_prompts import check_sees_first, check_student_sees
from limbeck.pipeline.preference_pairs import pairs_of_data
from limbeck.pipeline.sampled_responses import captures, folder_of, help_to_sample, sample_all
from limbeck.pipeline.sampling import sampling_of
from limbeck.pipeline.seen_prompts import as_seen, fitting_as_seen, view_inputs
from limbeck.pipeline.served_responses import ask_server
from limbeck.pipeline.several import combination_inputs
from limbeck.pipeline.student_endings import same_tokens
from limbeck.pipeline.text_only import in_the_students_tokens, load_student_tokenizer, student_template, text_options
from limbeck.pipeline.verified_responses import check_references, later_sampling, verification_inputs, verified
from limbeck.prompts.io import read_prompts
from limbeck.prompts.references import require_answers_for_sft
from limbeck.prompts.templates import (
    LossOn,
    TemplateName,
    encode_responses,
    resolve_template,
)
from limbeck.prompts.turns import has_earlier_answers
from limbeck.recipe.keys import fingerprinted, fingerprinted_member
from limbeck.recipe.responses import CACHE_GIB
from limbeck.recipe.sections import Recipe
from limbeck.rollouts.io import write_asked
from limbeck.rollouts.preference.options import DataPairs
from limbeck.rollouts.table import NumberedResponses, ResponseTable, keep_responses, open_responses
from limbeck.types import Author, Json, LimbeckError, Prompt, Response, Split, TokenPrompt

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


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """The prompts of a run in the tokens of what answers them and in the student's, where those are others.

    Attributes:
        own: the student's tokenizer where it has other tokens than the teacher; None where they are the same.
        tokenizer: of what answers.
        asked: the prompts in its tokens.
        reader: tokenizer and template of the student.
        read: the same prompts in its tokens.
        dropped: ids of the prompts that are too long for either.
    """

    own: Any
    tokenizer: Any
    template: TemplateName
    asked: tuple[TokenPrompt, ...]
    reader: tuple[Any, TemplateName]
    read: tuple[TokenPrompt, ...]
    dropped: frozenset[str]


def _run_responses(context: RunContext) -> Json:
    if context.recipe.documents:
        return respond_with_documents(context)
    run, section, author = context.run, context.recipe.responses, context.recipe.base_author
    prompts = read_prompts(run.prompts)
    # Before the teacher's weights take their memory.
    check_student_sees(context, prompts)
    reading = _read(context, prompts)
    asked, tokenizer, template = reading.asked, reading.tokenizer, reading.template
    preference = context.recipe.preference
    if preference is not None and isinstance(preference.pairs, DataPairs):
        # What the student cannot read comes to light before anything is written.
        pairs_of_data(context, preference.pairs, *reading.reader)
    if context.recipe.on_policy:
        train = [p for p in reading.read if p.split == "train"]
        check_rounds(context, len(train))
        write_asked(run.responses / "asked.jsonl", train)
    more = _first_stage_answers(context, prompts, reading) if context.recipe.sft_on_data else {}
    if context.recipe.on_policy:
        asked = _answered(context, asked)
    if author == "data":
        # Pairs are two answers to one prompt.
        loss_on = "last" if section.source.paired else context.recipe.prompts.loss_on
        responses = _from_data(context, prompts, asked, tokenizer, template, loss_on=loss_on)
    else:
        responses, answered = _from_teacher(context, prompts, asked, reading)
        more |= answered
    _require_written(responses, author)
    keep_responses(run.responses / f"{author}.jsonl", responses)
    return {
        "template": template,
        "responses": len(responses),
        "empty": sum(_is_empty(r) for r in responses),
        "dropped_too_long": len(reading.dropped),
        "ended": sum(r.stop != "length" for r in responses),
        "tokens": sum(r.tokens for r in responses),
    } | (more | paid_record(context))


def _writes(context: RunContext) -> bool:
    """Whether a teacher answers without a server; a server and the data answer without the weights being here."""
    return context.recipe.responses.server is None and context.recipe.base_author == "teacher"


def _read(context: RunContext, prompts: Sequence[Prompt]) -> _Reading:
    """The prompts as the run reads them; what either model cannot read, neither gets."""
    here = _writes(context) and context.recipe.combine is None and "weights" in context.teacher.provides
    teacher = context.teacher.weights() if here else None
    if teacher is not None:
        check_sees_first(teacher.model, prompts)
    # Where the two have different tokens, the student reads text in its own.
    own = None if same_tokens(context) else load_student_tokenizer(context)
    by_data = context.recipe.base_author == "data"
    tokenizer = teacher.tokenizer if teacher else own if own and by_data else context.teacher.tokenizer
    template = resolve_template(context.recipe.prompts.template, tokenizer, prompts)
    asked, dropped = _token_prompts(context, tokenizer, prompts, template)
    asked, unseen = fitting_as_seen(context, asked)
    reader: tuple[Any, TemplateName] = (tokenizer, template)
    read, unread = asked, ()
    if own is not None:
        reader = (own, student_template(context, own, prompts))
        read, unread = _token_prompts(context, own, prompts, reader[1])
        both = {p.id for p in asked} & {p.id for p in read}
        asked, read = (tuple(p for p in side if p.id in both) for side in (asked, read))
    return _Reading(
        own=own,
        tokenizer=tokenizer,
        template=template,
        asked=asked,
        reader=reader,
        read=read,
        dropped=frozenset({*dropped, *unseen, *unread}),
    )


def _first_stage_answers(context: RunContext, prompts: Sequence[Prompt], reading: _Reading) -> Json:
    """Write the data's answers that a first stage trains on; returns their record."""
    require_answers_for_sft([p for p in prompts if p.split == "train"])
    train = [p for p in reading.asked if p.split == "train"]
    answers = _from_data(context, prompts, train, *reading.reader, loss_on=context.recipe.prompts.loss_on)
    keep_responses(context.run.responses / "sft.jsonl", answers)
    return {"sft": {"responses": len(answers), "tokens": sum(r.tokens for r in answers)}}


def _from_teacher(
    context: RunContext, prompts: Sequence[Prompt], asked: Sequence[TokenPrompt], reading: _Reading
) -> tuple[list[Response], Json]:
    """Answers of the teacher in the student's tokens, those that must be right judged; and their record."""
    check_references(context, asked)
    section, tokenizer, template = context.recipe.responses, reading.tokenizer, reading.template
    if writes := _writes(context):
        _say_what_is_answered(context, prompts)

    def write(some: Sequence[TokenPrompt], attempt: int) -> tuple[list[Response], Json]:
        if writes:
            return sample_all(context, some, template, attempt)
        read_by_teacher = prompts if context.seen is None else context.seen.prompts(prompts)
        how = later_sampling(sampling_of(section), attempt)
        place = folder_of(attempt)
        return ask_server(context, tokenizer, read_by_teacher, as_seen(context, some), template, how, place)

    responses, record = write(asked, 0)
    if section.verify is not None:
        responses, marked = verified(context, responses, asked, tokenizer, lambda *some: write(*some)[0])
        record |= marked
    if reading.own is not None:
        responses, retokenised = in_the_students_tokens(context, prompts, responses, tokenizer, reading.read)
        record |= retokenised
    return responses, record


def _require_written(responses: Sequence[Response], author: Author) -> None:
    for split in ("train", "heldout"):
        written = [r for r in responses if r.split == split]
        if written and all(_is_empty(r) for r in written):
            raise LimbeckError(
                f"all {split} responses are empty: the {author} ended every answer at once; "
                "check prompts.template, or the teacher"
            )


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


def answered_before_training(recipe: Recipe, prompts: int) -> int:
    """How many of so many training prompts are answered before training."""
    return min({"all": prompts, "some": CALIBRATION_RESPONSES, "none": 0}[_answers_train(recipe)], prompts)


def _answered(context: RunContext, asked: Sequence[TokenPrompt]) -> tuple[TokenPrompt, ...]:
    """The prompts that are answered before training: held-out ones, and training prompts whose responses are used."""
    train = [p for p in asked if p.split == "train"]
    train = train[: answered_before_training(context.recipe, len(train))]
    return (*train, *(p for p in asked if p.split == "heldout"))


def _is_empty(response: Response) -> bool:
    """Whether a response has no tokens beside its end."""
    return response.tokens <= (response.stop == "eos")


def _token_prompts(
    context: RunContext, tokenizer: Any, prompts: Sequence[Any], template: TemplateName
) -> tuple[tuple[TokenPrompt, ...], tuple[str, ...]]:
    most = context.recipe.responses.max_new_tokens
    fitting = fitting_prompts(context, prompts, tokenizer, template, max_new_tokens=most)
    if fitting.dropped:
        context.console.warn(f"{len(fitting.dropped)} prompts are longer than {fitting.limit} tokens and were dropped")
    return fitting.kept, fitting.dropped


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
    helped={"respond": help_to_sample, "documents": help_with_documents},
)
