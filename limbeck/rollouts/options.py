"""Response sources as a recipe sets them: frozen dataclasses whose fields are the options of one source.

A source describes itself by class attributes and methods, and builds the `ResponseSource` of a training from the
materials that the run provides. Importing this module loads no model library; `build` may.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol

from pydantic import Field
from pydantic.dataclasses import dataclass

from limbeck.fields import STRICT, Count, NonNegative, Probability
from limbeck.types import LimbeckError, Response, Sampling, TokenPrompt

if TYPE_CHECKING:
    from limbeck.rollouts.rounds import BatchSampler, Rounds
    from limbeck.rollouts.sources import ResponseSource, SourceContext
    from limbeck.rollouts.student import RolloutConfig

InitialAuthor = Literal["teacher", "data"]
# Where the options stand in a recipe, as messages name them.
SOURCE_KEY = "responses.source"


class Samplers(Protocol):
    """Makes samplers of the models of a run; a model is loaded when the first sampler needs it."""

    def student(self) -> BatchSampler:
        """Draws from the student as it is trained."""
        ...

    def teacher(self) -> BatchSampler: ...

    def speculative(self, *, top_k: int, redraw: Literal["top_k", "nucleus"]) -> BatchSampler:
        """Draws from the student; the teacher replaces the tokens outside its `top_k` likeliest ones."""
        ...

    def mixture(self, *, teacher_share: float) -> BatchSampler:
        """Draws each token from a mixture of both distributions."""
        ...


class SourceMaterials(Protocol):
    """Materials of a run that response sources are built from.

    Attributes:
        offline: training responses that were there before training, without empty ones.
        prompts: those of the training split; none unless the student writes during training.
        sampling: how the teacher's responses are drawn.
        samplers: for a source with `on_policy`.
        rounds: where responses that live longer than a step are kept.
        context: step size, seed and processes of the training.
    """

    @property
    def offline(self) -> Sequence[Response]: ...
    @property
    def prompts(self) -> Sequence[TokenPrompt]: ...
    @property
    def sampling(self) -> Sampling: ...
    @property
    def samplers(self) -> Samplers: ...
    @property
    def rounds(self) -> Rounds: ...
    @property
    def context(self) -> SourceContext: ...


@dataclass(config=STRICT, kw_only=True)
class SourceOptions(ABC):
    """A response source: where the responses of training steps come from.

    Class attributes:
        on_policy: the student writes during training.
        initial_author: who wrote the responses that are there before training, where the source decides it; None
            leaves that to `responses.initial_author`.
        trains_on_initial: whether it trains on those, so that all training prompts are answered before training.
        paired: a step has two responses to each of its prompts, so that batches must be even.
        pure: the student's responses are drawn from the student alone, as a policy gradient asks.
        replays: they may be used again in a later step.
        documents: the rows of prompts.source are plain text and not prompts.
        whole_epochs: a round of its responses ends with an epoch, and is one where `refresh` is not set.
        credit: who wrote the responses, in a model card; empty gives the source's name.
    """

    on_policy: ClassVar[bool] = False
    initial_author: ClassVar[InitialAuthor | None] = None
    trains_on_initial: ClassVar[bool] = True
    paired: ClassVar[bool] = False
    pure: ClassVar[bool] = False
    replays: ClassVar[bool] = False
    documents: ClassVar[bool] = False
    whole_epochs: ClassVar[bool] = False
    credit: ClassVar[str] = ""

    @abstractmethod
    def build(self, materials: SourceMaterials) -> ResponseSource:
        """Build the source that gives each training step its responses."""

    @property
    def samples_teacher(self) -> bool:
        """Whether the teacher writes during training, alone or beside the student."""
        return False

    @property
    def fresh(self) -> bool:
        """Whether the student's responses of a step were written by the student that the step updates."""
        return False

    @property
    def bias(self) -> str | None:
        """The option by which another model draws some of the student's tokens; None where there is none."""
        return None

    def check(self, *, max_new_tokens: int, per_device_train_batch_size: int) -> None:
        """Refuse options that do not go with other keys of the recipe.

        Raises:
            LimbeckError: an option contradicts another one or these keys of the recipe.
        """
        if self.paired and per_device_train_batch_size % 2:
            raise LimbeckError(
                f"train.per_device_train_batch_size is {per_device_train_batch_size}; pairs are two responses "
                "that must meet in a batch, so expected an even number"
            )

    def check_memory(self, *, max_new_tokens: int) -> None:
        """Refuse, before the first stage, options that need more memory than this machine has."""
        return

    def check_steps(self, *, prompts: int, step_rows: int) -> None:
        """Refuse options that do not fit the number of training prompts.

        Args:
            step_rows: responses of an optimizer step over all processes.
        """
        return


@dataclass(config=STRICT, kw_only=True)
class OnPolicyOptions(SourceOptions):
    """A response source in which the student writes during training."""

    refresh: Literal["step", "epoch"] | Count | None = None
    """How long its responses are used before they are written anew: a step, an epoch, or so many steps; null is a
    step."""
    temperature: NonNegative | None = None
    """Of the student's sampling; null takes responses.temperature. So do top_p and top_k."""
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    first_max_new_tokens: Count | None = None
    """Length limit at the first step, from where it grows in a line to responses.max_new_tokens; null begins there."""

    on_policy: ClassVar[bool] = True
    pure: ClassVar[bool] = True

    @property
    def round_steps(self) -> int | None:
        """Optimizer steps that share a round of responses; None is an epoch."""
        refresh = self.refresh
        if refresh is None:
            return None if self.whole_epochs else 1
        return {"step": 1, "epoch": None}[refresh] if isinstance(refresh, str) else refresh

    @property
    def fresh(self) -> bool:
        return not self.whole_epochs and self.round_steps == 1

    @property
    def by_teacher(self) -> bool:
        """Whether the teacher writes tokens of the student's responses, so that its signal can be stored meanwhile."""
        return False

    @property
    def samples_teacher(self) -> bool:
        return self.by_teacher

    @property
    def expected_share(self) -> float:
        """Share of the responses of a training that the student will write, for what is planned beforehand."""
        return 1.0

    def sampling(self, sampling: Sampling) -> Sampling:
        """Sampling settings of the student's responses, from those of the teacher's."""
        from dataclasses import replace

        own = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return replace(sampling, **{key: value for key, value in own.items() if value is not None})

    def sampler(self, samplers: Samplers) -> BatchSampler:
        """Sampler of the student's responses."""
        return samplers.student()

    def rollout(self, materials: SourceMaterials) -> RolloutConfig:
        """Settings for `StudentSource` and `PairedSource`."""
        from limbeck.rollouts.student import RolloutConfig

        return RolloutConfig(
            sampler=self.sampler(materials.samplers),
            sampling=self.sampling(materials.sampling),
            rounds=materials.rounds,
            refresh=self.round_steps,
            by_teacher=self.by_teacher,
            first_tokens=self.first_max_new_tokens,
        )

    def check(self, *, max_new_tokens: int, per_device_train_batch_size: int) -> None:
        first = self.first_max_new_tokens
        if first is not None and first > max_new_tokens:
            raise LimbeckError(
                f"{SOURCE_KEY}.first_max_new_tokens is {first}, expected at most responses.max_new_tokens "
                f"({max_new_tokens})"
            )
        super().check(max_new_tokens=max_new_tokens, per_device_train_batch_size=per_device_train_batch_size)
