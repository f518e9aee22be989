"""The fused loss: hidden states and heads in, values and gradients out, one tile of logits at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.objectives.base import Objective, SequenceMeasuring
from limbeck.objectives.fused.body import Body, Compile, resolve_compile
from limbeck.objectives.fused.inputs import label_columns, option_columns, token_columns, token_weights, weighted
from limbeck.objectives.fused.projection import LogitTransform, Projection, gather_head, prepare_projection
from limbeck.objectives.fused.tile_pass import Grads, Pass, Wanted
from limbeck.objectives.fused.tiles import check_pair, plan_tiles
from limbeck.objectives.hidden_matching import HiddenPair, projected
from limbeck.objectives.sequence.difficulty import token_difficulty
from limbeck.objectives.sums import AnyObjective, WeightedSum, hidden_leaves, nested, part_names, row_leaves
from limbeck.objectives.support import resolve_support, shared_columns
from limbeck.objectives.temperature import Temperature
from limbeck.types import DenseSignal, Head, LimbeckError, SampledSignal, SharedSignal, Signal, Support


@dataclass(frozen=True, kw_only=True)
class FusedLoss:
    """Result of the fused loss.

    Attributes:
        loss: sum over tokens of weight times value, a scalar with gradient.
        value_N: the value of each token, the temperature's factor included, the weight not; detached.
        parts: the values (N,) of each part of a weighted sum by name, before its coefficient; detached.
        measures: with `measure`, by token and on the signal's support: the entropies of student and teacher at their
            temperatures; at temperature 1 the forward KL, `acceptance` (the probability that both share: 1 less the
            total variation) and `top1_agreement` (1 where both find the same token likeliest); with a top-k support
            also the share of the student's mass at its temperature that the kept tokens hold, and with a tail of the
            teacher's; detached.
    """

    loss: Tensor
    value_N: Tensor
    parts: Mapping[str, Tensor]
    measures: Mapping[str, Tensor]


def fused_distillation_loss(
    student_hidden_ND: Tensor,
    student_head: Head,
    signal: Signal | None,
    objective: AnyObjective,
    *,
    temperature: Temperature | None = None,
    support: Support | None = None,
    weight_N: Tensor | None = None,
    label_N: Tensor | None = None,
    sequence_N: Tensor | None = None,
    hidden_pairs: Sequence[HiddenPair] = (),
    token_options: Mapping[str, Tensor] | None = None,
    measure: bool = False,
    measure_labels: bool = False,
    tile_bytes: int | None = None,
    compile: Compile = "auto",
) -> FusedLoss:
    """The same as these lines (for forward KL), without ever holding N x V numbers:

        log_q_NV = (student_hidden_ND @ student_head.weight_VD.T / tau).log_softmax(-1)
        log_p_NV = (signal.hidden_ND @ signal.head.weight_VD.T / tau).log_softmax(-1)
        value_N = tau**2 * (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
        loss = (weight_N * value_N).sum()

    Each model is projected once; the gradients are made in closed form on the way, so that backward only multiplies
    them. Under `torch.no_grad` only the values are computed.

    Args:
        student_hidden_ND: the student's last hidden states at the N positions that count.
        student_head: its head. Nothing is computed for parts that do not require a gradient. A head sharded by FSDP2 is
            gathered once, its gradient scattered once and averaged over the ranks (as FSDP2 does).
        signal: of the teacher at the same positions: hidden states and head, its top-k tokens, or a sample. None where
            the objective reads no teacher. Of one with other tokens it must be aligned everywhere: see
            `aligned_distillation_loss`.
        objective: what compares the two, such as `ForwardKL()` or `build_objective("fkl")`.
        temperature: of the loss; None is 1.
        support: of a top-k signal, "topk_tail" (default) or "topk_renorm"; of a teacher with other tokens "shared_tail"
            (default) or "shared_renorm"; the other signals have one each.
        weight_N: weight of each token; None is 1/N. Normalise over the whole optimizer step here; a weight for each
            sequence is `weight_B[sequence_N]`.
        label_N: the token that followed each position, for objectives that read labels; -100 counts as zero.
        sequence_N: the sequence each token belongs to, int64 from 0, for objectives that measure whole sequences.
        hidden_pairs: states of chosen layers, for objectives that read hidden states; by default the last ones.
        token_options: options of the objective given a token, such as {"alpha": alpha_N} or {"skl.alpha": alpha_N}.
        measure: also measure entropies, and the forward KL, acceptance and agreement at temperature 1.
        measure_labels: then also `log_q` and `log_p`, the log-probabilities of the labels at temperature 1; for a
            dense signal.
        tile_bytes: budget of the logit buffers; None is 384 MiB on a CPU, 1280 MiB on a GPU.
        compile: "auto" compiles the elementwise work where a compiler exists and the vocabulary is large.

    Raises:
        LimbeckError: where shapes, vocabularies, dtypes or options disagree.
    """
    rows, hidden = tuple(row_leaves(objective)), tuple(hidden_leaves(objective))
    _check_inputs(objective, signal, label_N, measure, measure_labels)
    student_head = gather_head(student_head)
    if isinstance(signal, DenseSignal | SharedSignal):
        signal = replace(signal, head=gather_head(signal.head))
    student = prepare_projection(student_hidden_ND, student_head, "student")
    weight_N = token_weights(weight_N, student_hidden_ND.shape[0], student)
    loss, values, measured = weight_N.new_zeros(()), [], {}
    if token_options and not rows:
        raise LimbeckError(f"token option {next(iter(token_options))!r} is unknown to this objective: it has none")
    if rows:
        settings = _Settings(
            objective=WeightedSum(parts=rows),
            temperature=temperature or Temperature(),
            support=support,
            label_N=label_N,
            token_options=_sequence_options(rows, signal, sequence_N) | dict(token_options or {}),
            measure=measure,
            labels=measure and measure_labels,
            tile_bytes=tile_bytes,
            compile=compile,
        )
        loss, values, measured = _row_loss(student_hidden_ND, student_head, student, signal, weight_N, settings)
    if hidden:
        pairs = hidden_pairs or _last_hidden(student_hidden_ND, signal)
        for weight, part in hidden:
            value_N = torch.stack([part.value(*projected(pair, len(weight_N))) for pair in pairs]).mean(0)
            value_N = value_N.to(weight_N.dtype)
            loss = loss + weight * weighted(weight_N, value_N)
            values.append(value_N.detach())
    value_N = reduce(torch.add, (weight * value_N for (weight, _), value_N in zip(rows + hidden, values, strict=True)))
    parts = dict(zip(part_names(rows + hidden), values, strict=True))
    return FusedLoss(loss=loss, value_N=value_N, parts=parts, measures=measured)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Settings:
    """The options of the loss on rows; see `fused_distillation_loss`."""

    objective: WeightedSum
    temperature: Temperature
    support: Support | None
    label_N: Tensor | None
    token_options: Mapping[str, Tensor]
    measure: bool
    labels: bool
    tile_bytes: int | None
    compile: Compile


def _row_loss(
    hidden_ND: Tensor, head: Head, student: Projection, signal: Signal | None, weight_N: Tensor, settings: _Settings
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Loss, value of each part and measures of everything that sees rows of logits."""
    objective, tokens, device = settings.objective, hidden_ND.shape[0], hidden_ND.device
    chosen = settings.support
    if "teacher" not in objective.reads:
        # An objective that reads no teacher has no support either.
        signal = chosen = None
    temperature = _adapted(hidden_ND, head, signal, settings)
    for part in nested(objective):
        if isinstance(part, Objective):
            temperature.check(part)
    support = resolve_support(signal, chosen, objective, temperature)
    teacher, constants = None, {}
    if isinstance(signal, DenseSignal | SharedSignal):
        teacher = prepare_projection(signal.hidden_ND, signal.head, "teacher")
        shared = isinstance(signal, SharedSignal)
        check_pair(hidden_ND, student, signal.hidden_ND, teacher, one_vocabulary=not shared)
        constants = shared_columns(signal, student.vocab_size, teacher.vocab_size) if shared else {}
    columns = token_columns(student, weight_N, temperature, signal, support, objective)
    if "labels" in objective.reads or settings.labels:
        columns |= label_columns(settings.label_N, weight_N, student.vocab_size)
    columns |= option_columns(objective, settings.token_options, weight_N)
    wanted = _wanted(hidden_ND, head)
    body = Body(
        objective=objective,
        support=support,
        scale=temperature.scale,
        student_finish=student.finish,
        teacher_finish=LogitTransform() if teacher is None else teacher.finish,
        with_grad=any(wanted),
        measure=settings.measure,
        labels=settings.labels,
    )
    sides = [side for side in (student, teacher) if side is not None]
    buffers, widest = [side.weight_VD.dtype for side in sides], max(side.vocab_size for side in sides)
    whole = Pass(
        student=student,
        teacher=teacher,
        body=body,
        tiling=plan_tiles(tokens, widest, buffers, device, settings.tile_bytes),
        compiled=resolve_compile(settings.compile, student.vocab_size, device),
        constants=constants,
    )
    teacher_ND = signal.hidden_ND if isinstance(signal, DenseSignal | SharedSignal) else None
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        values_PN, grads = whole.run(hidden_ND, teacher_ND, columns, wanted, head)
    values = list(values_PN[: len(objective.parts)])
    loss = weighted(weight_N, reduce(torch.add, (w * v for (w, _), v in zip(objective.parts, values, strict=True))))
    if any(wanted):
        loss = _PrecomputedGrad.apply(hidden_ND, head.weight_VD, head.bias_V, loss, grads)
    measured = dict(zip(body.measures, values_PN[len(values) :], strict=True))
    return loss, values, measured


def _check_inputs(
    objective: AnyObjective, signal: Signal | None, label_N: Tensor | None, measure: bool, measure_labels: bool
) -> None:
    if "teacher" in objective.reads and signal is None:
        raise LimbeckError(f"objective {objective.name!r} reads a teacher: give its signal at the same positions")
    if "labels" in objective.reads and label_N is None:
        raise LimbeckError(
            f"objective {objective.name!r} reads labels: give label_N, the token that followed each position"
        )
    if isinstance(signal, SharedSignal) and not bool(signal.aligned_N.all()):
        raise LimbeckError(
            f"{int((~signal.aligned_N).sum())} of {len(signal.aligned_N)} positions are not aligned with the "
            "teacher's; leave them out (signal.rows), or use aligned_distillation_loss"
        )
    if measure and (isinstance(signal, SampledSignal) or "teacher" not in objective.reads):
        raise LimbeckError(
            "measure=True without a whole teacher row: entropies need a dense or top-k signal; set it to False"
        )
    if measure_labels and not (measure and label_N is not None and isinstance(signal, DenseSignal)):
        raise LimbeckError("measure_labels=True needs measure=True, label_N and a dense signal; set it to False")


def _adapted(hidden_ND: Tensor, head: Head, signal: Signal | None, settings: _Settings) -> Temperature:
    """The temperature of each token, where it adapts to them."""
    temperature = settings.temperature
    if temperature.adapt is None:
        return temperature
    if not isinstance(signal, DenseSignal):
        raise LimbeckError(
            "temperature adapt needs the teacher's hidden states: a sparse signal holds one grid of temperatures"
        )
    assert not isinstance(temperature.loss, Tensor), "the dataclass checks it"
    difficulty_N = token_difficulty(hidden_ND, head, signal, settings.tile_bytes)
    return Temperature(loss=temperature.adapt.tau(temperature.loss, difficulty_N), scale=temperature.scale)


def _sequence_options(
    rows: Sequence[tuple[float, Objective]], signal: Signal | None, sequence_N: Tensor | None
) -> dict[str, Tensor]:
    """Token options of parts that measure them over whole sequences."""
    options: dict[str, Tensor] = {}
    names = [part.name for _, part in rows]
    for part in (part for _, part in rows if isinstance(part, SequenceMeasuring) and part.per_sequence):
        said = f"{part.name} per_sequence=True"
        if names.count(part.name) > 1:
            raise LimbeckError(f"{said} beside another {part.name}: one weight per token cannot serve both; keep one")
        if isinstance(signal, SharedSignal):
            raise LimbeckError(
                f"{said} weighs by the teacher's whole rows, which other tokens leave out; set it to False"
            )
        if not isinstance(signal, DenseSignal):
            continue
        if sequence_N is None:
            raise LimbeckError(f"{said} weighs by sequence: give sequence_N, the sequence of each token")
        measured = part.sequence_options(signal, sequence_N)
        options |= {f"{part.name}.{option}": value_N for option, value_N in measured.items()}
    return options


def _last_hidden(student_ND: Tensor, signal: Signal | None) -> tuple[HiddenPair]:
    if not isinstance(signal, DenseSignal):
        raise LimbeckError(
            "objective 'hidden' without hidden states of the teacher: give hidden_pairs, or a dense signal"
        )
    return (HiddenPair(student_ND=student_ND, teacher_NE=signal.hidden_ND),)


def _wanted(hidden_ND: Tensor, head: Head) -> Wanted:
    """Which of hidden states, head weight and head bias need a gradient."""
    on = torch.is_grad_enabled()
    bias = head.bias_V is not None and head.bias_V.requires_grad
    return on and hidden_ND.requires_grad, on and head.weight_VD.requires_grad, on and bias


class _PrecomputedGrad(torch.autograd.Function):
    """Autograd function that returns gradients computed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, loss: Tensor, grads: Grads) -> Tensor:
        ctx.save_for_backward(grads.hidden_ND, grads.weight_VD, grads.bias_V)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        # Times one is itself: no copy of the head's gradient. (On a GPU the look at the number would cost more.)
        once = upstream.device.type == "cpu" and bool(upstream == 1)
        handed = [
            None if grad is None else grad.to(dtype) if once else _times(grad, upstream, dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *handed, None, None


def _times(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """The product, rounded once, without a copy in a wider dtype."""
    return torch.mul(grad, upstream, out=torch.empty_like(grad, dtype=dtype))
