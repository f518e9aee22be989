"""Builds the loss from a recipe: temperature, objectives, rule and weights, with a trial on three tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from limbeck.objectives import (
    OBJECTIVES,
    AdaptiveTemperature,
    SparseForm,
    Temperature,
    TemperatureSchedule,
    fused_distillation_loss,
)
from limbeck.objectives.sequence.distillm2 import Beta
from limbeck.objectives.sums import AnyObjective, row_leaves
from limbeck.pipeline.context import RunContext
from limbeck.recipe import load
from limbeck.recipe.sections import SftSection
from limbeck.training.loss import LossPlan
from limbeck.training.schedules import moved
from limbeck.training.weighting import TokenWeighting
from limbeck.types import DenseSignal, Head, LimbeckError, SharedSignal, Signal, Support


def temperature_of(recipe: load.Recipe) -> Temperature | TemperatureSchedule:
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


def loss_plan_of(recipe: load.Recipe) -> LossPlan:
    """The objective of each author's responses, from a recipe."""
    own = recipe.contrast.student
    return LossPlan(
        objective=load.objective_of(recipe),
        student_objective=None if own is None else load.named_objective("contrast.student", own),
        rule=load.rule_of(recipe),
        authored=recipe.on_policy,
        support=_support_of(recipe),
        sorted_weight=_sorted_weight_of(recipe),
    )


def _sorted_weight_of(recipe: load.Recipe) -> float:
    """Weight of what only one of two models with other tokens has, compared by rank."""
    return 0.0 if recipe.teacher.across is None else recipe.teacher.across.sorted_weight


def _support_of(recipe: load.Recipe) -> Support:
    """Where student and teacher are compared."""
    across = recipe.teacher.across
    if across is None:
        return recipe.teacher.support
    return "shared_tail" if across.outside == "tail" else "shared_renorm"


def sft_loss_plan(recipe: load.Recipe, section: SftSection) -> LossPlan:
    """The objective of the first stage. Teacher signals of the data's answers are not stored, so their support is
    full."""
    sparse = recipe.teacher.across is None and recipe.sft_on_data
    support = "full" if sparse else _support_of(recipe)
    return LossPlan(objective=load.named_objective("sft.objective", section.objective), support=support)


def trial_loss_plan(recipe: load.Recipe) -> LossPlan:
    """The objective that the learning rate is searched with before a first stage, on responses written before training.

    Objectives that push sampled tokens say nothing on the text of others; reverse KL, which they estimate, stands for
    them there. What a rule says of whole responses is left out.
    """
    loss_plan = loss_plan_of(recipe)
    alone = replace(loss_plan, student_objective=None, rule=None, authored=False)
    return (
        replace(alone, objective=load.named_objective("objective", {"name": "rkl"})) if alone.pushes_samples else alone
    )


def token_weighting_of(recipe: load.Recipe) -> TokenWeighting:
    """The weights of responses, from a recipe."""
    contrast = recipe.contrast
    beta = None
    if contrast.beta != "none":
        beta = Beta(shape=contrast.beta, start=contrast.beta_start, end=contrast.beta_end)
    return TokenWeighting(reduction=recipe.train.reduction, beta=beta, scale=contrast.scale)


def sparse_form(recipe: load.Recipe) -> SparseForm | None:
    """Form in which the teacher's distribution is kept at each position; None where all of it is."""
    section = recipe.teacher
    if section.support == "full":
        return None
    return SparseForm(support=section.support, k=section.support_k, temperatures=load.signal_temperatures(recipe))


def check_objectives(context: RunContext) -> None:
    """Compute each objective on three tokens, so that options that do not go together are refused before training.

    Raises:
        LimbeckError: an objective cannot be computed with this recipe.
    """
    recipe, loss_plan = context.recipe, loss_plan_of(context.recipe)
    form = sparse_form(recipe)
    if form is not None and form.support != "sampled" and recipe.teacher.kept > context.teacher_card.vocab_size:
        chosen = f" and teacher.student_k {recipe.teacher.student_k}" if recipe.teacher.student_k else ""
        raise LimbeckError(
            f"teacher.support_k is {form.k}{chosen}, but the teacher has {context.teacher_card.vocab_size} tokens; "
            "lower it"
        )
    _check_rule(loss_plan)
    for progress in (0.0, 1.0):
        temperature, options = temperature_of(recipe).at(progress), moved(recipe.objective.schedule, progress)
        _try(loss_plan, loss_plan.objective, form, temperature, options)
        if loss_plan.student_objective is not None:
            with load.at("contrast.student"):
                _try(loss_plan, loss_plan.student_objective, form, temperature, options)
    if recipe.sft is not None:
        with load.at("sft.objective"):
            sft = sft_loss_plan(recipe, recipe.sft)
            _try(sft, sft.objective, None if recipe.sft_on_data else form, Temperature(), {})


def _check_rule(loss_plan: LossPlan) -> None:
    """Check that an objective has the token option that the rule sets."""
    rule = loss_plan.rule
    if rule is None or rule.option is None:
        return
    if any(rule.option in part.token_fields for o in loss_plan.objectives for _, part in row_leaves(o)):
        return
    fields = {name: getattr(objective, "token_fields", ()) for name, objective in OBJECTIVES.items()}
    listen = [name for name, known in fields.items() if isinstance(known, frozenset) and rule.option in known]
    raise LimbeckError(
        f"contrast.rule={rule.name} sets {rule.option} for each token, but objective {loss_plan.objective.name!r} has "
        f"none; set objective.name to one of {', '.join(listen)}"
    )


def _try(
    loss_plan: LossPlan,
    objective: AnyObjective,
    form: SparseForm | None,
    temperature: Temperature,
    options: Mapping[str, float],
) -> None:
    """Compute one objective on three tokens of a vocabulary of seven."""
    generator = torch.Generator().manual_seed(0)
    tokens, width, vocabulary = 3, 4, 7
    student_ND, teacher_ND = torch.randn(2, tokens, width, generator=generator)
    head = Head(weight_VD=torch.randn(vocabulary, width, generator=generator), vocab_size=vocabulary)
    dense = DenseSignal(hidden_ND=teacher_ND, head=head)
    signal: Signal = dense
    if loss_plan.support in ("shared_tail", "shared_renorm"):
        # Five of the seven are shared.
        signal = SharedSignal(
            hidden_ND=teacher_ND, head=head, student_ids_S=torch.arange(5), aligned_N=torch.ones(tokens).bool()
        )
    if form is not None:
        signal = replace(form, k=min(form.k, vocabulary)).of(dense, seed=0)
    option = None if loss_plan.rule is None else loss_plan.rule.option
    # A value that every option may have.
    token_options = {} if option is None else {option: 0.5}
    fused_distillation_loss(
        student_ND,
        head,
        signal,
        objective,
        temperature=temperature,
        support=loss_plan.support,
        label_N=torch.arange(tokens),
        sequence_N=torch.zeros(tokens, dtype=torch.int64),
        token_options=loss_plan.options_for(
            objective, {name: torch.full((tokens,), value) for name, value in {**options, **token_options}.items()}
        ),
        compile="off",
    )
