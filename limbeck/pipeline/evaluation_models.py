"""The student and the teacher of an evaluation: loaded when they are first needed, one whole model at a time.

Of the students of a run (before training, distilled, after it) and their stand-ins one is in memory at a time. Beside
the teacher it is where a group asks for both; a model that writes answers is alone, since what is laid out for it takes
as much again.
What is asked of a model beside its weights (tokenizer, template, window) is read from its small files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from limbeck.evaluation.context import ChatModel, ModelSource, Part, Who
from limbeck.models.loading import load_model, load_tokenizer, source_config
from limbeck.models.sources import resolve
from limbeck.models.vision import bind_images
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.initial_student import build_initial_student
from limbeck.pipeline.stages.respond import load_responses
from limbeck.pipeline.student_endings import same_tokens
from limbeck.prompts.io import StoredPrompts
from limbeck.prompts.templates import TemplateName, resolve_template
from limbeck.runtime.memory import give_back_freed
from limbeck.types import Prompt


@dataclass(kw_only=True)
class EvaluatedModels:
    """One student and one teacher, and the held-out prompts of a run."""

    context: RunContext
    part: Part

    @property
    def trained(self) -> bool:
        """Whether the student was trained by this run."""
        return self.context.run.manifest("train") is not None

    @property
    def built(self) -> bool:
        """Whether the student is made as the training makes it, rather than read from files of its own."""
        return self.part == "before"

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The held-out prompts, in the order of the file, without those that were too long for the pair."""
        held = [p for p in StoredPrompts(self.context.run.prompts) if p.split == "heldout"]
        if self.context.run.manifest("respond") is not None:
            answered = {r.prompt_id for r in load_responses(self.context, "heldout").values()}
            held = [p for p in held if p.id in answered]
        return held

    @property
    def student(self) -> ChatModel:
        """The student before or after training, loaded; another one of the run is let go of first."""
        kept = self.context.kept
        if "student" not in kept or kept["student"][0] != self.part:
            self.release_student()
            kept["student"] = (self.part, self._load_student())
        return kept["student"][1]

    @property
    def teacher(self) -> ChatModel:
        """The teacher, loaded; the weights are its own, so that it can let go of them."""
        loaded = self.context.teacher.writing()
        return self._speaker("teacher", loaded.model, loaded.tokenizer)

    def speaker(self, who: Who) -> ChatModel:
        return self.student if who == "student" else self.teacher

    def alone(self, who: Who) -> ChatModel:
        """The student or the teacher, loaded, with the other one let go of."""
        if who == "teacher":
            self.release_student()
            return self.teacher
        # A student that is built may be cut out of the teacher that is in memory, and have its tensors.
        if not self.built:
            self.release_teacher()
        student = self.student
        self.release_teacher()
        return student

    def writer(self, who: Who, folder: str) -> ChatModel:
        """The model that writes answers, alone in memory.

        Args:
            folder: name of one of several teachers; empty where one writes all.
        """
        if not folder:
            return self.alone(who)
        self.release_student()
        self.release_teacher()
        loaded = self.context.run_teachers[folder].writing()
        return self._speaker(who, loaded.model, loaded.tokenizer)

    def release_student(self) -> None:
        """Free the student; the next use loads it again."""
        if self.context.kept.pop("student", None) is not None:
            give_back_freed()

    def release_teacher(self) -> None:
        """Free the teacher's weights; the next use loads them again."""
        self.context.teacher.release()

    def tokenizer(self, who: Who) -> Any:
        """Tokenizer of the student or the teacher; no weights are loaded for it."""
        return self.context.teacher.tokenizer if who == "teacher" else self._student_tokenizer

    @cached_property
    def _student_tokenizer(self) -> Any:
        # Before training it is built with the teacher's, where the two have the same tokens.
        if self.built and same_tokens(self.context):
            return self.context.teacher.tokenizer
        source = self.source("student")
        return load_tokenizer(source.model, revision=source.revision, trust_remote_code=source.trust_remote_code)

    def template(self, who: Who) -> TemplateName:
        """Template of the prompts for the student or the teacher; no weights are loaded for it."""
        return self._template(who, self.tokenizer(who))

    def window_of(self, who: Who) -> int:
        """The most tokens that the student or the teacher can read; no weights are loaded for it."""
        return (self.context.teacher.window if who == "teacher" else self._student_window) or 2**31

    @cached_property
    def _student_window(self) -> int | None:
        if self.built and (given := self.context.recipe.student.config.get("max_position_embeddings")) is not None:
            return given
        named = self.source("student")
        trusted = named.trust_remote_code
        source = resolve(named.model, revision=named.revision, weights=False, trust_remote_code=trusted)
        config = source_config(source, trust_remote_code=trusted)
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    def source(self, who: Who) -> ModelSource:
        """Location of a model and its tokenizer: the trained student's folder, or the recipe's model, which a stand-in
        is made of."""
        recipe = self.context.recipe
        if who == "student" and self.part in ("after", "distilled") and self.trained:
            run = self.context.run
            folder = run.student if self.part == "distilled" else run.finished_student
            return ModelSource(folder, None, self.context.student_trusted)
        section = recipe.teacher_source if who == "teacher" or recipe.student.model is None else recipe.student
        assert section.model is not None
        return ModelSource(section.model, section.revision, section.trust_remote_code)

    def _load_student(self) -> ChatModel:
        if self.built:
            built = build_initial_student(self.context, take=True)
            return self._speaker("student", built.model.eval(), built.tokenizer)
        section, source = self.context.recipe.student, self.source("student")
        loaded = load_model(
            source.model,
            revision=source.revision,
            dtype=section.dtype,
            attn_implementation=section.attn_implementation,
            trust_remote_code=source.trust_remote_code,
        )
        loaded.model.to(self.context.device)  # type: ignore[arg-type]
        bind_images(loaded.model, self.context.run.images)
        for group in self.context.recipe.evaluate.groups.values():
            if self.part in group.stand_ins():
                group.make_stand_in(self, loaded.model)
        return self._speaker("student", loaded.model, loaded.tokenizer)

    def _speaker(self, who: Who, model: nn.Module, tokenizer: Any) -> ChatModel:
        return ChatModel(who=who, model=model, tokenizer=tokenizer, template=self._template(who, tokenizer))

    def _template(self, who: Who, tokenizer: Any) -> TemplateName:
        record = self.context.run.manifest("respond") or {}
        # Where the two have different tokens, the responses are the student's way of writing.
        apart = who == "teacher" and record.get("tokens_of") == "student"
        template = None if apart else record.get("template")
        return template or resolve_template(self.context.recipe.prompts.template, tokenizer, self.prompts)
