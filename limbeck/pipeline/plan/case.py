"""The run that is planned: a recipe, the sizes of its models, its texts, and the devices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from limbeck.models.devices import Fleet
from limbeck.models.few_bits import FORMATS
from limbeck.models.image_features import vision_tower
from limbeck.models.loading import source_config
from limbeck.models.placing import passing_bytes
from limbeck.models.processors import reads_images
from limbeck.models.sources import resolve
from limbeck.pipeline.build import loss_plan_of, sft_loss_plan
from limbeck.pipeline.checks import kept_blocks, student_spec
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.initial_student import is_written_first
from limbeck.pipeline.plan.sizes import BYTES, ModelSize, StudentSize, adapters_of, size_of
from limbeck.pipeline.plan.workload import Steps, Workload, steps_of
from limbeck.pipeline.sampled_responses import may_capture
from limbeck.pipeline.stages.respond import answered_before_training
from limbeck.pipeline.store_identity import exact_codec
from limbeck.recipe.load import Recipe, signal_temperatures
from limbeck.recipe.teacher import ITSELF, WHERE
from limbeck.student.blocks import pruned_config
from limbeck.student.build import StudentSpec, freeze_embeddings, fresh_model
from limbeck.student.width import width_config
from limbeck.teachers.placed import Placed
from limbeck.teachers.store.base import Codec, Frame, bytes_per_token
from limbeck.teachers.store.dense import Hidden

# Of a device's memory: what CUDA's libraries and fragments of freed tensors take.
RESERVED_SHARE = 0.06


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run on some devices.

    Attributes:
        teacher: the largest one; None where nothing of it is known, as of a hosted one.
        where: name of its location.
        sharded: whether the student is sharded over the ranks.
        written_first: whether ranks read their parts of a sharded student from files that the first rank writes.
    """

    recipe: Recipe
    student: StudentSize
    teacher: ModelSize | None
    work: Workload
    fleet: Fleet
    where: str
    sharded: bool
    written_first: bool = False

    @property
    def ranks(self) -> int:
        return self.fleet.count

    @property
    def usable(self) -> int:
        """Bytes that weights and all else of a rank may take together."""
        share = 1.0 if self.fleet.device.host else 1 - RESERVED_SHARE
        return int(self.fleet.memory * share)

    @cached_property
    def steps(self) -> Steps:
        return steps_of(self.recipe, self.work, self.ranks)

    @property
    def frame(self) -> Frame:
        width = 0 if self.teacher is None else self.teacher.width
        return Frame(
            vocab_size=self.student.model.vocabulary if self.teacher is None else self.teacher.vocabulary,
            width=width,
            temperatures=signal_temperatures(self.recipe),
        )

    @property
    def codecs(self) -> tuple[Codec, Codec]:
        """Of the signals of training responses, and of held-out ones."""
        codec = exact_codec(self.recipe)
        says_all = self.teacher is not None and (self.here or self.where in ("server", "store"))
        return codec, Hidden(dtype=self.recipe.teacher.kept_dtype) if says_all else codec

    @property
    def signal_bytes(self) -> tuple[int, int]:
        """Bytes per token of the two."""
        train, heldout = (bytes_per_token(codec, self.frame) for codec in self.codecs)
        return train, heldout

    @property
    def teacher_bytes(self) -> int:
        """Bytes of the teacher's weights, as it runs."""
        teacher, section = self.teacher, self.recipe.teacher
        if teacher is None:
            return 0
        rounded, number = 0 if section.bits is None else teacher.linears, BYTES[section.dtype]
        few = 0 if section.bits is None else FORMATS[section.bits].bytes
        return int(rounded * few) + (teacher.parameters - rounded) * number

    @property
    def here(self) -> bool:
        """Whether the teacher computes in the processes of the run."""
        return self.where in ("in_process", "placed", "sharded")

    @property
    def writes_here(self) -> bool:
        """Whether the teacher can write in the processes of the run."""
        return self.where in ("in_process", "placed")

    @property
    def teacher_ranks(self) -> int:
        """Ranks that write and score with the teacher before training; a placed one is that of one rank."""
        return 1 if self.where == "placed" else self.ranks

    @property
    def teacher_held(self) -> int:
        """Bytes of the teacher's weights on a rank, two blocks that are gathered or read for a while included."""
        if self.teacher is None or self.where not in ("placed", "sharded"):
            return self.teacher_bytes if self.here else 0
        number = BYTES[self.recipe.teacher.dtype]
        outside, block = self.teacher.outside * number, self.teacher.block * number
        inside = self.teacher_bytes - outside
        if self.where == "sharded":
            return outside + inside // self.ranks + 2 * block * (self.ranks > 1)
        where = self.recipe.teacher.where
        given = where.most("cpu" if self.fleet.device.host else "cuda:0") if isinstance(where, Placed) else None
        if given is None:
            given = self.usable
            given -= passing_bytes(given, block) if self.teacher_bytes > given else 0
        return outside + min(inside, max(given - outside, 0) + block)

    @property
    def head_bytes(self) -> int:
        """Bytes of the teacher's head, which whole distributions need beside their hidden states."""
        return 0 if self.teacher is None else self.teacher.head * BYTES[self.recipe.teacher.dtype]

    @property
    def reads_teacher(self) -> bool:
        """Whether the training compares the student with the teacher."""
        return self.recipe.on_policy or loss_plan_of(self.recipe).needs_teacher

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher scores texts while the student trains."""
        recipe = self.recipe
        first = recipe.sft is not None and recipe.sft_on_data and sft_loss_plan(recipe, recipe.sft).needs_teacher
        return recipe.on_policy or first or (self.reads_teacher and not recipe.teacher.keeps_whole)

    @property
    def stores_signal(self) -> bool:
        """Whether the run keeps what the teacher says on disk."""
        return self.recipe.teacher.cache and (self.here or self.where in ("server", "api"))

    @property
    def captures(self) -> bool:
        """Whether the signal is kept while the teacher writes."""
        return self.writes_here and may_capture(self.recipe)

    @property
    def answered(self) -> int:
        """Training prompts that are answered before training."""
        return answered_before_training(self.recipe, self.work.train.count)

    @property
    def written_at_once(self) -> int:
        """Answers that the student writes together on a rank while it trains."""
        source, steps = self.recipe.responses.source, self.steps
        round_steps = getattr(source, "round_steps", 1)
        share = max(round(steps.written / max(steps.main, 1) / self.ranks), 1)
        # An epoch of answers, where a round is one.
        rows = self.work.train.count if round_steps is None else share * round_steps
        return max(min(self.recipe.responses.batch_size, rows), 1)

    def at(self, **changes: Any) -> Case:
        """The case with other values; `recipe__section__key` is a key of the recipe."""
        recipe = self.recipe
        for name in [name for name in changes if name.startswith("recipe__")]:
            _, section, key = name.split("__")
            recipe = replace(recipe, **{section: replace(getattr(recipe, section), **{key: changes.pop(name)})})
        return replace(self, recipe=recipe, **changes)


def case_of(context: RunContext, work: Workload, fleet: Fleet) -> Case:
    """The case of a recipe whose models can be found; of them no weights are read.

    Raises:
        LimbeckError: a model that is not here and cannot be fetched.
    """
    recipe = context.recipe
    where = WHERE.name_of(recipe.teacher.where)
    return Case(
        recipe=recipe,
        student=context.student_size,
        teacher=largest_teacher(context),
        work=work,
        fleet=fleet,
        where=where,
        sharded=fleet.count > 1 and (recipe.train.sharding == "full" or context.launch.fsdp2),
        written_first=fleet.count > 1 and is_written_first(context),
    )


def student_size(context: RunContext) -> StudentSize:
    """The size of a recipe's student."""
    spec = student_spec(context)
    section = context.recipe.student if spec.model is not None else context.recipe.teacher
    assert section.model is not None, "a teacher has a model"
    source = resolve(section.model, revision=section.revision, weights=False, trust_remote_code=spec.trust_remote_code)
    return student_size_of(source_config(source, trust_remote_code=spec.trust_remote_code), spec, section.model)


def student_config(config: Any, spec: StudentSpec, name: str) -> Any:
    """The configuration of a student that is cut out of a model of this one.

    Args:
        name: of that model, for messages.

    Raises:
        LimbeckError: it has no such blocks, or too few.
    """
    if spec.layers is not None or spec.keep:
        config = pruned_config(config, kept_blocks(spec, name, config.get_text_config().num_hidden_layers))
    return config if spec.width is None else width_config(config, spec.width)


def student_size_of(config: Any, spec: StudentSpec, name: str) -> StudentSize:
    """The size of a student that starts from a model of this configuration and name."""
    config = student_config(config, spec, name)
    with torch.device("meta"):
        model = fresh_model(config, spec)
    size = size_of(model)
    if spec.freeze_embeddings:
        freeze_embeddings(model)
    if reads_images(config):
        vision_tower(model).requires_grad_(not spec.freeze_vision)
    adapters = 0 if spec.lora is None else adapters_of(model, spec.lora)
    trained = adapters if spec.lora is not None else sum(p.numel() for p in model.parameters() if p.requires_grad)
    return StudentSize(model=size, trained=trained, adapters=adapters, number_bytes=BYTES[spec.dtype])


def largest_teacher(context: RunContext) -> ModelSize | None:
    """The size of the largest of a run's teachers; None where nothing is known of them."""
    members = context.run_teachers.values() if context.run_teachers else (context.run_teacher,)
    if context.recipe.teacher.model in ITSELF:
        return context.student_size.model
    known = [member.skeleton for member in members if member.size is not None]
    return max((size_of(model) for model in known), key=lambda size: size.parameters, default=None)
