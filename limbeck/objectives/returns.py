"""Advantages from the tokens still to come: the long-term part of MiniLLM's policy gradient."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from limbeck.flow import LimbeckError

Importance = Literal["step", "sequence"]


@torch.no_grad()
def minillm_advantage(
    log_q_N: Tensor,
    log_p_N: Tensor,
    log_drawn_N: Tensor | None,
    sequence_N: Tensor,
    *,
    gamma: float = 1.0,
    length_norm: bool = True,
    clip_reward: float = 0.0,
    clip_weight: float = 0.0,
    importance: Importance = "step",
) -> tuple[Tensor, Tensor]:
    """What the later tokens of a sampled response say of each token: (advantage_N, weight_N), without gradient.

    MiniLLM, arXiv 2306.08543, section 2.2: the gradient of sequence-level KL(q||p) on responses of the student is
    sum_t [grad KL_t(q||p) - R_{t+1} grad log q(y_t)], KL_t over the whole vocabulary after the tokens before t, and
    R_{t+1} the sum of the later rewards r = log p - log q. So `rkl` and `policy_gradient` with this advantage, at
    temperature 1 and a weight of weight_N times a constant for every token, are that gradient: exactly, in
    expectation, with gamma = 1, no length norm and nothing clipped, on responses drawn from q at temperature 1.

    R_{t+1} = sum_{k >= 1} gamma^k r_{t+k}, so gamma = 0 leaves the single-step part alone. With `length_norm` it is
    divided by the number of later tokens (the paper's T - t - 1, t from 0). The last token's is 0.

    Where the responses were drawn from something else (the paper: 0.2 p + 0.8 q at each token), weight_N repairs it.
    "step" is the paper's q / drawn of the token itself: low variance (at most 1.25 there), and biased, as it leaves
    the tokens before and after as they were drawn; on the tables of the tests it is no nearer to the gradient than no
    weight. "sequence" is the ratio of the whole response: unbiased, of a variance that grows exponentially with length.

    Args:
        log_q_N, log_p_N: from `label_logp`.
        log_drawn_N: log-probability each token was drawn with; None where the student drew them (weight 1).
        sequence_N: the row of each token, int64, row by row.
        gamma: discount, in [0, 1]; 0.95 in the released code.
        clip_reward: rewards stay within plus and minus this; 0 is off.
        clip_weight: no weight is above this; 0 is off.

    Raises:
        LimbeckError: for an option out of range, or tokens that are not row by row.
    """
    _check(gamma, clip_reward, clip_weight, importance, sequence_N)
    if not log_q_N.numel():
        return log_q_N, log_q_N
    reward_N = log_p_N - log_q_N
    if clip_reward:
        reward_N = reward_N.clamp(-clip_reward, clip_reward)
    length_B = torch.bincount(sequence_N)
    first_B = length_B.cumsum(0) - length_B
    time_N = torch.arange(len(sequence_N), device=sequence_N.device) - first_B[sequence_N]
    steps = int(length_B.max())
    return_BT = reward_N.new_zeros(len(length_B), steps)
    return_BT[sequence_N, time_N] = reward_N
    # S_t = r_t + gamma S_{t+1}, by doubling: after each turn an entry holds twice as many rewards.
    held = 1
    while held < steps:
        return_BT = return_BT + gamma**held * pad(return_BT[:, held:], (0, held))
        held *= 2
    advantage_N = gamma * pad(return_BT[:, 1:], (0, 1))[sequence_N, time_N]
    if length_norm:
        advantage_N = advantage_N / (length_B[sequence_N] - time_N - 1).clamp_min(1)
    return advantage_N, _weight(log_q_N, log_drawn_N, sequence_N, clip_weight, importance)


def _weight(
    log_q_N: Tensor, log_drawn_N: Tensor | None, sequence_N: Tensor, clip_weight: float, importance: Importance
) -> Tensor:
    if log_drawn_N is None:
        return torch.ones_like(log_q_N)
    log_weight_N = log_q_N - log_drawn_N.to(log_q_N)
    if importance == "sequence":
        total_B = log_weight_N.new_zeros(int(sequence_N.max()) + 1).index_add(0, sequence_N, log_weight_N)
        log_weight_N = total_B[sequence_N]
    weight_N = log_weight_N.exp()
    return weight_N.clamp_max(clip_weight) if clip_weight else weight_N


def _check(gamma: float, clip_reward: float, clip_weight: float, importance: str, sequence_N: Tensor) -> None:
    if not 0 <= gamma <= 1:
        raise LimbeckError(f"minillm gamma={gamma}: expected a number in [0, 1]; 1 does not discount")
    for name, value in (("clip_reward", clip_reward), ("clip_weight", clip_weight)):
        if not value >= 0:
            raise LimbeckError(f"minillm {name}={value}: expected zero (off) or more")
    if importance not in get_args(Importance):
        raise LimbeckError(f"minillm importance={importance!r}: expected one of {', '.join(get_args(Importance))}")
    if bool((sequence_N.diff() < 0).any()):
        raise LimbeckError("minillm sequence_N is not in order: expected the tokens row by row, as TokenBatch has them")
