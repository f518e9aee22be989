"""Advantages from the tokens still to come: the long-term part of MiniLLM's policy gradient."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from limbeck.objectives.sequence.importance import importance_weight
from limbeck.types import LimbeckError

Importance = Literal["step", "sequence", "policy"]


@torch.no_grad()
def minillm_advantage(
    log_q_N: Tensor,
    log_p_N: Tensor,
    log_drawn_N: Tensor | None,
    sequence_N: Tensor,
    *,
    gamma: float = 1.0,
    length_norm: bool = True,
    own_reward: bool = False,
    reward_scaling: float = 1.0,
    clip_reward: float = 0.0,
    clip_weight: float = 0.0,
    clip_ratio: float = 0.0,
    importance: Importance = "step",
    whitening: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantage of each token by the later tokens of its response: (advantage_N, weight_N), without gradient.

    MiniLLM, arXiv 2306.08543, section 2.2: the gradient of sequence-level KL(q||p) on responses of the student is
    sum_t [grad KL_t(q||p) - R_{t+1} grad log q(y_t)], KL_t over the whole vocabulary after the tokens before t, and
    R_{t+1} the sum of the later rewards r = log p - log q. So `rkl` and `policy_gradient` with this advantage, at
    temperature 1 and a weight of weight_N times a constant for every token, are that gradient: exactly, in
    expectation, with gamma = 1, no length norm and nothing clipped, on responses drawn from q at temperature 1.

    R_{t+1} = sum_{k >= 1} gamma^k r_{t+k}, so gamma = 0 leaves the single-step part alone. With `length_norm` it is
    divided by the number of later tokens (the paper's T - t - 1, t from 0). The last token's is 0. The released code
    takes the token's own reward in too (`own_reward`): R_t = sum_{k >= 0} gamma^k r_{t+k}, over T - t; beside `rkl` the
    single-step part then counts twice, while `policy_gradient` alone is the whole gradient (REINFORCE).

    Where the responses were drawn from something else (the paper: 0.2 p + 0.8 q at each token), weight_N repairs it.
    "step" is the paper's q / drawn of the token itself: low variance (at most 1.25 there), and biased, as it leaves
    the tokens before and after as they were drawn; on the tables of the tests it is no nearer to the gradient than no
    weight. "sequence" is the ratio of the whole response: unbiased, of a variance that grows exponentially with length.
    "policy" is the released code's: the ratio of the token itself, on the advantage alone.

    Args:
        log_q_N: the student's log-probabilities, from `label_logp`.
        log_p_N: the teacher's.
        log_drawn_N: log-probability each token was drawn with; None where the student drew them (weight 1).
        sequence_N: the row of each token, int64, row by row.
        gamma: discount, in [0, 1]; 0.95 in the released code.
        reward_scaling: rewards are divided by it before they are clipped; 0.5 in the released code.
        clip_reward: rewards stay within plus and minus this; 0 is off.
        clip_weight: no weight is above this; 0 is off.
        clip_ratio: the epsilon of PPO (Schulman et al. 2017), 0.2 in the released code; 0 is off. The advantage is 0
            where it is positive and the ratio above 1 + epsilon, or negative and the ratio below 1 - epsilon: there the
            minimum of the clipped and the plain objective has no gradient. The single-step part is not clipped.
        whitening: mean and standard deviation of the advantages of the step: they are centred and divided by these.

    Raises:
        LimbeckError: for an option out of range, or tokens that are not row by row.
    """
    check_minillm(gamma, reward_scaling, clip_reward, clip_weight, clip_ratio, importance)
    if bool((sequence_N.diff() < 0).any()):
        raise LimbeckError("minillm sequence_N is not in order: expected the tokens row by row, as TokenBatch has them")
    if not log_q_N.numel():
        return log_q_N, log_q_N
    advantage_N = minillm_return(
        log_q_N,
        log_p_N,
        sequence_N,
        gamma=gamma,
        length_norm=length_norm,
        own_reward=own_reward,
        reward_scaling=reward_scaling,
        clip_reward=clip_reward,
    )
    if whitening is not None:
        mean, deviation = whitening
        advantage_N = (advantage_N - mean) / deviation
    weight_N = torch.ones_like(log_q_N)
    if log_drawn_N is not None:
        ratio = "sequence" if importance == "sequence" else "step"
        weight_N = importance_weight(log_q_N, log_drawn_N, sequence_N, ratio=ratio, clip_weight=clip_weight)
    if clip_ratio:
        beyond_N = torch.where(advantage_N > 0, weight_N > 1 + clip_ratio, weight_N < 1 - clip_ratio)
        advantage_N = advantage_N.masked_fill(beyond_N, 0.0)
    if importance == "policy":
        return advantage_N * weight_N, torch.ones_like(weight_N)
    return advantage_N, weight_N


@torch.no_grad()
def minillm_return(
    log_q_N: Tensor,
    log_p_N: Tensor,
    sequence_N: Tensor,
    *,
    gamma: float,
    length_norm: bool,
    own_reward: bool,
    reward_scaling: float,
    clip_reward: float,
) -> Tensor:
    """The discounted rewards of the tokens after each one, or from it on: see `minillm_advantage`."""
    reward_N = log_p_N - log_q_N
    if not reward_N.numel():
        return reward_N
    if reward_scaling != 1.0:
        reward_N = reward_N / reward_scaling
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
    left_N = length_B[sequence_N] - time_N
    if own_reward:
        return_N = return_BT[sequence_N, time_N]
    else:
        return_N, left_N = gamma * pad(return_BT[:, 1:], (0, 1))[sequence_N, time_N], left_N - 1
    return return_N / left_N.clamp_min(1) if length_norm else return_N


def check_minillm(
    gamma: float, reward_scaling: float, clip_reward: float, clip_weight: float, clip_ratio: float, importance: str
) -> None:
    """Refuse options out of range.

    Raises:
        LimbeckError: naming the first of them.
    """
    if not 0 <= gamma <= 1:
        raise LimbeckError(f"minillm gamma={gamma}: expected a number in [0, 1]; 1 does not discount")
    if not 0 < reward_scaling < math.inf:
        raise LimbeckError(f"minillm reward_scaling={reward_scaling}: expected a number above 0; 1 changes nothing")
    for name, value in (("clip_reward", clip_reward), ("clip_weight", clip_weight)):
        if not value >= 0:
            raise LimbeckError(f"minillm {name}={value}: expected zero (off) or more")
    if not 0 <= clip_ratio < 1:
        raise LimbeckError(f"minillm clip_ratio={clip_ratio}: expected zero (off) or less than 1, such as 0.2")
    if importance not in get_args(Importance):
        raise LimbeckError(f"minillm importance={importance!r}: expected one of {', '.join(get_args(Importance))}")
