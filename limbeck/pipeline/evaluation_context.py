"""An exam: one student beside one teacher on held-out prompts, and what a group of metrics asks of it.

A group (`Group`, one file in `stages/groups`) says what it needs and turns an exam into rows, one an example. The rest
is the same for all groups: models are loaded when they are first needed, answers are written batch by batch so that
none is written twice, rows and details are kept on disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from limbeck.models.loading import load_model, load_tokenizer
from limbeck.pipeline.engine import RunContext
from limbeck.pipeline.resumable import write_in_batches
from limbeck.pipeline.sharing import once
from limbeck.pipeline.stages.respond import load_responses, sampler_for, sampling_meter
from limbeck.pipeline.stages.train import build_initial_student
from limbeck.pipeline.student_endings import same_tokens
from limbeck.pipeline.text_only import text_options
from limbeck.prompts.io import read_prompts
from limbeck.prompts.lengths import check_lengths
from limbeck.prompts.templates import TemplateName, encode_prompts, resolve_template
from limbeck.recipe.evaluation import EvaluateSection
from limbeck.rollouts.io import read_responses, write_responses
from limbeck.runtime.rundir import fingerprint
from limbeck.types import Json, Prompt, Response, Sampling, ScoredRow, TokenPrompt

Part = Literal["before", "after"]
Who = Literal["student", "teacher"]
Need = Literal["teacher", "tokens", "references"]


@dataclass(frozen=True, kw_only=True)
class ChatModel:
    """A model that answers, with its own tokenizer: the two of a pair need not share one for what compares texts."""

    who: Who
    model: nn.Module
    tokenizer: Any
    template: TemplateName


class ModelSource(NamedTuple):
    """What it takes to load a model or its tokenizer."""

    model: str | Path
    revision: str | None
    trust_remote_code: bool


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """What a group found.

    Attributes:
        tables: condition to rows, one an example, all of a table with the same metrics. The condition "" is the plain
            one; with another, such as "student" or "T=0.7", the metric `distinct_2` is called `distinct_2@T=0.7`.
        detail: what is no number an example (a reliability curve, the judge's record), kept as JSON beside the rows.
    """

    tables: Mapping[str, Sequence[ScoredRow]]
    detail: Json = field(default_factory=dict)

    def named(self, group: str) -> dict[str, Sequence[ScoredRow]]:
        """The tables by GROUP or GROUP@CONDITION."""
        return {table_name(group, condition): rows for condition, rows in self.tables.items()}


def table_name(group: str, condition: str) -> str:
    """GROUP@CONDITION, or GROUP alone for the plain condition."""
    return f"{group}@{condition}" if condition else group


def _nothing(section: EvaluateSection) -> frozenset[Need]:
    del section
    return frozenset()


def _no_check(context: RunContext) -> None:
    del context


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group of metrics.

    Attributes:
        parts: students it looks at: before training, after, or both. Evaluating a student on its own is "after".
        needs: "teacher": a teacher; "tokens": the same tokens in both models; "references": completions in the data.
        check: refuses what can be known to fail before any stage has worked.
    """

    name: str
    measure: Callable[[EvaluationContext], GroupResult]
    parts: tuple[Part, ...] = ("before", "after")
    needs: Callable[[EvaluateSection], frozenset[Need]] = _nothing
    check: Callable[[RunContext], None] = _no_check


@dataclass(kw_only=True)
class EvaluationContext:
    """One student on the held-out prompts of a run. Models load on first use; `release` lets go of them."""

    context: RunContext
    part: Part

    @property
    def section(self) -> EvaluateSection:
        return self.context.recipe.evaluate

    @property
    def folder(self) -> Path:
        """Where whatever a group keeps lies: caches in files of its own, rows and details by the frame."""
        return self.context.run.scores

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The held-out prompts, in the order of the file, without those that were too long for the pair."""
        held = [p for p in read_prompts(self.context.run.prompts) if p.split == "heldout"]
        if self.context.run.manifest("responses") is not None:
            answered = {r.prompt_id for r in load_responses(self.context, "heldout").values()}
            held = [p for p in held if p.id in answered]
        return held

    @cached_property
    def student(self) -> ChatModel:
        """The student as it is before or after training."""
        if self.part == "before":
            built = build_initial_student(self.context)
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
        return self._speaker("student", loaded.model, loaded.tokenizer)

    @cached_property
    def teacher(self) -> ChatModel:
        loaded = self.context.load_teacher()
        return self._speaker("teacher", loaded.model, loaded.tokenizer)

    def speaker(self, who: Who) -> ChatModel:
        return self.student if who == "student" else self.teacher

    def tokenizer(self, who: Who) -> Any:
        """The tokenizer of one of the two; no weights are loaded for it."""
        if who in self.__dict__:
            return self.speaker(who).tokenizer
        # Before training it is built with the teacher's, where the two have the same tokens.
        built = who == "student" and self.part == "before" and same_tokens(self.context)
        source = self.source("teacher" if built else who)
        return load_tokenizer(source.model, revision=source.revision, trust_remote_code=source.trust_remote_code)

    def release(self, *, student: bool) -> None:
        """Let go of the teacher, and of the student where asked; the next use loads them again."""
        for name in ("teacher", "student") if student else ("teacher",):
            self.__dict__.pop(name, None)

    def encode(self, who: Who, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[TokenPrompt]:
        """Prompts as one of the two reads them.

        Raises:
            LimbeckError: one does not fit its window.
        """
        speaker, section = self.speaker(who), self.context.recipe.prompts
        encoded = encode_prompts(
            prompts,
            speaker.tokenizer,
            speaker.template,
            control_tokens=section.control_tokens,
            chat_options=text_options(self.context, speaker.tokenizer),
        )
        config: Any = speaker.model.config
        window = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
        fitting = check_lengths(encoded, window=window, max_new_tokens=max_new_tokens, too_long=section.too_long)
        return [replace(p, split="heldout") for p in fitting.kept]

    def answers(
        self, who: Who, sampling: Sampling, prompts: Sequence[Prompt] | None = None, *, keep_logp: bool = False
    ) -> list[Response]:
        """Answers to prompts (all held-out ones), written once: they are kept under what they were made from.

        Args:
            keep_logp: with the log-probability of each id at temperature 1.
        """
        prompts = self.prompts[: self.section.prompts] if prompts is None else prompts
        asked_of = [(p.id, p.text, [m.as_turn() for m in p.messages or ()]) for p in prompts]
        key = fingerprint([asked_of, asdict(sampling), *(["logp"] if keep_logp else [])])[:12]
        writer = who if who == "teacher" else self.part
        path = self.folder / "answers" / f"{writer}-{key}.jsonl"
        if not path.exists() and who == "teacher":
            # The same for all students of a sweep.
            made_from = {"answers": key, "batch_size": self.section.batch_size}
            with once(self.context, made_from, path.parent, (path.name,)):
                if not path.exists():
                    self._answer(path, who, sampling, prompts, keep_logp)
        elif not path.exists():
            self._answer(path, who, sampling, prompts, keep_logp)
        return read_responses(path)

    def _answer(self, path: Path, who: Who, sampling: Sampling, prompts: Sequence[Prompt], keep_logp: bool) -> None:
        """Write the answers of one of the two into a file."""
        speaker = self.speaker(who)
        asked = self.encode(who, prompts, max_new_tokens=sampling.max_new_tokens)
        batches = path.with_suffix("")
        writer, rows = path.stem.partition("-")[0], self.section.batch_size
        sampler = sampler_for(self.context, speaker.model, speaker.tokenizer, speaker.template, who, rows)
        found, _ = write_in_batches(
            replace(sampler, keep_logp=keep_logp),
            asked,
            sampling,
            batches,
            stop=self.context.stop,
            watching=lambda done: sampling_meter(self.context, f"answer {writer}", len(asked), done),
        )
        write_responses(path, found)
        shutil.rmtree(batches)

    def texts(self, who: Who, sampling: Sampling, prompts: Sequence[Prompt] | None = None) -> dict[str, str]:
        """The same as text without special tokens, by prompt id."""
        answers, tokenizer = self.answers(who, sampling, prompts), self.tokenizer(who)
        return {r.prompt_id: response_text(r, tokenizer) for r in answers}

    def meter(self, label: str, total: int, unit: str) -> Any:
        """A bar on the console (a context manager with `advance`)."""
        return self.context.console.meter(f"{label} {self.part}", total, unit)

    def source(self, who: Who) -> ModelSource:
        """Where a model and its tokenizer are: what was trained, or what the recipe names."""
        recipe = self.context.recipe
        if who == "student" and self.part == "after" and self._trained:
            return ModelSource(self.context.run.student, None, self.context.student_trusted)
        section = recipe.teacher if who == "teacher" or recipe.student.model is None else recipe.student
        assert section.model is not None
        return ModelSource(section.model, section.revision, section.trust_remote_code)

    @property
    def _trained(self) -> bool:
        """Whether the student came out of a training; on its own it did not."""
        return self.context.run.manifest("student") is not None

    def _speaker(self, who: Who, model: nn.Module, tokenizer: Any) -> ChatModel:
        record = self.context.run.manifest("responses") or {}
        # Where the two have different tokens, the responses are the student's way of writing.
        apart = who == "teacher" and record.get("tokens_of") == "student"
        template = None if apart else record.get("template")
        if template is None:
            template = resolve_template(self.context.recipe.prompts.template, tokenizer, self.prompts)
        return ChatModel(who=who, model=model, tokenizer=tokenizer, template=template)


def response_text(response: Response, tokenizer: Any) -> str:
    """A response as text, without special tokens."""
    return str(tokenizer.decode(list(response.response_ids), skip_special_tokens=True)).strip()
