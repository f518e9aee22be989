"""What an evaluation group is, and what it may ask of the evaluation it is part of.

A group knows neither recipe nor run directory: models, answers and settings come through `EvaluationContext`, which
the pipeline implements. Models load when they are first asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from limbeck.evaluation.scores.metrics import Metric
from limbeck.evaluation.tasks.problems import Problem, TaskName
from limbeck.prompts.templates import LossOn, TemplateName
from limbeck.runtime.console import Console, Meter
from limbeck.types import Json, Prompt, Response, Sampling, ScoredRow, SignalSource, TokenPrompt

if TYPE_CHECKING:
    import torch

    from limbeck.sampling.local import LocalSampler

Part = Literal["before", "distilled", "after"]
Who = Literal["student", "teacher"]
Need = Literal["teacher", "teacher_weights", "tokens", "references"]


@dataclass(frozen=True, kw_only=True)
class ChatModel:
    """A model that answers, with its own tokenizer: the two of a pair need not share one for what compares texts."""

    who: Who
    model: torch.nn.Module
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


def response_text(response: Response, tokenizer: Any) -> str:
    """A response as text, without special tokens."""
    return str(tokenizer.decode(list(response.response_ids), skip_special_tokens=True)).strip()


def text_behind(response: Response, tokenizer: Any) -> str:
    """A response with its first white space, which some tokenizers drop from a text that begins with it."""
    before, ids = list(response.prompt_ids), list(response.response_ids)
    head, whole, alone = (
        str(tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for part in (before, before + ids, ids)
    )
    return whole[len(head) :] if whole.startswith(head) else alone


class EvaluationSettings(Protocol):
    """What all groups share.

    Attributes:
        max_new_tokens: length of the answers that are measured.
        prompts: answers for at most this many held-out prompts; None for all.
        batch_size: answers sampled at once.
    """

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def prompts(self) -> int | None: ...

    @property
    def batch_size(self) -> int: ...


def greedy(settings: EvaluationSettings) -> Sampling:
    """How the answers are drawn that the report shows side by side."""
    return Sampling(max_new_tokens=settings.max_new_tokens, temperature=0.0)


class StopRequest(Protocol):
    """A signal's wish that the run end."""

    def deferred(self) -> AbstractContextManager[Any]:
        """A block that the signal waits for, so that what it does is done whole."""
        ...

    def raise_if_requested(self) -> None:
        """Stop here if that was wished meanwhile."""
        ...


class EvaluationContext(Protocol):
    """One student beside one teacher on held-out prompts, and what a group may ask of the two."""

    @property
    def part(self) -> Part:
        """Which student: the one before training or after all of it, preference tuning included; on its own it is
        "after". "distilled" is the one before preference tuning."""
        ...

    @property
    def settings(self) -> EvaluationSettings: ...

    @property
    def folder(self) -> Path:
        """Where rows and details are kept, and what a group keeps beside them."""
        ...

    @property
    def root(self) -> Path:
        """The run directory, for records that outlive the scores, such as judgements that cost money."""
        ...

    @property
    def console(self) -> Console: ...

    @property
    def stop(self) -> StopRequest: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The held-out prompts that fit the pair."""
        ...

    @property
    def student(self) -> ChatModel: ...

    @property
    def teacher(self) -> ChatModel: ...

    @property
    def trained(self) -> bool:
        """Whether the student came out of a training here."""
        ...

    @property
    def standalone(self) -> bool:
        """Whether two models are evaluated on their own, without the responses of a run."""
        ...

    @property
    def evaluated(self) -> bool:
        """Whether everything was measured already, so that nothing is asked of anybody."""
        ...

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher: a student may be evaluated on its own without one."""
        ...

    @property
    def window(self) -> int | None:
        """Tokens that fit both models; None where neither states a limit."""
        ...

    @property
    def loss_on(self) -> LossOn:
        """The turns of a conversation whose tokens count."""
        ...

    @property
    def responses_author(self) -> Literal["teacher", "data"]:
        """Who wrote the held-out responses of the run."""
        ...

    @property
    def task(self) -> TaskName | None:
        """The task that the prompts are problems of, where they are some."""
        ...

    @property
    def key_names(self) -> tuple[str, ...]:
        """Environment variables with keys that no file may repeat."""
        ...

    @property
    def scoring_batch_size(self) -> int:
        """Responses of one forward pass."""
        ...

    def speaker(self, who: Who) -> ChatModel:
        """One of the two."""
        ...

    def tokenizer(self, who: Who) -> Any:
        """The tokenizer of one of the two; no weights are loaded for it."""
        ...

    def source(self, who: Who) -> ModelSource:
        """Where a model and its tokenizer are."""
        ...

    def before(self) -> EvaluationContext:
        """The same with the student as it was before training."""
        ...

    def distilled(self) -> EvaluationContext:
        """The same with the student as distillation left it, before preference tuning."""
        ...

    def require_preferred(self, key: str) -> None:
        """See that preference tuning follows distillation here.

        Args:
            key: the key of the recipe that asks for the student before it.

        Raises:
            LimbeckError: it does not.
        """
        ...

    def release_teacher(self) -> None:
        """Let go of the teacher's weights; the next use loads them again."""
        ...

    def encode(self, who: Who, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[TokenPrompt]:
        """Prompts as one of the two reads them, those that fit its window."""
        ...

    def encode_references(self, who: Who, prompts: Sequence[Prompt]) -> list[Response]:
        """The data's own answers to prompts, as one of the two would have written them."""
        ...

    def problems(self) -> Sequence[Problem]:
        """The held-out prompts as problems; none where they are no problems."""
        ...

    def heldout_responses(self) -> Mapping[int, Response]:
        """The held-out responses of the run."""
        ...

    def scoring_teacher(self, *, stored: bool) -> SignalSource:
        """What tells the teacher's distributions: of responses of the run, which may be stored, or of any."""
        ...

    def sampler(self, who: Who, batch_size: int) -> LocalSampler:
        """A sampler of one of the two; answers end where its template ends them."""
        ...

    def answers(
        self, who: Who, sampling: Sampling, prompts: Sequence[Prompt] | None = None, *, keep_logp: bool = False
    ) -> list[Response]:
        """Answers to prompts (all held-out ones), written once: they are kept under what they were made from.

        Args:
            keep_logp: with the log-probability of each id at temperature 1.
        """
        ...

    def texts(self, who: Who, sampling: Sampling, prompts: Sequence[Prompt] | None = None) -> dict[str, str]:
        """The same as text without special tokens, by prompt id."""
        ...

    def meter(self, label: str, total: int, unit: str) -> AbstractContextManager[Meter]:
        """A bar on the console."""
        ...


class EvaluationGroup(ABC):
    """A group of metrics: a frozen dataclass whose fields are the group's options.

    Attributes:
        parts: students it looks at: before training, after, or both. Evaluating a student on its own is "after".
        metrics: what its metrics mean, where `limbeck.evaluation.scores.metrics` does not have them.
        references_remedy: what to change where data has no reference answers.
    """

    parts: ClassVar[tuple[Part, ...]] = ("before", "after")
    metrics: ClassVar[Mapping[str, Metric]] = {}
    references_remedy: ClassVar[str] = "leave the group out of evaluate.groups"

    def needs(self) -> frozenset[Need]:
        """What must be there.

        "teacher": what it says of tokens; "teacher_weights": the model itself, which answers or is timed; "tokens": the
        same ones in both models; "references": in the data.
        """
        return frozenset()

    def check(self, evaluation: EvaluationContext) -> None:  # noqa: B027 (most groups have nothing to refuse)
        """Refuse what can be known to fail before any stage has worked.

        Raises:
            LimbeckError: it would fail.
        """

    def inputs(self, evaluation: EvaluationContext) -> Json:
        """What its scores depend on beside its options and the models."""
        del evaluation
        return {}

    @abstractmethod
    def measure(self, evaluation: EvaluationContext) -> GroupResult:
        """Rows of metrics, one row per example."""
