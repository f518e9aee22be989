"""Rules over whole responses: token options and weights from the log-probabilities of both models.

An objective reads one token of one response. A rule first reads the log-probabilities of all tokens of some responses,
and gives token options (`alpha`, `advantage`) and weights. Adding one: a frozen dataclass with its formula and source,
and a line in `RULES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from limbeck.objectives.sequence.distillm2 import AdaptiveAlpha, dpkd_advantage, sequence_mean
from limbeck.objectives.sequence.importance import Ratio, importance_weight
from limbeck.objectives.sequence.minillm import Importance, check_minillm, minillm_advantage, minillm_return
from limbeck.registry import Registry
from limbeck.types import LimbeckError


@dataclass(frozen=True, kw_only=True)
class SequenceStats:
    """Log-probabilities of both models for some responses.

    Attributes:
        log_q_N, log_p_N: log-probabilities of the response tokens at temperature 1.
        drawn_logp_N: log-probabilities that they were drawn with; NaN where the student drew them itself.
        sequence_N: the row of each token.
        by_student_B: whether the student wrote each row.
        partners: of each row the one with the other author's response to the same prompt; -1 for none.
        reference: the mean gap of responses by the teacher and by the student, once it is known.
        whitening: mean and standard deviation of `TokenOptions.plain_N` over the whole step, once they are known.
    """

    log_q_N: Tensor
    log_p_N: Tensor
    drawn_logp_N: Tensor
    sequence_N: Tensor
    by_student_B: Tensor
    partners: tuple[int, ...]
    reference: tuple[float, float] | None = None
    whitening: tuple[float, float] | None = None

    @property
    def log_drawn_N(self) -> Tensor:
        """Log-probability that each token was drawn with; where none was kept, the current student's own, a weight of
        1."""
        return torch.where(self.drawn_logp_N.isnan(), self.log_q_N, self.drawn_logp_N.to(self.log_q_N))

    def mean_B(self, value_N: Tensor) -> Tensor:
        """Mean over the tokens of each row."""
        return sequence_mean(value_N, self.sequence_N, len(self.by_student_B))


@dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """Output of a rule.

    Attributes:
        options: token options of the objective, each (N,).
        weight_N: factor on the weight of each token; None is 1.
        measured_B: metrics to log, one number per row.
        plain_N: values before whitening, of a rule that whitens.
    """

    options: Mapping[str, Tensor] = field(default_factory=dict)
    weight_N: Tensor | None = None
    measured_B: Mapping[str, Tensor] = field(default_factory=dict)
    plain_N: Tensor | None = None


class SequenceRule(Protocol):
    """A rule over whole responses. Implementations are frozen dataclasses: their fields are their options.

    Attributes:
        name: the key in `RULES`.
        measures: names of the metrics that are logged by row.
        option: the token option it gives; the objective must have it. None where it only gives weights.
        pairs: whether it needs two responses of one prompt side by side.
        whiten: whether it needs the mean and deviation of `TokenOptions.plain_N` over the step first.
        warmup_epochs: epochs in which its reference is measured and not given to it; 0 for a rule that has none.
    """

    @property
    def name(self) -> str: ...
    @property
    def measures(self) -> tuple[str, ...]: ...
    @property
    def option(self) -> str | None: ...
    @property
    def pairs(self) -> bool: ...
    @property
    def whiten(self) -> bool: ...
    @property
    def warmup_epochs(self) -> int: ...
    def apply(self, seen: SequenceStats) -> TokenOptions: ...


@dataclass(frozen=True, kw_only=True)
class AlphaByGap(AdaptiveAlpha):
    """DistiLLM-2's adaptive skew (arXiv 2503.07067, section 3.3); see `AdaptiveAlpha`.

    Attributes:
        warmup_epochs: epochs in which alpha is `alpha0` for all responses while the reference gaps are measured.
    """

    name = "adaptive_alpha"
    measures = ("gap", "alpha")
    option = "alpha"
    pairs = False
    whiten = False
    warmup_epochs = 0

    warmup_epochs: int = 1

    def __post_init__(self) -> None:
        AdaptiveAlpha.__post_init__(self)
        if self.warmup_epochs < 1:
            raise LimbeckError(
                f"adaptive_alpha warmup_epochs={self.warmup_epochs}: expected at least 1, in which the reference "
                "gap is measured"
            )

    def apply(self, seen: SequenceStats) -> TokenOptions:
        gap_B = self.gap_B(seen.mean_B(seen.log_q_N), seen.mean_B(seen.log_p_N), seen.by_student_B)
        if seen.reference is None:
            alpha_B = torch.full_like(gap_B, self.alpha0)
        else:
            theirs, own = seen.reference
            alpha_B = self.alpha_B(gap_B, torch.where(seen.by_student_B, own, theirs))
        return TokenOptions(options={"alpha": alpha_B[seen.sequence_N]}, measured_B={"gap": gap_B, "alpha": alpha_B})


@dataclass(frozen=True, kw_only=True)
class DPKD:
    """DPKD on sampled pairs (arXiv 2406.19774): see `dpkd_advantage`. With `policy_gradient` and a mean over sequences.

    Attributes:
        beta: of the log-sigmoid.
    """

    name = "dpkd"
    measures = ("dpkd",)
    option = "advantage"
    pairs = True
    whiten = False
    warmup_epochs = 0

    beta: float = 0.1

    def apply(self, seen: SequenceStats) -> TokenOptions:
        partner_B = torch.tensor(seen.partners, device=seen.log_q_N.device)
        advantage_N, loss_B = dpkd_advantage(
            seen.log_q_N, seen.log_p_N, seen.sequence_N, partner_B, seen.by_student_B, beta=self.beta
        )
        return TokenOptions(options={"advantage": advantage_N}, measured_B={"dpkd": loss_B})


@dataclass(frozen=True, kw_only=True)
class ImportanceWeights:
    """Weights for responses that an earlier student drew, or the teacher beside it: see `importance_weight`.

    With `opd` and the ratio of the token itself ("step") the expected gradient is that of `rkl` after the same tokens,
    of any author; with that of the response so far ("prefix") or of the whole one ("sequence") it is the gradient
    on responses of the current student, of a variance that grows with length. Tokens of other writers weigh 1.

    Attributes:
        importance: whose ratio.
        clip_weight: no weight is above this; 0 is off. A clipped estimate is biased.
    """

    name = "importance"
    measures = ("weight",)
    option = None
    pairs = False
    whiten = False
    warmup_epochs = 0

    importance: Ratio = "step"
    clip_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.importance not in get_args(Ratio):
            raise LimbeckError(f"importance={self.importance!r}: expected one of {', '.join(get_args(Ratio))}")
        if not self.clip_weight >= 0:
            raise LimbeckError(f"importance clip_weight={self.clip_weight}: expected zero (off) or more")

    def apply(self, seen: SequenceStats) -> TokenOptions:
        weight_N = importance_weight(
            seen.log_q_N, seen.log_drawn_N, seen.sequence_N, ratio=self.importance, clip_weight=self.clip_weight
        )
        return TokenOptions(weight_N=weight_N, measured_B={"weight": seen.mean_B(weight_N)})


@dataclass(frozen=True, kw_only=True)
class MiniLLM:
    """MiniLLM's long-term part and importance weights (arXiv 2306.08543): see `minillm_advantage`.

    With the sum of `rkl` (the single-step part, exact) and `policy_gradient`. Logged is the sampled reverse KL a token.

    Attributes:
        whiten: advantages minus their mean, over their standard deviation, of all tokens of the step. The released
            code does it, a micro-batch at a time.
    """

    name = "minillm"
    measures = ("reverse_kl",)
    option = "advantage"
    pairs = False
    warmup_epochs = 0

    gamma: float = 1.0
    length_norm: bool = True
    own_reward: bool = False
    reward_scaling: float = 1.0
    clip_reward: float = 0.0
    clip_weight: float = 0.0
    clip_ratio: float = 0.0
    importance: Importance = "step"
    whiten: bool = False

    def __post_init__(self) -> None:
        check_minillm(
            self.gamma, self.reward_scaling, self.clip_reward, self.clip_weight, self.clip_ratio, self.importance
        )

    def apply(self, seen: SequenceStats) -> TokenOptions:
        rewards: Any = {
            "gamma": self.gamma,
            "length_norm": self.length_norm,
            "own_reward": self.own_reward,
            "reward_scaling": self.reward_scaling,
            "clip_reward": self.clip_reward,
        }
        advantage_N, weight_N = minillm_advantage(
            seen.log_q_N,
            seen.log_p_N,
            seen.log_drawn_N,
            seen.sequence_N,
            clip_weight=self.clip_weight,
            clip_ratio=self.clip_ratio,
            importance=self.importance,
            whitening=seen.whitening,
            **rewards,
        )
        return TokenOptions(
            options={"advantage": advantage_N},
            weight_N=weight_N,
            measured_B={"reverse_kl": seen.mean_B(seen.log_q_N - seen.log_p_N)},
            plain_N=minillm_return(seen.log_q_N, seen.log_p_N, seen.sequence_N, **rewards) if self.whiten else None,
        )


RULES: Registry[Any] = Registry(
    "rule",
    {"adaptive_alpha": AlphaByGap, "dpkd": DPKD, "importance": ImportanceWeights, "minillm": MiniLLM},
    entry_points="limbeck.rules",
)


def build_rule(name: str, **options: object) -> SequenceRule:
    """The rule of this name with these options.

    Raises:
        LimbeckError: for an unknown name or option, with the nearest known one, or a value of the wrong kind.
    """
    return RULES.build(name, **options)
