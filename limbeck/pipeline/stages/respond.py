"""Stage 2: the responses the student learns from, sampled or taken from the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from limbeck.models.fingerprints import tokenizer_fingerprint
from limbeck.pipeline.checks import check_responses, check_rounds
from limbeck.pipeline.context import RunContext, Stage
from limbeck.pipeline.data_responses import (
    by_data_alone,
    data_responses,
    lots_of,
    reader_of_data,
    say_dropped,
    too_long_prompts,
)
from limbeck.pipeline.documents import document_inputs, help_with_documents, respond_with_documents
from limbeck.pipeline.drafted_responses import draft_inputs
from limbeck.pipeline.fitting_prompts import fit_of_lot, length_check
from limbeck.pipeline.hosted_responses import paid_record
from limbeck.pipeline.image_prompts import check_sees_first, check_student_sees
from limbeck.pipeline.preference_pairs import pairs_of_data
from limbeck.pipeline.sampled_responses import captures, folder_of, help_to_sample, sample_all
from limbeck.pipeline.sampling import sampling_of
from limbeck.pipeline.seen_prompts import as_seen, fitting_as_seen, view_inputs
from limbeck.pipeline.served_responses import ask_server
from limbeck.pipeline.several import combination_inputs
from limbeck.pipeline.student_endings import further_ends, same_tokens
from limbeck.pipeline.text_only import (
    in_the_students_tokens,
    load_student_tokenizer,
    student_template,
    text_options,
)
from limbeck.pipeline.verified_responses import check_references, later_sampling, verification_inputs, verified
from limbeck.pipeline.written_responses import WrittenResponses
from limbeck.prompts.io import StoredPrompts
from limbeck.prompts.references import require_answers_for_sft
from limbeck.prompts.templates import TemplateName, resolve_template
from limbeck.prompts.turns import has_earlier_answers
from limbeck.recipe.keys import fingerprinted, fingerprinted_member
from limbeck.recipe.responses import CACHE_GIB
from limbeck.recipe.sections import Recipe
from limbeck.rollouts.asked import ids_of, joined, keep_asked, of_split, scratch_table, with_ids
from limbeck.rollouts.preference.options import DataPairs
from limbeck.rollouts.table import NumberedResponses, ResponseTable, keep_responses, open_responses
from limbeck.types import Json, Response, Split, TokenPrompt

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
        **({"ends": list(ends)} if (ends := further_ends(context)) else {}),
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
    asked: Sequence[TokenPrompt]
    reader: tuple[Any, TemplateName]
    read: Sequence[TokenPrompt]
    dropped: frozenset[str]


def _run_responses(context: RunContext) -> Json:
    if context.recipe.documents:
        return respond_with_documents(context)
    author, stored = context.recipe.base_author, StoredPrompts(context.run.prompts)
    # Before the teacher's weights take their memory.
    check_student_sees(context, stored)
    answers = _of_data_alone(context, stored) if by_data_alone(context) else _of_those_asked(context, stored)
    written = WrittenResponses(author)
    keep_responses(context.run.responses / f"{author}.jsonl", written.checked(answers.responses))
    record = {"template": answers.template} | written.record(answers.dropped)
    return record | answers.record | paid_record(context)


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """The responses of a run.

    Attributes:
        responses: made as they are asked for, where the data has them.
        dropped: number of the prompts that were too long.
        record: what else the manifest holds of them.
    """

    template: TemplateName
    responses: Iterable[Response]
    dropped: int
    record: Json


def _of_data_alone(context: RunContext, stored: StoredPrompts) -> _Answers:
    """The data's answers, of which a lot is in memory at a time."""
    tokenizer, template = reader_of_data(context, stored)
    dropped = too_long_prompts(context, stored, tokenizer, template)
    _check_preferences(context, tokenizer, template)
    loss_on = context.recipe.prompts.loss_on
    responses = data_responses(
        context, stored, tokenizer, template, takes=lambda p: p.id not in dropped, loss_on=loss_on
    )
    return _Answers(template=template, responses=responses, dropped=len(dropped), record={})


def _of_those_asked(context: RunContext, stored: StoredPrompts) -> _Answers:
    """Answers of the teacher, or of the data where prompts are asked too."""
    section, reading = context.recipe.responses, _read(context, stored)
    asked, tokenizer, template = reading.asked, reading.tokenizer, reading.template
    _check_preferences(context, *reading.reader)
    if context.recipe.on_policy:
        train = of_split(reading.read, "train")
        check_rounds(context, len(train))
        keep_asked(context.run.responses / "asked.jsonl", train)
    more = _first_stage_answers(context, stored, reading) if context.recipe.sft_on_data else {}
    if context.recipe.on_policy:
        asked = _answered(context, asked)
    if context.recipe.base_author == "data":
        # Pairs are two answers to one prompt.
        loss_on = "last" if section.source.paired else context.recipe.prompts.loss_on
        kept = set(ids_of(asked))
        responses: Iterable[Response] = data_responses(
            context, stored, tokenizer, template, takes=lambda p: p.id in kept, loss_on=loss_on
        )
    else:
        responses, answered = _from_teacher(context, stored, asked, reading)
        more |= answered
    return _Answers(template=template, responses=responses, dropped=len(reading.dropped), record=more)


def _check_preferences(context: RunContext, tokenizer: Any, template: TemplateName) -> None:
    """See that the student can read the pairs of preference data, before anything is written."""
    preference = context.recipe.preference
    if preference is not None and isinstance(preference.pairs, DataPairs):
        pairs_of_data(context, preference.pairs, tokenizer, template)


def _writes(context: RunContext) -> bool:
    """Whether a teacher answers without a server; a server and the data answer without the weights being here."""
    return context.recipe.responses.server is None and context.recipe.base_author == "teacher"


def _read(context: RunContext, prompts: StoredPrompts) -> _Reading:
    """The prompts as the run reads them; what either model cannot read, neither gets."""
    here = _writes(context) and context.recipe.combine is None and "writing" in context.teacher.provides
    teacher = context.teacher.writing() if here else None
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
        both = set(ids_of(asked)) & set(ids_of(read))
        asked, read = (with_ids(side, both.__contains__) for side in (asked, read))
    return _Reading(
        own=own,
        tokenizer=tokenizer,
        template=template,
        asked=asked,
        reader=reader,
        read=read,
        dropped=frozenset({*dropped, *unseen, *unread}),
    )


def _first_stage_answers(context: RunContext, prompts: StoredPrompts, reading: _Reading) -> Json:
    """Write the data's answers that a first stage trains on; returns their record."""
    require_answers_for_sft(p for p in prompts if p.split == "train")
    train = set(ids_of(of_split(reading.asked, "train")))
    answers, loss_on = WrittenResponses("data"), context.recipe.prompts.loss_on
    responses = data_responses(context, prompts, *reading.reader, takes=lambda p: p.id in train, loss_on=loss_on)
    keep_responses(context.run.responses / "sft.jsonl", answers.counted(responses))
    return {"sft": {"responses": answers.count, "tokens": answers.tokens}}


def _from_teacher(
    context: RunContext, prompts: StoredPrompts, asked: Sequence[TokenPrompt], reading: _Reading
) -> tuple[Iterable[Response], Json]:
    """Answers of the teacher in the student's tokens, those that must be right judged; and their record."""
    check_references(context, asked)
    section, tokenizer, template = context.recipe.responses, reading.tokenizer, reading.template
    if writes := _writes(context):
        _say_what_is_answered(context, prompts)

    def write(some: Sequence[TokenPrompt], attempt: int) -> tuple[Sequence[Response], Json]:
        if writes:
            return sample_all(context, some, template, attempt)
        read_by_teacher = prompts if context.seen is None else context.seen.prompts(prompts)
        how = later_sampling(sampling_of(section), attempt)
        place = folder_of(attempt)
        return ask_server(context, tokenizer, read_by_teacher, as_seen(context, some), template, how, place)

    written, record = write(asked, 0)
    responses: Iterable[Response] = written
    if section.verify is not None:
        responses, marked = verified(context, written, asked, tokenizer, lambda *some: write(*some)[0])
        record |= marked
    if reading.own is not None:
        responses, retokenised = in_the_students_tokens(context, list(prompts), responses, tokenizer, reading.read)
        record |= retokenised
    return responses, record


def _say_what_is_answered(context: RunContext, prompts: StoredPrompts) -> None:
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


def _answered(context: RunContext, asked: Sequence[TokenPrompt]) -> Sequence[TokenPrompt]:
    """The prompts that are answered before training: held-out ones, and training prompts whose responses are used."""
    train = of_split(asked, "train")
    return joined(train[: answered_before_training(context.recipe, len(train))], of_split(asked, "heldout"))


def _token_prompts(
    context: RunContext, tokenizer: Any, prompts: StoredPrompts, template: TemplateName
) -> tuple[Sequence[TokenPrompt], Sequence[str]]:
    """The prompts in tokens, on disk, and the ids of those that are too long."""
    check, options = length_check(context, context.recipe.responses.max_new_tokens), text_options(context, tokenizer)
    lots = (fit_of_lot(context, lot, tokenizer, template, options, check) for lot in lots_of(prompts))
    kept = scratch_table(context.run.root, chain.from_iterable(lots))
    check.finish()
    say_dropped(context, len(check.dropped), check.limit)
    return kept, check.dropped


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
