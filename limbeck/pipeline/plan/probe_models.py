"""The models of a recipe for a probe: its own where they are here, else of the same shape with random weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from limbeck.models.loading import source_config, source_tokenizer
from limbeck.models.sources import resolve
from limbeck.models.vision import bind_images
from limbeck.pipeline.checks import student_spec
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.plan.budget import Budget
from limbeck.pipeline.plan.case import student_config
from limbeck.runtime.errors import explain
from limbeck.student.build import PRUNED, StudentSpec, build_student, freeze_parts, fresh_model, with_trained_parts
from limbeck.student.quantizing import quantized
from limbeck.types import LimbeckError


@dataclass
class ProbedModels:
    """The models of a recipe, loaded one after the other.

    Attributes:
        seconds: what loading each of them took, by name.
        notes: what was taken instead of a model that is not here.
    """

    context: RunContext
    budget: Budget
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def teacher(self) -> tuple[Any, Any]:
        """The teacher and its tokenizer."""
        section = self.context.recipe.teacher_source
        with self.budget.load(self.seconds, "teacher"):
            try:
                loaded = self.context.teacher.writing()
                return loaded.model, loaded.tokenizer
            except LimbeckError as error:
                self.notes.append(f"the teacher has random weights in the probe: {error}")
                return self._random(section), self.context.teacher.tokenizer

    def _random(self, section: Any) -> Any:
        source = resolve(section.model, revision=section.revision, weights=False)
        spec = StudentSpec(init="scratch", dtype=section.dtype, attn_implementation=section.attn_implementation)
        model = fresh_model(source_config(source, trust_remote_code=section.trust_remote_code), spec)
        return model.to(self.context.device).eval()  # type: ignore[arg-type]

    def student(self) -> tuple[Any, Any]:
        """The student as it is trained, and its tokenizer.

        Which blocks of a pruned one stay is not measured: the first ones do as well for the time.
        """
        spec = student_spec(self.context)
        with self.budget.load(self.seconds, "student"):
            try:
                model, tokenizer = self._built(spec)
            except LimbeckError as error:
                self.notes.append(f"the student has random weights in the probe: {error}")
                model, tokenizer = self._drawn(spec)
            model.to(self.context.device)
            bind_images(model, self.context.run.images)
        return model, tokenizer

    def _built(self, spec: StudentSpec) -> tuple[Any, Any]:
        section = self.context.recipe.teacher
        if spec.width is not None or spec.quantize is not None:
            # Both would have to be measured on answers first.
            return self._drawn(spec)
        if spec.layers is not None:
            spec = replace(spec, layers=None, keep=tuple(range(spec.layers)))
        teacher = None
        if spec.model is None and spec.init in PRUNED and spec.dtype == section.dtype and section.bits is None:
            teacher = self.context.teacher.weights()
        elif spec.model is None:
            self.context.teacher.release()
            spec = replace(spec, model=section.model, revision=section.revision)
        built = build_student(spec, teacher=teacher, teacher_parameters=self.context.teacher.size)
        return built.model, built.tokenizer

    def _drawn(self, spec: StudentSpec) -> tuple[Any, Any]:
        section = self.context.recipe.student if spec.model is not None else self.context.recipe.teacher
        assert section.model is not None, "a teacher has a model"
        source = resolve(section.model, revision=section.revision, weights=False)
        trusted = spec.trust_remote_code
        model = fresh_model(student_config(source_config(source, trust_remote_code=trusted), spec, section.model), spec)
        freeze_parts(model, spec)
        if spec.quantize is not None:
            quantized(model, replace(spec.quantize, grid="nearest"), ())
        return with_trained_parts(model, spec).eval(), source_tokenizer(source, trust_remote_code=trusted)


def out_of_memory(error: Exception) -> str | None:
    """The line for an error that ends a piece of a probe; None for any other."""
    line = explain(error)
    return line if line is not None and line.startswith("out of memory") else None
