"""The registry of response sources. To add one: write the dataclass, add its line to `SOURCES`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from limbeck.fields import LATER, STRICT, Count, NonNegative, Probability, Share
from limbeck.registry import Registry
from limbeck.rollouts.options import (
    SOURCE_KEY,
    InitialAuthor,
    OnPolicyOptions,
    Samplers,
    SourceMaterials,
    SourceOptions,
)
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from limbeck.rollouts.mixed import SharePath
    from limbeck.rollouts.rounds import BatchSampler
    from limbeck.rollouts.sources import OfflineSource, ResponseSource
    from limbeck.rollouts.student import StudentSource


@dataclass(config=STRICT, kw_only=True)
class TeacherResponses(SourceOptions):
    """The teacher's answers, written once before training (sequence-level KD)."""

    initial_author: ClassVar[InitialAuthor | None] = "teacher"
    credit: ClassVar[str] = "sampled from the teacher"

    def build(self, materials: SourceMaterials) -> ResponseSource:
        return _offline(materials)


@dataclass(config=STRICT, kw_only=True)
class DataResponses(SourceOptions):
    """The answers of the data set."""

    initial_author: ClassVar[InitialAuthor | None] = "data"
    credit: ClassVar[str] = "by the data"

    def build(self, materials: SourceMaterials) -> ResponseSource:
        return _offline(materials)


@dataclass(config=STRICT, kw_only=True)
class TextDocuments(SourceOptions):
    """Plain text: documents in pieces of responses.max_new_tokens tokens, each learnt from as if it were an answer."""

    text_field: str = "text"
    """The column of prompts.source that holds the text."""
    max_tokens: Count | None = None
    """Read no more of prompts.source than this, held-out documents included; a hub data set is then fetched as it is
    read. Null reads all of it."""

    initial_author: ClassVar[InitialAuthor | None] = "data"
    documents: ClassVar[bool] = True
    credit: ClassVar[str] = "plain text of the data"

    def build(self, materials: SourceMaterials) -> ResponseSource:
        return _offline(materials)


@dataclass(config=STRICT, kw_only=True)
class StudentResponses(OnPolicyOptions):
    """The student's own, written during training: for each step, or for a round of steps."""

    teacher_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Every token is drawn from so much of the teacher's distribution and the rest of the student's (MiniLLM: 0.2)."""

    trains_on_initial: ClassVar[bool] = False
    credit: ClassVar[str] = "by the student"

    @property
    def by_teacher(self) -> bool:
        return self.teacher_share > 0

    @property
    def bias(self) -> str | None:
        return f"{SOURCE_KEY}.teacher_share is {self.teacher_share}" if self.teacher_share else None

    def sampler(self, samplers: Samplers) -> BatchSampler:
        share = self.teacher_share
        return samplers.mixture(teacher_share=share) if share else samplers.student()

    def build(self, materials: SourceMaterials) -> ResponseSource:
        return _student(self, materials)


@dataclass(config=STRICT, kw_only=True)
class MixedResponses(OnPolicyOptions):
    """Steps of the student's with probability lambda, else of those there before training (GKD, arXiv 2306.13649)."""

    share: Share = 0.5
    """Of the steps on the student's own responses (lambda of GKD)."""
    share_end: Share | None = None
    """Where the share arrives at the end; null leaves it where it is."""
    share_shape: Annotated[Literal["linear", "exponential"], LATER] = "linear"
    """How it gets there: in a line, or the rest falls by the same factor in every step (ImitKD, arXiv 2009.07253; its
    authors' code: share 0, share_end 0.995)."""

    credit: ClassVar[str] = "by the student in some steps, written before training in the others"

    @property
    def expected_share(self) -> float:
        path = self._path()
        return sum(path.at((n + 0.5) / 100) for n in range(100)) / 100

    def build(self, materials: SourceMaterials) -> ResponseSource:
        from limbeck.rollouts.mixed import MixedSource

        own, initial = _student(self, materials), _offline(materials)
        return MixedSource(own, initial, share=self._path(), seed=materials.context.seed)

    def check(self, *, max_new_tokens: int, per_device_train_batch_size: int) -> None:
        if self.share_shape == "exponential" and 1 in (self.share, self._end):
            raise LimbeckError(
                f"{SOURCE_KEY}.share_shape is exponential, and by a factor in every step no share gets to 1 or away "
                f"from it (share {self.share}, share_end {self._end}); set share and share_end below 1, such as 0 and "
                "0.995"
            )
        super().check(max_new_tokens=max_new_tokens, per_device_train_batch_size=per_device_train_batch_size)

    @property
    def _end(self) -> float:
        return self.share if self.share_end is None else self.share_end

    def _path(self) -> SharePath:
        from limbeck.rollouts.mixed import SharePath

        return SharePath(start=self.share, end=self._end, shape=self.share_shape)


@dataclass(config=STRICT, kw_only=True)
class ReplayResponses(OnPolicyOptions):
    """The student's from a buffer, with a share that adapts (DistiLLM, arXiv 2402.03898)."""

    share: Share = 0.2
    """Where the adaptive share of the steps on the student's responses begins."""
    capacity: Count = 1000
    """Responses the buffer holds. It is drawn from once it is full."""
    decay: Literal["decreasing", "constant", "increasing"] = "decreasing"
    """How often fresh responses are written over training."""
    tolerance: NonNegative = 0.1
    """The share grows when the held-out loss is by so much above what it is compared with."""
    bump: Probability = 0.1
    """By so much."""
    compare_with: Literal["last_growth", "lowest"] = "last_growth"
    """What the held-out loss is compared with: its value when the share grew last, or the lowest since then."""
    validate_steps: Count | None = None
    """Steps from one measurement of the held-out loss to the next; null is an epoch."""

    replays: ClassVar[bool] = True
    credit: ClassVar[str] = "by the student through a buffer in some steps, written before training in the others"

    @property
    def expected_share(self) -> float:
        # As it begins: how far it grows depends on the held-out loss.
        return self.share

    def build(self, materials: SourceMaterials) -> ResponseSource:
        from limbeck.rollouts.replay import ReplaySettings, ReplaySource

        settings = ReplaySettings(
            share=self.share,
            capacity=self.capacity,
            decay=self.decay,
            tolerance=self.tolerance,
            bump=self.bump,
            compare_with=self.compare_with,
            validation_steps=self.validate_steps,
        )
        own, initial, context = _student(self, materials), _offline(materials), materials.context
        return ReplaySource(own, initial, settings, step_rows=context.step_rows, seed=context.seed)

    def check(self, *, max_new_tokens: int, per_device_train_batch_size: int) -> None:
        if self.refresh not in (None, "step"):
            raise LimbeckError(f"{SOURCE_KEY}=replay keeps responses in its buffer; set {SOURCE_KEY}.refresh=step")
        super().check(max_new_tokens=max_new_tokens, per_device_train_batch_size=per_device_train_batch_size)

    def check_memory(self, *, max_new_tokens: int) -> None:
        from limbeck.rollouts.replay import require_room

        # Prompts come on top, once they are known.
        require_room(self.capacity, max_new_tokens)


@dataclass(config=STRICT, kw_only=True)
class SpeculativeResponses(OnPolicyOptions):
    """The student's, tokens unlikely to the teacher replaced by the teacher's (SKD, arXiv 2410.11325)."""

    teacher_top_k: Count = 25
    """A token of the student's outside the teacher's so many likeliest ones is replaced by one of them."""
    teacher_redraw: Literal["top_k", "nucleus"] = "top_k"
    """What replaces it: a draw from those, or from all that the temperature, top_p and top_k of the student's sampling
    leave of the teacher (the authors' code)."""

    trains_on_initial: ClassVar[bool] = False
    pure: ClassVar[bool] = False
    credit: ClassVar[str] = "by the student, corrected by the teacher"

    @property
    def by_teacher(self) -> bool:
        return True

    def sampler(self, samplers: Samplers) -> BatchSampler:
        return samplers.speculative(top_k=self.teacher_top_k, redraw=self.teacher_redraw)

    def build(self, materials: SourceMaterials) -> ResponseSource:
        return _student(self, materials)


@dataclass(config=STRICT, kw_only=True)
class PairedResponses(OnPolicyOptions):
    """The teacher's and the student's to each prompt, each with its own objective (DistiLLM-2, arXiv 2503.07067)."""

    refresh: Literal["step", "epoch"] | Count | None = None
    """How long its responses are used before they are written anew, in whole epochs; null is an epoch."""
    resample_teacher: bool = True
    """The teacher answers anew in every round too; false keeps its first answers."""

    paired: ClassVar[bool] = True
    whole_epochs: ClassVar[bool] = True
    credit: ClassVar[str] = "in pairs, one by the student and one by the teacher or the data"

    @property
    def samples_teacher(self) -> bool:
        return self.resample_teacher

    def build(self, materials: SourceMaterials) -> ResponseSource:
        from limbeck.rollouts.pairs import PairedSource

        rollout = self.rollout(materials)
        return PairedSource(
            materials.offline,
            materials.prompts,
            rollout,
            materials.context,
            teacher=materials.samplers.teacher() if self.resample_teacher else None,
            teacher_sampling=materials.sampling,
        )

    def check(self, *, max_new_tokens: int, per_device_train_batch_size: int) -> None:
        if self.refresh == "step":
            raise LimbeckError(
                f"{SOURCE_KEY}.refresh is step, but pairs are written for whole epochs; set {SOURCE_KEY}.refresh=epoch"
            )
        super().check(max_new_tokens=max_new_tokens, per_device_train_batch_size=per_device_train_batch_size)

    def check_steps(self, *, prompts: int, step_rows: int) -> None:
        from limbeck.rollouts.pairs import require_whole_epochs

        if isinstance(self.refresh, int):
            require_whole_epochs(self.refresh, -(-prompts // (step_rows // 2)))


def _offline(materials: SourceMaterials) -> OfflineSource:
    from limbeck.rollouts.sources import OfflineSource

    return OfflineSource(materials.offline, materials.context)


def _student(source: OnPolicyOptions, materials: SourceMaterials) -> StudentSource:
    from limbeck.rollouts.student import StudentSource

    return StudentSource(materials.prompts, source.rollout(materials), materials.context)


SOURCES: Registry[SourceOptions] = Registry(
    "response source",
    {
        "teacher": TeacherResponses,
        "data": DataResponses,
        "text": TextDocuments,
        "student": StudentResponses,
        "mixed": MixedResponses,
        "replay": ReplayResponses,
        "speculative": SpeculativeResponses,
        "pairs": PairedResponses,
    },
    entry_points="limbeck.response_sources",
)
