"""Quantities of whole responses for contrastive methods: alpha by response, beta over training, DPKD's advantage.

An objective sees one token; these are numbers it is given beside it. None of them carries a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from limbeck.objectives.base import LOG_ZERO
from limbeck.objectives.divergences import check_fraction
from limbeck.objectives.fused.body import block_rows
from limbeck.objectives.fused.projection import gather_head
from limbeck.objectives.fused.tiles import logit_tiles
from limbeck.objectives.sums import IGNORED
from limbeck.types import DenseSignal, Head, LimbeckError, Signal

BetaShape = Literal["constant", "code", "linear", "sawtooth"]
# Gaps closer to zero than this count as this: the models agree.
SMALLEST_GAP = 1e-5


@torch.no_grad()
def label_logp(
    student_hidden_ND: Tensor, student_head: Head, signal: Signal, label_N: Tensor, tile_bytes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels at temperature 1, tile by tile: (log_q_N, log_p_N), in nats, without gradient.

    Args:
        label_N: the token that followed each position, int64; -100 counts as zero.

    Raises:
        LimbeckError: for a sparse signal, or where tokens, widths or vocabularies disagree.
    """
    if not isinstance(signal, DenseSignal):
        raise LimbeckError(
            f"a {type(signal).__name__} does not hold every label: expected the teacher's hidden states and head"
        )
    if label_N.shape != student_hidden_ND.shape[:1]:
        raise LimbeckError(f"label_N has shape {tuple(label_N.shape)}: expected {tuple(student_hidden_ND.shape[:1])}")
    head, signal = gather_head(student_head), DenseSignal(hidden_ND=signal.hidden_ND, head=gather_head(signal.head))
    found: list[list[Tensor]] = [[student_hidden_ND.new_zeros(0, dtype=torch.float32)] for _ in range(2)]
    for tokens, student_NV, teacher_NV in logit_tiles(student_hidden_ND, head, signal, tile_bytes):
        size = block_rows(student_NV.shape[1], student_NV.dtype, student_NV.device)
        for values, logits_NV in zip(found, (student_NV, teacher_NV), strict=True):
            for logits, label in zip(logits_NV.split(size), label_N[tokens].split(size), strict=True):
                at_label = logits.gather(-1, label.clamp_min(0).unsqueeze(-1)).squeeze(-1)
                logp = (at_label - logits.logsumexp(-1)).clamp_min(LOG_ZERO)
                values.append(torch.where(label == IGNORED, 0.0, logp))
    log_q_N, log_p_N = (torch.cat([v.to(values[-1].dtype) for v in values]) for values in found)
    return log_q_N, log_p_N


def sequence_mean(value_N: Tensor, sequence_N: Tensor, rows: int) -> Tensor:
    """Mean of the tokens of each row (B,), differentiable; 0 for a row without tokens.

    Args:
        sequence_N: the row of each token, int64 from 0, as `TokenBatch.sequence_N`.
    """
    count_B = torch.bincount(sequence_N, minlength=rows).clamp_min(1)
    return value_N.new_zeros(rows).index_add(0, sequence_N, value_N) / count_B


@dataclass(frozen=True, kw_only=True)
class AdaptiveAlpha:
    """alpha = clip(1 - (1 - alpha0) m / gap, low, high): a smaller skew for responses on which the models nearly agree.

    DistiLLM-2, arXiv 2503.07067, eq. 7 and section 3.3, with the signs of the derivation (Algorithm 1 as printed swaps
    them): it asks for (1 - alpha) gap = (1 - alpha0) m, m the mean gap of the first epoch. With alpha0 = high = 0.1 and
    low = 0.01 it is nearly a switch: high from gap = m on, low up to 0.909 m.

    Attributes:
        alpha0: alpha of a response whose gap is m, in (0, 1); that of all responses while m is being measured.
        low, high: bounds of alpha, in (0, 1).
    """

    alpha0: float = 0.1
    low: float = 0.01
    high: float = 0.1

    def __post_init__(self) -> None:
        for name in ("alpha0", "low", "high"):
            check_fraction("adaptive alpha", name, getattr(self, name))
        if self.low > self.high:
            raise LimbeckError(f"adaptive alpha low={self.low}, high={self.high}: expected low to be at most high")

    def gap_B(self, log_q_B: Tensor, log_p_B: Tensor, by_student_B: Tensor) -> Tensor:
        """Excess probability that its author gives each response: P - Q of the teacher's, Q - P of the student's.

        P = exp(mean log p) over the tokens of the response, Q likewise; in (-1, 1). Detached.

        Args:
            log_q_B: the student's mean log-probability per token at temperature 1: `label_logp`, then `sequence_mean`.
            log_p_B: the teacher's.
            by_student_B: True where the student wrote the response (bool).
        """
        gap_B = (log_p_B.exp() - log_q_B.exp()).detach()
        return torch.where(by_student_B, -gap_B, gap_B)

    def alpha_B(self, gap_B: Tensor, reference: Tensor | float) -> Tensor:
        """Alpha of each response, detached.

        A gap below -1e-5 (the author finds its own response less likely than the other model does) gives `high`, as the
        formula does for a positive reference. A gap within 1e-5 of zero counts as 1e-5, an easy response: `low`.

        Args:
            reference: m, one number or one per response (teacher's and student's responses have one each). Where it is
                not positive there is nothing to be easier than: `high`.
        """
        gap_B = gap_B.detach()
        alpha_B = (1 - (1 - self.alpha0) * reference / gap_B.clamp_min(SMALLEST_GAP)).clamp(self.low, self.high)
        return torch.where(gap_B < -SMALLEST_GAP, self.high, alpha_B).detach()


@dataclass(frozen=True, kw_only=True)
class Beta:
    """beta over training: the share of the student's responses in (1 - beta) D(teacher's) + beta D(student's).

    DistiLLM-2, arXiv 2503.07067, section 3.3. "code": from `start` to `end` over the first half, then constant (the
    released code's, 0.5 to 0.75). "linear": max(start, share of the training done), how the prose reads. "sawtooth":
    max(start, e/E + t/T) of epoch e of E and iteration t of T, both from 1 (Algorithm 1 to the letter with end = 1):
    it starts anew every epoch, and a run of one epoch is at `end` throughout. "constant": `start`.

    Attributes:
        shape: one of the four.
        start: beta0, in [0, 1].
        end: no shape goes beyond it, in [start, 1]. At beta = 1 the teacher's responses no longer count, hence the
            default.
    """

    shape: BetaShape = "constant"
    start: float = 0.5
    end: float = 0.75

    def __post_init__(self) -> None:
        if self.shape not in get_args(BetaShape):
            raise LimbeckError(f"beta shape={self.shape!r}: expected one of {', '.join(get_args(BetaShape))}")
        for name in ("start", "end"):
            if not 0 <= getattr(self, name) <= 1:
                raise LimbeckError(f"beta {name}={getattr(self, name)}: expected a number in [0, 1]")
        if self.shape != "constant" and self.start > self.end:
            raise LimbeckError(f"beta start={self.start}, end={self.end}: expected start to be at most end")

    def at(self, step: int, total: int, steps_per_epoch: int) -> float:
        """beta of an optimizer step.

        Args:
            step: the steps done before it, from 0.
            total: the steps of the whole training, at least 1.
            steps_per_epoch: at least 1; read by "sawtooth" alone.
        """
        assert total > 0 and steps_per_epoch > 0, "a training has steps"
        if self.shape == "constant":
            return self.start
        if self.shape == "code":
            return self.start + (self.end - self.start) * min(1.0, 2 * step / total)
        wanted = step / total
        if self.shape == "sawtooth":
            epochs = math.ceil(total / steps_per_epoch)
            wanted = (step // steps_per_epoch + 1) / epochs + (step % steps_per_epoch + 1) / steps_per_epoch
        return min(max(wanted, self.start), self.end)


def dpkd_advantage(
    log_q_N: Tensor, log_p_N: Tensor, sequence_N: Tensor, partner_B: Tensor, by_student_B: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """DPKD on sampled pairs: (advantage_N, loss_B), so that `policy_gradient` has the gradient of the pairs' loss.

    DPKD, arXiv 2406.19774, in the form of the DistiLLM-2 code: -log sigmoid(beta Delta) with Delta = [log q(y_t) - log
    q(y_s)] - [log p(y_t) - log p(y_s)], y_t the teacher's response, y_s the student's, each the MEAN log-probability of
    its tokens at temperature 1.

    The advantage is beta sigmoid(-beta Delta) on each token of y_t, its negative on those of y_s, WITHOUT the 1/length.
    Where each token weighs c over the length of its own row (a mean over rows), `policy_gradient` summed over both rows
    has exactly the gradient of c times the pair's loss: c = 1/pairs is the mean over pairs, c = 1/rows half of it.
    Rows without a partner get 0.

    Args:
        log_q_N: the student's log-probabilities, from `label_logp`.
        log_p_N: the teacher's.
        partner_B: the row of the same prompt by the other author, int64; -1 for none.
        by_student_B: True where the student wrote the row (bool).
        beta: positive; 0.1 in the paper.

    Returns:
        loss_B holds the pair's loss at both of its rows, 0 where there is no partner.
    """
    if not (math.isfinite(beta) and beta > 0):
        raise LimbeckError(f"dpkd beta={beta}: expected a positive number, such as 0.1")
    ratio_B = sequence_mean((log_q_N - log_p_N).detach(), sequence_N, len(partner_B))
    sign_B = 1 - 2 * by_student_B.to(ratio_B.dtype)
    paired_B = partner_B >= 0
    margin_B = beta * sign_B * (ratio_B - ratio_B[partner_B.clamp_min(0)])
    advantage_B = torch.where(paired_B, beta * sign_B * (-margin_B).sigmoid(), 0.0)
    return advantage_B[sequence_N], torch.where(paired_B, -logsigmoid(margin_B), 0.0)
