"""The protocol of the evaluation that gives groups of metrics models and answers.

A group uses neither recipe nor run directory: models, answers and settings come through `EvaluationContext`, which
the pipeline implements. Models load when first used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from limbeck.evaluation.pieces import Piece
from limbeck.evaluation.scores.metrics import StandIn
from limbeck.evaluation.tasks.problems import Problem, TaskName
from limbeck.prompts.templates import LossOn, TemplateName
from limbeck.runtime.console import Console, Meter
from limbeck.types import Prompt, Response, Sampling, SignalSource, TokenPrompt

if TYPE_CHECKING:
    import torch
    from torch import nn

    from limbeck.evaluation.group import GroupInPieces
    from limbeck.models.quantization.files import QuantizedWeights
    from limbeck.sampling.local import LocalSampler

Part = Literal["before", "distilled", "after", StandIn]
Who = Literal["student", "teacher"]
BOTH: tuple[Who, Who] = ("student", "teacher")


@dataclass(frozen=True, kw_only=True)
class ChatModel:
    """A model with its own tokenizer and template; groups that compare texts work with two different tokenizers."""

    who: Who
    model: nn.Module
    tokenizer: Any
    template: TemplateName


@dataclass(frozen=True, kw_only=True)
class AskedAnswers:
    """Answers that a group asks for, see `EvaluationContext.answers`."""

    who: Who
    sampling: Sampling
    prompts: Sequence[Prompt] | None = None
    keep_logp: bool = False


class ModelSource(NamedTuple):
    """Arguments for loading a model or its tokenizer."""

    model: str | Path
    revision: str | None
    trust_remote_code: bool


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
    """Settings that all groups share.

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
    """Greedy decoding, for the answers that the report shows side by side."""
    return Sampling(max_new_tokens=settings.max_new_tokens, temperature=0.0)


def sampled(settings: EvaluationSettings, temperature: float, seed: int) -> Sampling:
    """Answers of the same length, drawn."""
    return Sampling(max_new_tokens=settings.max_new_tokens, temperature=temperature, seed=seed)


class StopRequest(Protocol):
    """A request to stop, made by a signal."""

    def deferred(self) -> AbstractContextManager[Any]:
        """A block at whose end a stop signal takes effect, so that its work is whole."""
        ...

    def raise_if_requested(self) -> None:
        """End the process by an exception where a stop was requested."""
        ...


class EvaluationContext(Protocol):
    """One student and one teacher on held-out prompts: models, answers and settings for evaluation groups."""

    @property
    def part(self) -> Part:
        """Which student: the one before training or after all of it, preference tuning included; on its own it is
        "after". "distilled" is the one before preference tuning. Else a stand-in, which is measured in its place."""
        ...

    @property
    def settings(self) -> EvaluationSettings: ...

    @property
    def folder(self) -> Path:
        """Folder of rows and details, and of a group's own files."""
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
        """The held-out prompts that fit both models."""
        ...

    @property
    def student(self) -> ChatModel:
        """The student, loaded; of all students of a run one is in memory at a time."""
        ...

    @property
    def teacher(self) -> ChatModel: ...

    @property
    def trained(self) -> bool:
        """Whether the student was trained by this run."""
        ...

    @property
    def standalone(self) -> bool:
        """Whether two models are evaluated on their own, without the responses of a run."""
        ...

    @property
    def evaluated(self) -> bool:
        """Whether everything was measured before, so that no model or server is needed."""
        ...

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher that can write answers: a student may be evaluated without one."""
        ...

    @property
    def window(self) -> int | None:
        """The most tokens that both models can read; None where neither has a limit."""
        ...

    @property
    def loss_on(self) -> LossOn:
        """Which turns of a conversation enter the loss."""
        ...

    @property
    def responses_author(self) -> Literal["teacher", "data"]:
        """Author of the held-out responses of the run."""
        ...

    @property
    def reads_documents(self) -> bool:
        """Whether the held-out responses are plain text."""
        ...

    @property
    def task(self) -> TaskName | None:
        """The task that the prompts are problems of, where they are some."""
        ...

    @property
    def key_names(self) -> tuple[str, ...]:
        """Environment variables of API keys that must not appear in any file."""
        ...

    @property
    def scoring_batch_size(self) -> int:
        """Responses of one forward pass."""
        ...

    def speaker(self, who: Who) -> ChatModel:
        """The student or the teacher, loaded."""
        ...

    def alone(self, who: Who) -> ChatModel:
        """The student or the teacher, loaded, with the other one let go of."""
        ...

    def template(self, who: Who) -> TemplateName:
        """Template of the prompts for the student or the teacher; no weights are loaded for it."""
        ...

    def tokenizer(self, who: Who) -> Any:
        """Tokenizer of the student or the teacher; no weights are loaded for it."""
        ...

    def source(self, who: Who) -> ModelSource:
        """Location of a model and its tokenizer."""
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

    def release_student(self) -> None:
        """Free the student's weights; the next use loads them again."""
        ...

    def release_teacher(self) -> None:
        """Free the teacher's weights; the next use loads them again."""
        ...

    def encode(self, who: Who, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[TokenPrompt]:
        """Token ids of prompts for the student or the teacher, without those that exceed its window."""
        ...

    def encode_references(self, who: Who, prompts: Sequence[Prompt]) -> list[Response]:
        """Reference answers of the data, as responses in the tokens of the student or the teacher."""
        ...

    def problems(self) -> Sequence[Problem]:
        """The held-out prompts as problems; none where they are no problems."""
        ...

    def heldout_responses(self) -> Mapping[int, Response]:
        """The held-out responses of the run."""
        ...

    def training_responses(self) -> Sequence[Response]:
        """The responses that were there before training, but for the held-out ones."""
        ...

    def quantized_weights(self) -> QuantizedWeights | None:
        """The blocks that the student was trained as; None where it is not quantised."""
        ...

    def scoring_teacher(self, *, stored: bool, alone: bool = False) -> SignalSource:
        """The source of teacher signals: for responses of the run, which may be stored, or for any responses.

        Args:
            alone: let go of the student where the teacher itself is asked.
        """
        ...

    def sampler(self, who: Who, batch_size: int) -> LocalSampler:
        """Sampler of the student or the teacher; answers end where its template ends them."""
        ...

    def answers(
        self, who: Who, sampling: Sampling, prompts: Sequence[Prompt] | None = None, *, keep_logp: bool = False
    ) -> list[Response]:
        """Answers to prompts (all held-out ones by default); each set is sampled once and kept on disk.

        Args:
            keep_logp: with the log-probability of each id at temperature 1.
        """
        ...

    def texts(self, who: Who, sampling: Sampling, prompts: Sequence[Prompt] | None = None) -> dict[str, str]:
        """Texts of `answers` without special tokens, by prompt id."""
        ...

    def pieces(self, group: GroupInPieces, of: str, count: int) -> Iterator[Piece]:
        """The first `count` of a group's pieces, in order; the ranks of a launch share them."""
        ...

    def domain_of(self, prompt_id: str) -> str | None:
        """Name of the teacher of a prompt, where each prompt has one of several; else None."""
        ...

    def meter(self, label: str, total: int, unit: str) -> AbstractContextManager[Meter]:
        """Progress bar on the console."""
        ...
