"""Teacher and student with different tokens: the student learns from text.

Text needs no alignment. The teacher answers with its own tokenizer and template, or the data answers; what the student
is trained on is that text in the student's own template and tokens. Nothing of the teacher's distributions can be used,
since they are over other tokens: whatever asks for them is refused before any stage works. A pair with the same tokens
never comes here: its responses are the very ids that were sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from limbeck.models.loading import load_tokenizer
from limbeck.models.vocabulary import compare_vocabularies
from limbeck.pipeline.build import loss_plan_of, sft_loss_plan
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.student_endings import same_tokens
from limbeck.prompts.chat import reads_option
from limbeck.prompts.special_tokens import special_tokens
from limbeck.prompts.templates import TemplateName, encode_responses, resolve_template
from limbeck.types import Json, LimbeckError, Prompt, Response, Sampling, TokenPrompt


def check_text_only(context: RunContext) -> None:
    """Check that a pair with different tokens is trained on text alone, unless the recipe compares them across.

    Raises:
        LimbeckError: it does; names every key to change.
    """
    if same_tokens(context):
        return
    across = context.recipe.teacher.across is not None
    teacher, student = context.teacher_card, context.student_card
    assert student is not None
    if student.vocab_size > student.head_rows:
        raise LimbeckError(
            f"{student.name} has {student.vocab_size} token ids but a head of {student.head_rows} rows; "
            "its tokenizer does not belong to it"
        )
    if not across and (keys := _keys_to_change(context)):
        raise LimbeckError(
            f"teacher {teacher.name} and student {student.name} have different tokens: "
            f"{'; '.join(compare_vocabularies(teacher, student).differences)}. "
            "Across tokenizers a student learns from text alone: "
            f"set {' '.join(keys)}, or choose a pair of one model family, or compare the two where their tokens "
            "coincide (teacher.across={})"
        )


def _keys_to_change(context: RunContext) -> list[str]:
    """Settings that need more than text of the teacher, as the overrides that remove them."""
    recipe, keys = context.recipe, []
    if recipe.on_policy:
        keys.append("responses.source=teacher")
    if recipe.contrast.rule is not None:
        keys.append("contrast.rule=null")
    if loss_plan_of(recipe).needs_teacher:
        keys.append("objective={name: ce}")
    if recipe.sft is not None and sft_loss_plan(recipe, recipe.sft).needs_teacher:
        keys.append("sft.objective={name: ce}")
    if recipe.preference is not None and recipe.preference.pairs.needs_teacher:
        keys.append("preference.pairs={name: judge, base_url: ...}")
    if recipe.teacher.support != "full":
        keys.append("teacher.support=full")
    if recipe.teacher.cache:
        keys.append("teacher.cache=false")
    asking = [name for name, group in recipe.evaluate.groups.items() if "tokens" in group.needs()]
    if asking:
        rest = [name for name in recipe.evaluate.groups if name not in asking] or ["rouge"]
        keys.append(f"evaluate.groups=[{', '.join(dict.fromkeys([*rest, 'nll']))}]")
    return keys


def text_options(context: RunContext, tokenizer: Any) -> Mapping[str, Any]:
    """The variables of `prompts.chat_options` for one of the two templates: where they differ, those that it reads."""
    options = context.recipe.prompts.chat_options
    if same_tokens(context):
        return options
    own = load_student_tokenizer(context)
    known = (own, context.teacher.tokenizer)
    for name in options:
        if not any(reads_option(name, one) for one in known):
            raise LimbeckError(
                f"prompts.chat_options has {name!r}, which is no variable of the chat template of teacher or student; "
                "correct the name or leave it out"
            )
    return {name: value for name, value in options.items() if reads_option(name, tokenizer)}


def load_student_tokenizer(context: RunContext) -> Any:
    """The student's own tokenizer."""
    section = context.recipe.student
    assert section.model is not None
    return load_tokenizer(section.model, revision=section.revision, trust_remote_code=section.trust_remote_code)


def in_the_students_tokens(
    context: RunContext,
    prompts: Sequence[Prompt],
    answers: Iterable[Response],
    written_with: Any,
    asked: Sequence[TokenPrompt],
) -> tuple[list[Response], Json]:
    """The teacher's answers in the student's tokens, and their record for the manifest; see `texts_as_responses`.

    Args:
        written_with: the teacher's tokenizer.
        asked: the prompts as the student reads them; answers to others are left out.
    """
    tokenizer = load_student_tokenizer(context)
    template = student_template(context, tokenizer, prompts)
    by_id, fitting = {prompt.id: prompt for prompt in prompts}, {prompt.id for prompt in asked}
    written = [
        WrittenText(
            prompt=by_id[answer.prompt_id],
            text=str(written_with.decode(list(answer.response_ids), skip_special_tokens=True)),
            cut=answer.stop == "length",
            sampling=answer.sampling,
        )
        for answer in answers
        if answer.prompt_id in fitting
    ]
    found, record = texts_as_responses(context, written, tokenizer, template)
    return [one for one in found if one is not None], {"template": template, "tokens_of": "student"} | record


@dataclass(frozen=True, kw_only=True)
class WrittenText:
    """An answer of the teacher as a text.

    Attributes:
        cut: it ends at the length limit.
    """

    prompt: Prompt
    text: str
    cut: bool
    sampling: Sampling | None


def texts_as_responses(
    context: RunContext, written: Sequence[WrittenText], tokenizer: Any, template: TemplateName
) -> tuple[list[Response | None], Json]:
    """Answers in the student's tokens, in order, and what was left out and cut.

    An answer that was cut off has no end in the student's tokens either. One that spells a control token of the
    student's tokenizer is left out with a warning, unless prompts.control_tokens is parse.
    """
    section, answered, spelled = context.recipe.responses, dict[int, Prompt](), 0
    control = [token for token in special_tokens(tokenizer).values() if token.strip()]
    for place, one in enumerate(written):
        text = one.text.strip()
        if context.recipe.prompts.control_tokens == "error" and any(token in text for token in control):
            spelled += 1
            continue
        answered[place] = replace(one.prompt, completion=text, references=(), answer=None)
    if spelled:
        context.console.warn(
            f"{spelled} answers of the teacher spell a control token of the student's tokenizer and were left out; "
            "prompts.control_tokens=parse takes them as they are"
        )
    responses = encode_responses(
        list(answered.values()),
        tokenizer,
        template,
        author="teacher",
        control_tokens=context.recipe.prompts.control_tokens,
        chat_options=text_options(context, tokenizer),
    )
    ends = frozenset(special_tokens(tokenizer))
    found: list[Response | None] = [None] * len(written)
    longer = 0
    for place, new in zip(answered, responses, strict=True):
        one = written[place]
        response = _cut(replace(new, sampling=one.sampling), one.cut, ends, section.max_new_tokens)
        longer += response.stop == "length" and not one.cut
        found[place] = response
    if longer:
        context.console.warn(
            f"{longer} answers have more than responses.max_new_tokens={section.max_new_tokens} of the student's "
            "tokens and were cut"
        )
    return found, {"left_out": spelled, "cut_for_student": longer}


def _cut(new: Response, cut: bool, ends: frozenset[int], most: int) -> Response:
    """A response without an end where the answer was cut, and no longer than the limit."""
    ids = new.response_ids
    if cut:
        while ids and ids[-1] in ends:
            ids = ids[:-1]
    stop = "length" if cut or len(ids) > most else "eos"
    return replace(new, response_ids=ids[:most], stop=stop)


def student_template(context: RunContext, tokenizer: Any, prompts: Iterable[Prompt]) -> TemplateName:
    """The template of the student's prompts."""
    return resolve_template(context.recipe.prompts.template, tokenizer, prompts)
