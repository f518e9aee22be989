"""Memory of a rank in each stage, term by term, by closed formulas.

On a device the terms are tensors at the moment of the peak. On this machine's processor they are the resident memory of
the process: what its libraries take, pages of files that it reads, and what its allocator keeps count too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from limbeck.evaluation.groups.rouge import RougeGroup
from limbeck.pipeline.capturing import SCORING_BATCH_SIZE
from limbeck.pipeline.plan.case import Case
from limbeck.pipeline.plan.evaluation_memory import evaluation_terms
from limbeck.pipeline.plan.shared_terms import loss_bytes, sampling_terms
from limbeck.pipeline.plan.sizes import BYTES, ModelSize
from limbeck.pipeline.self_teaching import under_adapters
from limbeck.rollouts.engines import InProcess

# Of a device's memory: what CUDA takes.
CONTEXT_BYTES = 700 << 20
# Of each weight on a grid: two float32 numbers for the 32 of a block.
GRID_BYTES = 2 * 4 / 32
# Of a process on a CPU: the libraries of a run, of which each stage imports more; what has written answers; ROUGE.
LIBRARY_BYTES = {"respond": 550 << 20, "teach": 550 << 20, "train": 575 << 20, "evaluate": 580 << 20}
WRITING_BYTES, ROUGE_BYTES = 41 << 20, 34 << 20


@dataclass(frozen=True, kw_only=True)
class Term:
    """One of the things that take memory."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Memory of a rank at the peak of a stage."""

    stage: str
    terms: tuple[Term, ...]

    @property
    def bytes(self) -> int:
        return sum(term.bytes for term in self.terms)


def memory_of(case: Case) -> list[StageMemory]:
    """Memory of a rank in each stage that loads a model."""
    stages = {
        "respond": _respond(case),
        "teach": _teach(case),
        "train": _train(case),
        "evaluate": evaluation_terms(case),
    }
    found = []
    for stage, terms in stages.items():
        kept = [Term(name=name, bytes=int(size)) for name, size in terms if size]
        if kept:
            found.append(StageMemory(stage=stage, terms=(_process(case, stage), *kept)))
    return found


def peak(case: Case) -> StageMemory:
    """The stage that takes most."""
    return max(memory_of(case), key=lambda stage: stage.bytes)


def least(case: Case) -> int:
    """Bytes without which a rank cannot train: weights, gradients and moments, whatever else there is."""
    student, shards, quantize = case.student, case.ranks if case.sharded else 1, case.recipe.student.quantize
    # Weights that stay as they are may be kept in few bits.
    held = student.adapters if quantize is not None and quantize.weights == "frozen" else student.held
    return int(((held + student.trained) * student.number_bytes + state_bytes(case)) // shards)


def state_bytes(case: Case) -> float:
    """Bytes that the optimizer keeps of all trained weights."""
    student = case.student
    return case.recipe.train.optim.state_bytes(student.trained, student.number_bytes, student.model.width)


def _process(case: Case, stage: str) -> Term:
    if case.fleet.device.host:
        groups = case.recipe.evaluate.groups.values() if stage == "evaluate" else ()
        writes = _answers_here(case) or any("prompts" in group.needs() for group in groups)
        rouge = any(isinstance(group, RougeGroup) for group in groups)
        return Term(name="process", bytes=LIBRARY_BYTES[stage] + WRITING_BYTES * writes + ROUGE_BYTES * rouge)
    return Term(name="context", bytes=CONTEXT_BYTES)


def _teacher_answers(case: Case) -> bool:
    """Whether the teacher writes answers in this process before the training."""
    recipe = case.recipe
    return recipe.base_author != "data" and recipe.responses.server is None and case.writes_here


def _student_answers(case: Case) -> bool:
    """Whether the student writes answers in this process while it trains."""
    return case.steps.written > 0 and isinstance(case.recipe.responses.engine, InProcess)


def _answers_here(case: Case) -> bool:
    return _teacher_answers(case) or _student_answers(case)


def _respond(case: Case) -> Iterator[tuple[str, float]]:
    recipe = case.recipe
    if not _teacher_answers(case):
        return
    assert case.teacher is not None, "a teacher in this process has a configuration"
    yield "teacher", case.teacher_held
    yield from sampling_terms(case, case.teacher, BYTES[recipe.teacher.dtype], recipe.responses.batch_size)
    if case.fleet.device.host and case.where == "in_process":
        yield "file of weights", case.teacher.parameters * 2


def _teach(case: Case) -> Iterator[tuple[str, float]]:
    if not case.stores_signal or case.captures or case.teacher is None:
        return
    if case.here:
        yield "teacher", case.teacher_held
        positions = SCORING_BATCH_SIZE * max(case.work.train.longest, case.work.heldout.longest)
        yield "activations", _one_block(case.teacher, BYTES[case.recipe.teacher.dtype]) * positions
    elif case.where == "server":
        yield "teacher's head", case.head_bytes


def _train(case: Case) -> Iterator[tuple[str, float]]:
    student = case.student
    shards = case.ranks if case.sharded else 1
    number = student.number_bytes
    yield "parameters", student.held * number / shards
    yield "gradients", student.trained * number / shards
    yield "optimizer", state_bytes(case) / shards
    yield "gathered", _gathered(case)
    yield "rounded weights", _rounded(case)
    yield "activations", activation_bytes(case, batch_positions(case))
    yield "loss", loss_bytes(case)
    yield from _teacher_in_training(case)
    if _student_answers(case):
        yield from sampling_terms(case, student.model, number, case.written_at_once)


def _teacher_in_training(case: Case) -> Iterator[tuple[str, float]]:
    """What of the teacher is in memory while the student trains."""
    recipe = case.recipe
    if not case.reads_teacher or case.teacher is None:
        return
    if case.asks_teacher and case.here:
        yield "teacher", _beside_student(case)
        yield "teacher's activations", _one_block(case.teacher, BYTES[recipe.teacher.dtype]) * batch_positions(case)
    elif recipe.teacher.support == "full":
        yield "teacher's head", case.head_bytes
    if case.fleet.device.host and case.stores_signal:
        # Shards are read through the page cache, which counts for the process.
        yield "pages of the signal", case.work.tokens * case.signal_bytes[0]


def _beside_student(case: Case) -> int:
    """Bytes of the teacher's weights beside those of the student that trains; a teacher made of the student shares."""
    student, recipe = case.student, case.recipe
    if recipe.teacher.model == "live" or under_adapters(recipe):
        return 0
    if recipe.teacher.model == "ema":
        # The average is in float32: the teacher's own weights where they are that, beside them where they are not.
        return student.trained * (4 if student.number_bytes == 4 else 4 + student.number_bytes)
    return case.teacher_held


def batch_positions(case: Case) -> int:
    """Positions of the largest micro-batch, padding included; a row that is longer than the limit is alone."""
    train, longest = case.recipe.train, case.work.train.longest
    whole = train.per_device_train_batch_size * longest
    if train.max_tokens_per_batch is None:
        return whole
    # The rows of a step are cut anew, so that the limit alone bounds a micro-batch.
    return max(longest, min(whole * train.gradient_accumulation_steps, train.max_tokens_per_batch))


def _gathered(case: Case) -> float:
    """What a sharded student has whole for a while: the root, two blocks, and the gradients of one and the root."""
    if not case.sharded:
        narrow = case.recipe.train.bf16 and case.student.number_bytes == 4
        # Autocast keeps a copy of each weight that it has rounded until the backward pass is over.
        return 2 * case.student.model.linears if narrow else 0
    model, number = case.student.model, case.student.number_bytes
    inside = 2 if case.recipe.train.bf16 else number
    root = model.outside * number
    trains = case.student.trained >= model.parameters - model.embeddings
    gradients = (model.block * inside + model.outside * number * case.student.head_trained) if trains else 0
    return root + 2 * model.block * inside + gradients


def _rounded(case: Case) -> float:
    """Weights on their grid beside the floats that are trained, and the grids; of what is sharded the grids alone."""
    quantize, student = case.recipe.student.quantize, case.student
    if quantize is None or quantize.weights == "frozen":
        return 0
    weights = student.model.parameters - (student.model.embeddings if quantize.embeddings is None else 0)
    return weights * (GRID_BYTES + (0 if case.sharded else student.number_bytes))


def activation_bytes(case: Case, positions: int) -> float:
    """Bytes that the forward pass keeps for the backward pass of so many positions."""
    model, number = case.student.model, case.student.number_bytes
    inside = 2 if case.recipe.train.bf16 else number
    per_block = _kept_of_block(model, number, inside)
    ends = 3 * model.width * number
    if case.recipe.train.gradient_checkpointing:
        return positions * (model.blocks * model.width * number + per_block + ends)
    return positions * (model.blocks * per_block + ends)


def _kept_of_block(model: ModelSize, number: int, inside: int) -> float:
    """Bytes that a block keeps of each position: inputs of its norms, products, activations and attention.

    Where products run in fewer bits than the weights have, each linear layer keeps a rounded input of its own.
    """
    D, Q, K, F = model.width, model.query, model.key, model.mlp
    if inside == number:
        return number * (6 * D + 2 * Q + 2 * (K if K == Q else Q) + 4 * F)
    return number * 4 * D + inside * (5 * D + 2 * Q + 2 * Q + 4 * F)


def _one_block(model: ModelSize, number: int) -> int:
    """Bytes of each position in the largest block of a forward pass that keeps nothing."""
    return number * (4 * model.width + 2 * model.query + 3 * model.mlp)
