"""Temperature of the loss: one for the student, one for the teacher, and the factor that goes with them.

It has nothing to do with the temperature of sampling (`Sampling.temperature`), which never enters a loss.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck.objectives.base import Objective, Rows, TemperatureScale
from limbeck.types import LimbeckError

SCALES = ("auto", "none", "tau", "tau2")
FLAT_ABOVE = 5.0


@dataclass(frozen=True, kw_only=True)
class AdaptiveTemperature:
    """tau_i = tau exp(-c tanh(log(s_i / median s))): low where the student is far off, high where it is close.

    IDTS of AdaKD, arXiv 2510.11615; s_i is the Hellinger distance of the two rows at temperature 1. With c = 1/2 tau_i
    stays within a factor of 0.607 to 1.649.

    Attributes:
        strength: c, not negative; 0 changes nothing.
        median: of s over the tokens of a step; None takes that of the tokens that are given at once.
    """

    strength: float = 0.5
    median: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise LimbeckError(f"adaptive temperature strength={self.strength}: expected zero or more, such as 0.5")

    def tau(self, base: float, difficulty_N: Tensor) -> Tensor:
        """One temperature per token (N,) from its difficulty."""
        if not difficulty_N.numel():
            return difficulty_N
        smallest = torch.finfo(difficulty_N.dtype).tiny
        difficulty_N = difficulty_N.clamp_min(smallest)
        median = difficulty_N.median() if self.median is None else max(self.median, smallest)
        return base * (-self.strength * (difficulty_N / median).log().tanh()).exp()


@dataclass(frozen=True, kw_only=True, eq=False)
class Temperature:
    """The temperatures of a loss: softmax(logits / tau).

    Attributes:
        loss: tau of both sides, a number or a tensor (N,) with one tau a token. No gradient flows into it.
        student: the student's own tau; None takes `loss`.
        teacher: the teacher's own tau; None takes `loss`.
        scale: the factor on the loss. "auto" is the power of tau that keeps the gradient's size (tau^2 for functions of
            two probability rows, tau for total variation, 1 where the residual is not tempered); "none" is 1; "tau"
            and "tau2" are what they say, with the student's tau; a number is itself.
        adapt: one tau a token around `loss`, by how far apart the two models are there. It costs a second projection.

    Raises:
        LimbeckError: for a tau that is not positive and finite, an unknown scale, or "auto" with two different taus,
            for which no neutral factor exists.
    """

    loss: float | Tensor = 1.0
    student: float | Tensor | None = None
    teacher: float | Tensor | None = None
    scale: TemperatureScale = "auto"
    adapt: AdaptiveTemperature | None = None

    def __post_init__(self) -> None:
        for name in ("loss", "student", "teacher"):
            _check_tau(name, getattr(self, name))
        if isinstance(self.scale, str):
            if self.scale not in SCALES:
                raise LimbeckError(
                    f"temperature scale {self.scale!r} is unknown: use one of {', '.join(SCALES)} or a number"
                )
        elif not (math.isfinite(self.scale) and self.scale > 0):
            raise LimbeckError(f"temperature scale {self.scale} is no factor: use a positive number")
        if self.scale == "auto" and not _same(self.student_tau, self.teacher_tau):
            raise LimbeckError(
                "temperature scale 'auto' with different temperatures of student and teacher: no neutral factor "
                "exists; set scale to none, tau, tau2 or a number"
            )

        own = isinstance(self.loss, Tensor) or self.student is not None or self.teacher is not None
        if self.adapt is not None and own:
            raise LimbeckError("temperature adapt with taus of its own: it starts from one number, set loss only")

    @property
    def largest(self) -> float:
        """The largest temperature of any token and side."""
        return max((float(tau.max()) for tau in self._sides() if tau.numel()), default=1.0)

    @property
    def tempers(self) -> bool:
        """Whether any token of any side has a temperature other than 1."""
        return any(bool((tau != 1).any()) for tau in self._sides())

    def _sides(self) -> tuple[Tensor, Tensor]:
        student, teacher = (torch.as_tensor(tau).detach() for tau in (self.student_tau, self.teacher_tau))
        return student, teacher

    @property
    def student_tau(self) -> float | Tensor:
        return self.loss if self.student is None else self.student

    @property
    def teacher_tau(self) -> float | Tensor:
        return self.loss if self.teacher is None else self.teacher

    def at(self, progress: float) -> Temperature:
        """This temperature, at any share of the training; `TemperatureSchedule` changes it."""
        del progress
        return self

    def columns(self, tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """The two temperatures as columns (N, 1)."""
        student, teacher = (_column(tau, tokens, dtype, device) for tau in (self.student_tau, self.teacher_tau))
        return student, teacher

    def factor(self, order: int) -> float | None:
        """The resolved factor for an objective of this order; None where it differs by token."""
        if not isinstance(self.scale, str):
            return float(self.scale)
        power = {"auto": order, "none": 0, "tau": 1, "tau2": 2}[self.scale]
        if power == 0:
            return 1.0
        return None if isinstance(self.student_tau, Tensor) else float(self.student_tau) ** power

    def record(self, objective: Objective) -> dict[str, float | str | None]:
        """Record for a run: temperatures, scale and the resulting factor (None: by token or by part)."""
        student, teacher = (None if isinstance(t, Tensor) else float(t) for t in (self.student_tau, self.teacher_tau))
        factor = None if objective.order is None else self.factor(objective.order)
        if self.adapt is not None:
            factor = None
        strength = None if self.adapt is None else self.adapt.strength
        return {"student": student, "teacher": teacher, "scale": self.scale, "factor": factor, "adapt": strength}

    def check(self, objective: Objective) -> None:
        """Warnings of combinations of temperatures that are known to mislead."""
        largest = self.largest
        if largest > FLAT_ABOVE:
            warnings.warn(
                f"temperature {largest:g} is above {FLAT_ABOVE:g}: the loss is close to matching logits", stacklevel=3
            )
        if objective.order == 1 and self.scale == "tau2" and self.tempers:
            warnings.warn(
                f"scale tau2 with {objective.name}: its neutral factor is tau; tau2 grows with tau", stacklevel=3
            )
        if objective.caution and self.tempers:
            warnings.warn(objective.caution, stacklevel=3)


@dataclass(frozen=True, kw_only=True)
class TemperatureSchedule:
    """A temperature that moves over training, between its ends.

    Attributes:
        start, end: the loss temperature at progress 0 and 1.
        shape: "linear" or "cosine" (half a cosine, flat at both ends).
        scale, adapt: as in `Temperature`.
    """

    start: float
    end: float
    shape: Literal["linear", "cosine"] = "cosine"
    scale: TemperatureScale = "auto"
    adapt: AdaptiveTemperature | None = None

    def __post_init__(self) -> None:
        if self.shape not in ("linear", "cosine"):
            raise LimbeckError(f"temperature schedule shape={self.shape!r}: expected linear or cosine")
        self.at(0.0)
        self.at(1.0)

    def at(self, progress: float) -> Temperature:
        """The temperature when this share of the training is done; progress is kept within [0, 1]."""
        progress = min(max(progress, 0.0), 1.0)
        moved = progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
        loss = self.start + (self.end - self.start) * moved
        return Temperature(loss=loss, scale=self.scale, adapt=self.adapt)

    def record(self, objective: Objective) -> dict[str, float | str | None]:
        """Record for a run: the two ends and their factors. See `Temperature.record`."""
        first, last = self.at(0.0).record(objective), self.at(1.0).record(objective)
        return first | {f"{name}_end": last[name] for name in ("student", "teacher", "factor")} | {"shape": self.shape}


def scaled(objective: Objective, rows: Rows) -> tuple[Tensor, Tensor]:
    """Value and gradient of an objective, the temperature's factor included."""
    value_N, grad_NK = objective.value_and_grad(rows)
    if objective.order is None:
        return value_N, grad_NK
    factor_N1 = rows.factor_N1(objective.order)
    return value_N * (factor_N1.squeeze(-1) if isinstance(factor_N1, Tensor) else factor_N1), grad_NK * factor_N1


def _check_tau(name: str, tau: float | Tensor | None) -> None:
    if tau is None:
        return
    if isinstance(tau, Tensor):
        good = bool(torch.isfinite(tau).all()) and bool((tau > 0).all())
        if tau.dim() != 1 or not good:
            raise LimbeckError(
                f"temperature {name}: a tensor of shape {tuple(tau.shape)}; expected (N,), positive and finite"
            )
    elif isinstance(tau, bool) or not isinstance(tau, (int, float)) or not (math.isfinite(tau) and tau > 0):
        raise LimbeckError(
            f"temperature {name} is {tau!r}: expected a positive number; 1 leaves the logits as they are"
        )


def _same(student: float | Tensor, teacher: float | Tensor) -> bool:
    if student is teacher:
        return True
    return torch.equal(torch.as_tensor(student, dtype=torch.float64), torch.as_tensor(teacher, dtype=torch.float64))


def _column(tau: float | Tensor, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not isinstance(tau, Tensor):
        return torch.full((tokens, 1), float(tau), dtype=dtype, device=device)
    if tau.shape != (tokens,):
        raise LimbeckError(f"temperature of shape {tuple(tau.shape)} for {tokens} tokens: give one tau a token")
    return tau.detach().to(device=device, dtype=dtype).unsqueeze(-1)
