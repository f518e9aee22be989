"""A run whose teacher has other tokens than its student (`teacher.across`): the readings of its answers, and checks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.models.vocabulary import VocabularyCard, compare_vocabularies
from limbeck.objectives.fused.chained import check_chain
from limbeck.pipeline.build import loss_plan_of
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.seen_prompts import SeenPrompts, view_inputs
from limbeck.pipeline.student_endings import same_tokens
from limbeck.pipeline.text_only import load_student_tokenizer, student_template, text_options
from limbeck.prompts.ids import tokenize
from limbeck.prompts.labels import prompt_label
from limbeck.prompts.sources import load_prompts
from limbeck.prompts.templates import TemplateName, end_token_ids, resolve_template
from limbeck.prompts.turns import has_earlier_answers
from limbeck.recipe.load import load_recipe
from limbeck.runtime.json_lines import json_lines
from limbeck.runtime.records import fingerprint
from limbeck.teachers.across import AcrossTeacher, Readings, SharedSource
from limbeck.teachers.alignment.reading import Aligner
from limbeck.teachers.base import Teacher
from limbeck.types import Json, LimbeckError, Prompt, SignalSource

# Texts that a share is foreseen on: some ten thousand tokens.
_FORESEEN = 500


def across_teacher(context: RunContext, inner: Teacher) -> AcrossTeacher:
    """The teacher of a run, reading its own tokens of the student's prompts and answers."""
    seen = context.seen or SeenPrompts(context)
    readings = Readings(
        make_aligner=lambda: _aligner(context),
        prompt_ids=seen.ids,
        window=lambda: inner.window,
    )
    view = None if context.seen is None else fingerprint(view_inputs(context))
    return AcrossTeacher.across(inner, readings, view)


def in_shared_tokens(context: RunContext, source: SignalSource) -> SignalSource:
    """A source of signals as the loss reads them: with what both models share, where their tokens differ."""
    teacher, across = context.teacher, context.recipe.teacher.across
    if across is None or not isinstance(teacher, AcrossTeacher):
        return source
    chain = across.merged == "chain"
    return SharedSource(inner=teacher if chain else source, readings=teacher.readings, chain=chain)


def _aligner(context: RunContext) -> Aligner:
    own, theirs = load_student_tokenizer(context), context.teacher.tokenizer
    mine = _end(context, own, student_template(context, own, ()))
    others = _end(context, theirs, _template(context, theirs))
    return Aligner.of(own, theirs, ends=None if mine is None or others is None else (mine, others))


def _template(context: RunContext, tokenizer: Any) -> TemplateName:
    return resolve_template(context.recipe.prompts.template, tokenizer, ())


def _end(context: RunContext, tokenizer: Any, template: TemplateName) -> int | None:
    """The token that an answer ends with: the template's end of a turn, else the end of the sequence."""
    ends = end_token_ids(tokenizer, template, text_options(context, tokenizer))
    return min(ends, key=lambda index: index == tokenizer.eos_token_id, default=None)


def aligned_share(metrics: Path) -> Json:
    """Share of the tokens of a training at which student and teacher were compared, for its manifest."""
    compared = tokens = before = 0.0
    for line in (json.loads(text) for _, text in json_lines(metrics.read_text("utf-8"))):
        if "aligned" in line:
            compared += line["aligned"] * (line["tokens"] - before)
            tokens += line["tokens"] - before
        before = line["tokens"]
    return {"aligned": compared / tokens} if tokens else {}


def foreseen(teacher: VocabularyCard, student: VocabularyCard, tree: Mapping[str, Any], source: str) -> str:
    """A sentence on how much of a pair with different tokens could be compared, measured on a source of prompts.

    Args:
        tree: sections `teacher` and `student` of a recipe.
        source: as prompts.source; the answers of prompts that have any, else the prompts.
    """
    pair = {key: dict(section) for key, section in tree.items()}
    pair["teacher"]["across"] = {}
    context = RunContext(load_recipe({"name": "doctor", **pair}))
    context.teacher_card, context.student_card = teacher, student
    texts = [_text_of(prompt) for prompt in load_prompts(source, heldout_fraction=None).prompts]
    try:
        aligner = _aligner(context)
    except LimbeckError as error:
        return str(error)
    own = load_student_tokenizer(context)
    kinds: Counter[str] = Counter()
    for ids in tokenize(texts[:_FORESEEN], own, special=False):
        for group in aligner.align(ids).groups:
            kinds[group.kind] += group.student[1] - group.student[0]
    tokens = max(kinds.total(), 1)
    return (
        f"with teacher.across={{}} the two are compared where their tokens coincide: {len(aligner.shared):,} of the "
        f"student's {student.vocab_size:,} ids are the teacher's too, and on {min(len(texts), _FORESEEN)} texts of "
        f"{source} {kinds['exact'] / tokens:.1%} of the student's tokens coincide, {kinds['merged'] / tokens:.1%} are "
        "several of one side for one of the other"
    )


def _text_of(prompt: Prompt) -> str:
    turns = [turn.content for turn in prompt.messages or ()]
    return prompt.completion or prompt.text or "\n".join(turns)


def check_across(context: RunContext) -> None:
    """Check that a run across tokenizers asks for nothing that needs one vocabulary.

    Raises:
        LimbeckError: it does, or both models have the same tokens.
    """
    if context.recipe.teacher.across is None:
        return
    if context.recipe.combine is not None:
        raise LimbeckError(
            "teacher.across reads the answers in the tokens of one teacher, and the recipe has several (teachers); "
            "name one teacher, or leave teacher.across out"
        )
    if same_tokens(context):
        raise LimbeckError(
            "teacher.across is for a student with other tokens than the teacher, and these two have the same; "
            "leave teacher.across out"
        )
    teacher, student = context.teacher_card, context.student_card
    assert student is not None
    if keys := _keys_to_change(context):
        raise LimbeckError(
            f"teacher {teacher.name} and student {student.name} have different tokens: "
            f"{'; '.join(compare_vocabularies(teacher, student).differences)}. "
            f"teacher.across compares them where their tokens coincide, which is not enough here: set {' '.join(keys)}"
        )
    if context.recipe.teacher.across.merged == "chain":
        for objective in loss_plan_of(context.recipe).objectives:
            check_chain(objective)
    # Kinds of tokenizers that are not understood are refused before anything works.
    assert isinstance(context.teacher, AcrossTeacher), "the context makes one"
    _ = context.teacher.readings.aligner


def _keys_to_change(context: RunContext) -> list[str]:
    """Settings that need one vocabulary, as the overrides that remove them."""
    recipe, keys = context.recipe, []
    if "captured" in context.teacher.provides:
        # What a store holds is of the tokens that it was captured from.
        keys.append("teacher.where=in_process")
    if recipe.responses.source.samples_teacher:
        keys.append("responses.source=student")
    if recipe.contrast.rule is not None:
        keys.append("contrast.rule=null")
    if recipe.objective.temperature_adapt is not None:
        keys.append("objective.temperature_adapt=null")
    if recipe.preference is not None and recipe.preference.pairs.needs_teacher:
        keys.append("preference.pairs={name: judge, base_url: ...}")
    if recipe.teacher.cache and recipe.teacher.across is not None and recipe.teacher.across.merged == "chain":
        keys.append("teacher.cache=false")
    if recipe.teacher.support != "full":
        keys.append("teacher.support=full")
    asking = [name for name, group in recipe.evaluate.groups.items() if "tokens" in group.needs()]
    if asking:
        rest = [name for name in recipe.evaluate.groups if name not in asking] or ["rouge"]
        keys.append(f"evaluate.groups=[{', '.join(dict.fromkeys([*rest, 'nll']))}]")
    return keys


def require_one_answer_each(context: RunContext, prompts: Sequence[Prompt]) -> None:
    """Check that no response holds several turns of a conversation, which the teacher's template writes otherwise.

    Raises:
        LimbeckError: the data's answers do; names the prompt.
    """
    recipe = context.recipe
    from_data = recipe.base_author == "data" or recipe.sft_on_data
    if recipe.teacher.across is None or recipe.prompts.loss_on == "last" or not from_data:
        return
    several = next((prompt for prompt in prompts if has_earlier_answers(prompt)), None)
    if several is not None:
        raise LimbeckError(
            f"prompt {prompt_label(several)} is a conversation with earlier answers, which prompts.loss_on=all trains "
            "on, and teacher.across reads the last one alone; set prompts.loss_on=last"
        )
