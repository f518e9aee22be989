"""The base class of evaluation groups: what a group of metrics needs, and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from limbeck.evaluation.context import AskedAnswers, EvaluationContext, Part
from limbeck.evaluation.pieces import Piece
from limbeck.evaluation.scores.metrics import Metric, StandIn
from limbeck.types import Json, ScoredRow

if TYPE_CHECKING:
    from torch import nn

Need = Literal["teacher", "teacher_answers", "teacher_weights", "tokens", "prompts", "references"]


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """The result of a group.

    Attributes:
        tables: condition to rows, one per example, all of a table with the same metrics. The condition "" is the plain
            one; with another, such as "student" or "T=0.7", the metric `distinct_2` is called `distinct_2@T=0.7`.
        detail: results that are not one number per example (a reliability curve, the judge's record), kept as JSON.
    """

    tables: Mapping[str, Sequence[ScoredRow]]
    detail: Json = field(default_factory=dict)

    def named(self, group: str) -> dict[str, Sequence[ScoredRow]]:
        """The tables by GROUP or GROUP@CONDITION."""
        return {table_name(group, condition): rows for condition, rows in self.tables.items()}


def table_name(group: str, condition: str) -> str:
    """GROUP@CONDITION, or GROUP alone for the plain condition."""
    return f"{group}@{condition}" if condition else group


class EvaluationGroup(ABC):
    """A group of metrics: a frozen dataclass whose fields are the group's options.

    Attributes:
        parts: students it looks at: before training, after, or both. Evaluating a student on its own is "after".
        metrics: what its metrics mean, where `limbeck.evaluation.scores.metrics` does not have them.
        references_remedy: what to change where data has no reference answers.
        teacher_remedy: what to change where the teacher cannot give what the group asks of it.
        takes_likeliest: whether a teacher will do that says no more of a token than the likeliest ones.
        rows_may_lack: whether an example may have no row for a reason of its own, such as a verdict that cannot be
            read: runs are then compared on the examples that all of them have.
    """

    parts: ClassVar[tuple[Part, ...]] = ("before", "after")
    metrics: ClassVar[Mapping[str, Metric]] = {}
    references_remedy: ClassVar[str] = "leave the group out of evaluate.groups"
    teacher_remedy: ClassVar[str] = "leave it out"
    takes_likeliest: ClassVar[bool] = False
    rows_may_lack: ClassVar[bool] = False

    @classmethod
    def on_responses(cls, condition: str, options: Mapping[str, object]) -> bool:
        """Whether a table is measured on the held-out responses of the run, which other runs may have others of.

        Args:
            condition: of the table.
            options: of the group in the recipe; those that are not there have their defaults.
        """
        del condition, options
        return False

    def needs(self) -> frozenset[Need]:
        """What the group needs: a teacher, the same tokens, prompts, reference answers.

        "teacher": what it says of tokens; "teacher_answers": what it answers; "teacher_weights": the whole model, which
        is timed; "tokens": the same ones in both models; "prompts": held-out ones to be answered; "references": in the
        data.
        """
        return frozenset()

    @property
    def scores_fresh(self) -> bool:
        """Whether the teacher has to score texts that the run has not stored."""
        return False

    @property
    def takes_both(self) -> bool:
        """Whether it has both models in memory at once, whatever the run has stored."""
        return False

    def stand_ins(self) -> tuple[StandIn, ...]:
        """Models to be measured in the student's place, by this group and by each that measures it before training.

        Like the student before training they are made of the weights that it began with, but were never trained.
        """
        return ()

    def make_stand_in(self, evaluation: EvaluationContext, model: nn.Module) -> None:  # noqa: B027 (most have none)
        """Turn a copy of the weights that the student began with into the stand-in that the evaluation's part names."""

    def check(self, evaluation: EvaluationContext) -> None:  # noqa: B027 (most groups have nothing to refuse)
        """Refuse what can be known to fail before any stage begins.

        Raises:
            LimbeckError: it would fail.
        """

    def inputs(self, evaluation: EvaluationContext) -> Json:
        """Inputs of its scores beside its options and the models, for the fingerprint."""
        del evaluation
        return {}

    def asks(self, evaluation: EvaluationContext) -> Iterable[AskedAnswers]:
        """The answers of the evaluation's two models that it will ask for.

        They are written before anything is measured, so that no model is loaded twice; what is not named here is
        written when it is asked for.
        """
        del evaluation
        return ()

    @abstractmethod
    def measure(self, evaluation: EvaluationContext) -> GroupResult:
        """Rows of metrics, one row per example."""


class GroupInPieces(EvaluationGroup):
    """A group whose work falls into pieces, which the ranks of a launch share; its `measure` asks for them by
    `EvaluationContext.pieces`."""

    @abstractmethod
    def pieces(self, evaluation: EvaluationContext, of: str, numbers: Iterable[int]) -> Iterator[Piece]:
        """The pieces of some numbers, one as each number is taken.

        Answers that it asks for are on disk. It may run on any rank, so it writes nothing.

        Args:
            of: which of several series of pieces, as the group names it.
        """
