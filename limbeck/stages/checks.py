"""What is refused before any stage has worked: mistakes that can be seen without loading a model.

A wrong pair, objective or tracker would otherwise come to light after the teacher has sampled for hours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from limbeck import config
from limbeck.flow import DenseSignal, Head, LimbeckError, Signal
from limbeck.models.loading import load_tokenizer, source_config
from limbeck.models.sources import resolve
from limbeck.models.vocabulary import require_same
from limbeck.objectives import (
    AdaptiveTemperature,
    SparseForm,
    Temperature,
    TemperatureSchedule,
    fused_distillation_loss,
)
from limbeck.objectives.contrast import Beta
from limbeck.prompts.templates import resolve_template
from limbeck.recipe_sections import StudentSection, TeacherSection
from limbeck.stages.drafted import check_draft
from limbeck.stages.served import check_server
from limbeck.story import Story
from limbeck.student.adapters import LoraSpec, check_adapters
from limbeck.student.balance import Balance
from limbeck.student.blocks import pruned_config
from limbeck.student.build import StudentSpec, fresh_model
from limbeck.student.launch import require_trackers
from limbeck.student.loss import Judgement
from limbeck.student.schedules import moved


def temperature_of(recipe: config.Recipe) -> Temperature | TemperatureSchedule:
    """The loss temperature that a recipe asks for."""
    section = recipe.objective
    strength = section.temperature_adapt
    adapt = None if strength is None else AdaptiveTemperature(strength=strength)
    if section.temperature_end is not None:
        return TemperatureSchedule(
            start=section.temperature,
            end=section.temperature_end,
            shape=section.temperature_shape,
            scale=section.temperature_scale,
            adapt=adapt,
        )
    return Temperature(
        loss=section.temperature,
        teacher=section.teacher_temperature,
        student=section.student_temperature,
        scale=section.temperature_scale,
        adapt=adapt,
    )


def judgement_of(recipe: config.Recipe) -> Judgement:
    """Which objective for whose response, as a recipe says it."""
    own = recipe.contrast.student
    return Judgement(
        objective=config.build_objective(recipe),
        own=None if own is None else config.named_objective("contrast.student", own),
        rule=config.build_rule(recipe),
        authored=recipe.on_policy,
        support=recipe.signal.support,
    )


def balance_of(recipe: config.Recipe) -> Balance:
    """What each response counts, as a recipe says it."""
    contrast = recipe.contrast
    beta = None
    if contrast.beta != "none":
        beta = Beta(shape=contrast.beta, start=contrast.beta_start, end=contrast.beta_end)
    return Balance(reduction=recipe.train.reduction, beta=beta, scale=contrast.scale)


def student_spec(story: Story) -> StudentSpec:
    """The student that a recipe asks for."""
    section = story.recipe.student
    lora = section.lora
    return StudentSpec(
        init=section.init,
        model=section.model,
        revision=section.revision,
        layers=section.layers,
        keep=section.keep,
        config=section.config,
        dtype=section.dtype,
        attn_implementation=section.attn_implementation,
        trust_remote_code=story.student_trusted,
        freeze_embeddings=section.freeze_embeddings,
        lora=LoraSpec(**asdict(lora)) if lora else None,
        gradient_checkpointing=story.recipe.train.gradient_checkpointing,
        seed=story.recipe.train.seed,
    )


def check_responses(story: Story) -> None:
    """The teacher is a model, and the template is one that its tokenizer has.

    Raises:
        LimbeckError: no such teacher, or no such template.
    """
    section = story.recipe.teacher
    _resolvable(section)
    window = story.window
    if window is not None and window <= story.recipe.responses.max_new_tokens:
        raise LimbeckError(
            f"responses.max_new_tokens is {story.recipe.responses.max_new_tokens} and the window of the pair {window} "
            "tokens, so no prompt fits; lower it"
        )
    if story.recipe.prompts.template == "chat":
        tokenizer = load_tokenizer(
            section.model, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
        resolve_template("chat", tokenizer, ())
    check_server(story)
    check_draft(story)


def check_student(story: Story) -> None:
    """The student can be made and speaks the teacher's tokens; objective and trackers exist.

    Raises:
        LimbeckError: anything else.
    """
    _check_objective(story)
    require_trackers(story.recipe.train.report_to)
    section = story.recipe.student
    if section.model is not None and section.init != "scratch":
        _resolvable(section)
    if story.student_card is not None:
        require_same(story.teacher_card, story.student_card)
    _check_anatomy(story)


def _resolvable(section: TeacherSection | StudentSection) -> None:
    assert section.model is not None
    # Of a model that is not here yet only the small files: the weights are fetched when a stage needs them.
    resolve(
        section.model,
        revision=section.revision,
        weights=Path(section.model).expanduser().exists(),
        trust_remote_code=section.trust_remote_code,
    )


def _check_objective(story: Story) -> None:
    """Let the objective judge three tokens: whatever it cannot be combined with, it says now."""
    recipe, generator = story.recipe, torch.Generator().manual_seed(0)
    tokens, width, vocabulary = 3, 4, 7
    student_ND, teacher_ND = torch.randn(2, tokens, width, generator=generator)
    head = Head(weight_VD=torch.randn(vocabulary, width, generator=generator), vocab_size=vocabulary)
    signal: Signal = DenseSignal(hidden_ND=teacher_ND, head=head)
    form = sparse_form(recipe)
    if form is not None:
        real_ids = story.teacher_card.vocab_size
        if form.support != "sampled" and form.k > real_ids:
            raise LimbeckError(f"signal.k is {form.k}, but the teacher has {real_ids} tokens; lower it")
        signal = replace(form, k=min(form.k, vocabulary)).of(signal, seed=0)
    for progress in (0.0, 1.0):
        fused_distillation_loss(
            student_ND,
            head,
            signal,
            config.build_objective(recipe),
            temperature=temperature_of(recipe).at(progress),
            support=recipe.signal.support,
            label_N=torch.arange(tokens),
            sequence_N=torch.zeros(tokens, dtype=torch.int64),
            token_options={
                name: torch.full((tokens,), value) for name, value in moved(recipe.objective.schedule, progress).items()
            },
            compile="off",
        )


def sparse_form(recipe: config.Recipe) -> SparseForm | None:
    """What is kept of the teacher at each position; None where that is everything."""
    section = recipe.signal
    if section.support == "full":
        return None
    return SparseForm(support=section.support, k=section.k, temperatures=config.signal_temperatures(recipe))


def _check_anatomy(story: Story) -> None:
    """Depth, configuration and adapters of the student against what the model it begins as has."""
    spec = student_spec(story)
    section = story.recipe.student if spec.model is not None else story.recipe.teacher
    assert section.model is not None
    source = resolve(section.model, revision=section.revision, weights=False, trust_remote_code=spec.trust_remote_code)
    there = source_config(source, trust_remote_code=spec.trust_remote_code)
    if spec.init == "depth_prune":
        kept = _kept_blocks(spec, section.model, there.get_text_config().num_hidden_layers)
        there = pruned_config(there, kept)
    if spec.init == "scratch" or spec.lora is not None:
        with torch.device("meta"):
            model = fresh_model(there, spec)
        if spec.lora is not None:
            check_adapters(model, spec.lora)


def _kept_blocks(spec: StudentSpec, name: str, depth: int) -> Sequence[int]:
    """Numbers of the blocks to keep; any as many where they are still to be measured."""
    if spec.layers is not None and not 2 <= spec.layers < depth:
        raise LimbeckError(f"student.layers is {spec.layers}; {name} has {depth} blocks, so expected 2 to {depth - 1}")
    if spec.keep and list(spec.keep) != sorted(set(spec.keep) & set(range(depth))):
        raise LimbeckError(
            f"student.keep is {list(spec.keep)}; {name} has {depth} blocks, so expected ascending numbers from 0 "
            f"to {depth - 1}"
        )
    return spec.keep or range(spec.layers or depth)
