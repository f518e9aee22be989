"""The input of an objective (tokens of student and teacher, side by side), and what makes something an objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from limbeck.types import DenseSignal

if TYPE_CHECKING:
    from torch import Tensor


TemperatureScale = Literal["auto", "none", "tau", "tau2"] | float


# The log-probability that stands for an impossible token: finite, so that 0 * log 0 is 0 and no gradient is NaN.
LOG_ZERO = -1e30


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Logits of the student and the teacher for some tokens, on one support: the input of an objective.

    Attributes:
        student_logits_NK: raw logits (after the head's scale and soft-cap), float32 or float64.
        teacher_logits_NK: raw logits on the same support. Minus infinity on either side marks an impossible token.
        student_tau_N1: the student's temperature, per token.
        teacher_tau_N1: the teacher's temperature, per token.
        scale: the rule for the factor on value and gradient; "auto" is tau to the power the objective declares.
        label_N: the token that followed, an index into the support, int64; None where no objective reads it.
        token_options: options with a value per token (`alpha` or `skl.alpha`), shape (N,); they replace the objective's
            own.
        estimate: of a teacher signal that is a sample: an unbiased estimate of p, and log p where it is not zero.
        soften: gives probabilities and log-probabilities of tempered logits; None takes softmax and its logarithm.
    """

    student_logits_NK: Tensor
    teacher_logits_NK: Tensor
    student_tau_N1: Tensor
    teacher_tau_N1: Tensor
    scale: TemperatureScale = "auto"
    label_N: Tensor | None = None
    token_options: Mapping[str, Tensor] = field(default_factory=dict)
    estimate: tuple[Tensor, Tensor] | None = None
    soften: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    @cached_property
    def student_inv_tau_N1(self) -> Tensor:
        """One over the student's temperature: one division per row instead of one per entry."""
        return 1 / self.student_tau_N1

    @cached_property
    def teacher_inv_tau_N1(self) -> Tensor:
        """One over the teacher's temperature."""
        return 1 / self.teacher_tau_N1

    @cached_property
    def _student(self) -> tuple[Tensor, Tensor]:
        return self._softened(self.student_logits_NK * self.student_inv_tau_N1)

    @cached_property
    def _teacher(self) -> tuple[Tensor, Tensor]:
        return self.estimate or self._softened(self.teacher_logits_NK * self.teacher_inv_tau_N1)

    def _softened(self, tempered_NK: Tensor) -> tuple[Tensor, Tensor]:
        if self.soften is not None:
            return self.soften(tempered_NK)
        log_NK = tempered_NK.log_softmax(-1).clamp_min(LOG_ZERO)
        return log_NK.exp(), log_NK

    @property
    def log_q_NK(self) -> Tensor:
        """Log-probabilities of the student at its temperature."""
        return self._student[1]

    @property
    def log_p_NK(self) -> Tensor:
        """Log-probabilities of the teacher at its temperature."""
        return self._teacher[1]

    @property
    def q_NK(self) -> Tensor:
        """Probabilities of the student at its temperature."""
        return self._student[0]

    @property
    def p_NK(self) -> Tensor:
        """Probabilities of the teacher at its temperature."""
        return self._teacher[0]

    def factor_N1(self, order: int) -> Tensor | float:
        """The factor of `scale` for an objective whose neutral factor is tau to the power `order`.

        Where the two temperatures differ, tau is the student's: it is the one that divides the gradient.
        """
        powers = {"auto": order, "none": 0, "tau": 1, "tau2": 2}
        if not isinstance(self.scale, str):
            return float(self.scale)
        power = powers[self.scale]
        return self.student_tau_N1**power if power else 1.0

    def option(self, objective: str, name: str, value: float) -> Tensor | float:
        """The option `name` of an objective: the value of each token where one was given, else `value`."""
        for key in (f"{objective}.{name}", name):
            if key in self.token_options:
                return self.token_options[key].unsqueeze(-1)
        return value


@runtime_checkable
class Objective(Protocol):
    """Compares two rows of logits. Implementations are frozen dataclasses: their fields are their options.

    Attributes:
        name: the key in the registry.
        order: power of tau that keeps the gradient's size ("auto"); None for a sum, whose parts have their own.
        reads: what it needs besides the student: "teacher", "labels", "hidden".
        supports: the supports of the teacher's signal on which it is defined.
        token_fields: its options that may have a value per token.
        caution: a warning about temperatures other than 1; empty where there is none.
    """

    @property
    def name(self) -> str: ...
    @property
    def order(self) -> int | None: ...
    @property
    def reads(self) -> frozenset[str]: ...
    @property
    def supports(self) -> frozenset[str]: ...
    @property
    def token_fields(self) -> frozenset[str]: ...
    @property
    def caution(self) -> str: ...

    def value_and_grad(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Value per token (N,), without the temperature factor, and its gradient (N, K) in the student's raw logits.

        The value, differentiated by autograd through `rows.student_logits_NK`, gives the same gradient: whatever an
        objective holds constant by definition is detached in it.
        """
        ...


@runtime_checkable
class SequenceMeasuring(Protocol):
    """An objective with token options that are measured over the sequences of its tokens before it is computed.

    Attributes:
        per_sequence: whether it asks for that, with the options it has.
    """

    @property
    def name(self) -> str: ...
    @property
    def per_sequence(self) -> bool: ...

    def sequence_options(self, signal: DenseSignal, sequence_N: Tensor) -> Mapping[str, Tensor]:
        """The options by name, one value (N,) per token."""
        ...


@runtime_checkable
class HiddenObjective(Protocol):
    """Compares hidden states instead of logits. Its gradient is autograd's."""

    @property
    def name(self) -> str: ...
    @property
    def reads(self) -> frozenset[str]: ...

    def value(self, student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        """Value of each token (N,) from states of the same width."""
        ...
