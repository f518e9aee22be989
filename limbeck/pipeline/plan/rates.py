"""Speeds of a rank from a device's own figures.

They are assumptions, one constant each: shares of a device's figures that programs usually reach. What this machine
reaches a probe shows (`limbeck.pipeline.plan.probe`).
"""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.pipeline.plan.case import Case
from limbeck.pipeline.plan.sizes import BYTES, ModelSize

# Shares of a device's products that training and scoring reach, and of its memory's speed that writing reaches.
TRAINING_SHARE, SCORING_SHARE, READING_SHARE = 0.38, 0.5, 0.6
# Products in float32 are so much slower than those in bfloat16.
FLOAT32_SLOWDOWN = 15
# Seconds that a block takes at least for one token, written with transformers: its kernels are started one by one.
BLOCK_SECONDS = 0.9e-3
# Sequences that a server writes side by side on one of its devices, and the share of its products that it reaches.
SERVED_SEQUENCES, SERVED_SHARE = 256, 0.35
# GB per second of each device to another node, and of a shared disk to each node.
NODE_GB_S, DISK_GB_S = 50, 2.0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Tokens per second of one rank.

    Attributes:
        teacher_writes, student_writes: tokens of answers; 0 where it writes none here.
        teacher_scores, student_scores: ids of texts in a forward pass.
        trains: ids of texts in a forward and a backward pass, with the update.
        exchange_s: seconds that ranks need to exchange weights and gradients, see `exchange_seconds`.
        least_s: seconds of a micro-batch however small it is.
    """

    teacher_writes: float
    student_writes: float
    teacher_scores: float
    student_scores: float
    trains: float
    exchange_s: float = 0.0
    least_s: float = 0.0


def estimated(case: Case) -> Rates | None:
    """Rates from a device's figures; None where it has none, as this machine's processor."""
    device = case.fleet.device
    if not device.tflops:
        return None
    student, teacher = case.student, case.teacher
    sections, train = case.recipe.teacher, case.recipe.train
    inside = 2 if train.bf16 else student.number_bytes
    return Rates(
        teacher_writes=0 if teacher is None else _writes(case, teacher, BYTES[sections.dtype]),
        student_writes=_writes(case, student.model, student.number_bytes),
        teacher_scores=0
        if teacher is None
        else _products(case, BYTES[sections.dtype], SCORING_SHARE) / _flops(teacher),
        student_scores=_products(case, inside, SCORING_SHARE) / _flops(student.model),
        trains=_products(case, inside, TRAINING_SHARE) / (_flops(student.model) * _passes(case)),
        exchange_s=exchange_seconds(case),
        least_s=student.model.blocks * BLOCK_SECONDS * _passes(case),
    )


def _products(case: Case, number: int, share: float) -> float:
    """Operations per second in numbers of so many bytes."""
    return case.fleet.device.tflops * 1e12 * share / (FLOAT32_SLOWDOWN if number == 4 else 1)


def _flops(model: ModelSize) -> float:
    """Operations of a forward pass per token."""
    inside = model.parameters - model.embeddings
    return 2.0 * (inside + model.head)


def _passes(case: Case) -> float:
    """A forward and a backward pass in forward passes."""
    frozen = case.student.adapters > 0
    return (2 if frozen else 3) + case.recipe.train.gradient_checkpointing


def _writes(case: Case, model: ModelSize, number: int) -> float:
    """Tokens per second of transformers' models as limbeck runs them: a step of all rows reads all weights."""
    device, responses = case.fleet.device, case.recipe.responses
    context = case.work.train.longest or case.work.heldout.longest
    per_row = context * model.kv_bytes(number)
    rows = max(1, min(responses.batch_size, int(responses.cache_gib * 2**30 / max(per_row, 1))))
    reading = (model.parameters * number + rows * per_row) / (device.bandwidth_gb_s * 1e9 * READING_SHARE)
    return rows / max(reading, model.blocks * BLOCK_SECONDS)


def served_writes(case: Case, devices: int) -> float:
    """Tokens per second of a server of the teacher on so many devices."""
    model, device = case.teacher, case.fleet.device
    assert model is not None, "a served teacher has a configuration"
    number = BYTES["bfloat16"]
    context = case.work.train.mean or case.work.heldout.mean
    kept = SERVED_SEQUENCES * devices * context * model.kv_bytes(number)
    step = (model.parameters * number + kept) / (device.bandwidth_gb_s * 1e9 * READING_SHARE * devices)
    products = device.tflops * 1e12 * SERVED_SHARE * devices / _flops(model)
    return min(SERVED_SEQUENCES * devices / step, products)


def served_scores(case: Case, devices: int) -> float:
    """Ids per second that a server of the teacher scores on so many devices."""
    assert case.teacher is not None, "a served teacher has a configuration"
    return case.fleet.device.tflops * 1e12 * SERVED_SHARE * devices / _flops(case.teacher)


def exchange_seconds(case: Case) -> float:
    """Seconds that the ranks exchange weights and gradients for a micro-batch; for a step where nothing is sharded."""
    if case.ranks == 1 or not case.fleet.device.link_gb_s:
        return 0.0
    student, share = case.student, (case.ranks - 1) / case.ranks
    inside = 2 if case.recipe.train.bf16 else student.number_bytes
    link = NODE_GB_S if case.fleet.nodes > 1 else case.fleet.device.link_gb_s
    if case.sharded:
        # Weights are gathered for both passes, gradients scattered in float32.
        moved = 2 * student.held * inside + student.trained * 4
    else:
        moved = 2 * student.trained * student.number_bytes
    return moved * share / (link * 1e9)
