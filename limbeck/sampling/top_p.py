"""Sampling of token ids from logits: temperature, top-k, top-p and a few uniform numbers per row.

The nucleus (Holtzman et al. 2020, arXiv:1904.09751) is usually found by sorting the vocabulary: 49152 entries for 48
rows cost as much as the model's own step. No order is needed to draw from it. A token is drawn from the whole
distribution, and kept when the tokens more likely than it hold less than `top_p`: two passes over the row. Kept
tokens follow the nucleus exactly, and at least a share `top_p` of the draws is kept; a row whose draws are all
refused is sorted after all.

What a row draws depends on its logits and its own numbers, never on other rows. Shape suffixes: B rows, V vocabulary, R
rows of a group, K candidates, C chunks of the vocabulary with X entries each, A attempts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.types import Sampling

ATTEMPTS = 4
WIDTHS = (64, 1024)
CHUNK = 256
# Drawers of weights: so many for each factor e, down to e^-32 of the largest.
DRAWERS_PER_E, DRAWERS = 16, 512


def draw(logits_BV: Tensor, uniform_BA: Tensor, sampling: Sampling) -> Tensor:
    """One token id for every row: (B,), int64.

    Equals, in distribution, ``multinomial(softmax(warped))`` with the logits divided by the temperature, then cut to
    the `top_k` largest, then cut to the smallest set of most likely tokens whose mass reaches `top_p`, never less
    than one.

    Args:
        logits_BV: finite, real vocabulary only, float32 or float64.
        uniform_BA: in [0, 1), float64, `ATTEMPTS` + 1 numbers for each row. Not used when the temperature is 0 (the arg
            max is taken).
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        return _draw_sorted(logits_BV, uniform_BA[:, -1], sampling)
    weight_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    weight_BV = weight_BV.div_(sampling.temperature).exp_()
    ids_B = pick(weight_BV, uniform_BA[:, 0])
    if sampling.top_p == 1:
        return ids_B
    open_R = torch.arange(len(ids_B), device=ids_B.device)
    weight_RV, refused_R = weight_BV, ~inside(weight_BV, ids_B, sampling.top_p)
    for attempt in range(1, ATTEMPTS):
        if not refused_R.any():
            return ids_B
        open_R, weight_RV = open_R[refused_R], weight_RV[refused_R]
        ids_R = pick(weight_RV, uniform_BA[open_R, attempt])
        ids_B[open_R] = ids_R
        refused_R = ~inside(weight_RV, ids_R, sampling.top_p)
    open_R = open_R[refused_R]
    ids_B[open_R] = _draw_sorted(logits_BV[open_R], uniform_BA[open_R, -1], sampling)
    return ids_B


def inside(weight_RV: Tensor, ids_R: Tensor, top_p: float) -> Tensor:
    """Whether each token is in its row's nucleus: (R,), bool. Of equally likely tokens the lower ids come first.

    Args:
        weight_RV: probabilities up to a factor of the row.
    """
    own_R = weight_RV.gather(-1, ids_R[:, None])[:, 0]
    total_R = weight_RV.sum(-1)
    # The tokens before a token that holds more than 1 - top_p cannot hold top_p: most rows need no second pass.
    inside_R = own_R > (1 - top_p) * total_R
    rows = (~inside_R).nonzero()[:, 0]
    if len(rows):
        weight_RV, own_R1, ids_R1 = weight_RV[rows], own_R[rows, None], ids_R[rows, None]
        before_R = torch.where(weight_RV > own_R1, weight_RV, 0).sum(-1)
        positions_V = torch.arange(weight_RV.shape[-1], device=weight_RV.device)
        earlier_R = ((weight_RV == own_R1) & (positions_V < ids_R1)).sum(-1)
        inside_R[rows] = before_R + earlier_R * own_R1[:, 0] < top_p * total_R[rows]
    return inside_R


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that `draw` draws from, zeros included: (B, V), in the precision of the logits.

    Greedy decoding is the distribution with all mass on the arg max.
    """
    if sampling.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(-1, logits_BV.argmax(-1, keepdim=True), 1.0)
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        ((_, ids_BK, weight_BK),) = nucleus(logits_BV, sampling)
        share_BK = weight_BK / weight_BK.sum(-1, keepdim=True)
        return torch.zeros_like(logits_BV).scatter_(-1, ids_BK, share_BK.to(logits_BV.dtype))
    if sampling.top_p == 1:
        return (logits_BV / sampling.temperature).softmax(-1)
    depth_BV = (logits_BV.amax(-1, keepdim=True) - logits_BV).div_(sampling.temperature)
    weight_BV = _without_tail(depth_BV, sampling.top_p)
    return weight_BV.div_(weight_BV.sum(-1, keepdim=True))


def _without_tail(depth_BV: Tensor, top_p: float) -> Tensor:
    """Weights exp(-depth) of the nucleus, zero outside it: (B, V). Overwrites the depths.

    Weights are counted in drawers by their logarithm; only those of the drawer in which the mass reaches `top_p` are
    put in order. For 48 rows of 49152 that takes a fifth of sorting.
    """
    weight_BV = depth_BV.neg().exp_()
    drawer_BV = depth_BV.mul_(DRAWERS_PER_E).clamp_(max=DRAWERS - 1).long()
    mass_BC = torch.zeros(len(weight_BV), DRAWERS, dtype=torch.float64, device=weight_BV.device)
    mass_BC.scatter_add_(1, drawer_BV, weight_BV.double())
    cumulative_BC = mass_BC.cumsum(-1)
    wanted_B1 = top_p * cumulative_BC[:, -1:]
    edge_B1 = (cumulative_BC < wanted_B1).sum(-1, keepdim=True).clamp_(max=DRAWERS - 1)
    before_B1 = (cumulative_BC - mass_BC).gather(-1, edge_B1)
    row_E, id_E = (drawer_BV == edge_B1).nonzero(as_tuple=True)
    count_B = torch.bincount(row_E, minlength=len(weight_BV))
    place_E = torch.arange(len(row_E), device=row_E.device) - (count_B.cumsum(0) - count_B)[row_E]
    edge_BX = weight_BV.new_full((len(weight_BV), int(count_B.max())), -1.0)
    edge_BX[row_E, place_E] = weight_BV[row_E, id_E]
    sorted_BX, order_BX = edge_BX.sort(dim=-1, descending=True, stable=True)
    sum_BX = sorted_BX.clamp(min=0).double().cumsum(-1)
    kept_BX = (before_B1 + sum_BX - sorted_BX < wanted_B1) & (sorted_BX >= 0)
    # Never less than one token: rounding may leave the edge's first outside.
    kept_BX[:, 0] = True
    inside_BX = torch.zeros_like(kept_BX).scatter_(-1, order_BX, kept_BX)
    outside_E = ~inside_BX[row_E, place_E]
    weight_BV.masked_fill_(drawer_BV > edge_B1, 0.0)
    weight_BV[row_E[outside_E], id_E[outside_E]] = 0.0
    return weight_BV


def _draw_sorted(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> Tensor:
    ids_B = torch.empty(len(logits_BV), dtype=torch.long, device=logits_BV.device)
    for rows, ids_RK, weight_RK in nucleus(logits_BV, sampling):
        cumulative_RK = weight_RK.cumsum(-1)
        target_R1 = uniform_B[rows, None] * cumulative_RK[:, -1:]
        rank_R1 = (cumulative_RK <= target_R1).sum(-1, keepdim=True)
        # Rounding may push a target onto the total; the last token of the nucleus is then the one meant.
        last_R1 = (weight_RK > 0).sum(-1, keepdim=True) - 1
        ids_B[rows] = ids_RK.gather(-1, rank_R1.minimum(last_R1))[:, 0]
    return ids_B


def nucleus(logits_BV: Tensor, sampling: Sampling) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The tokens that may be drawn and their weights, in groups of rows that needed the same number of candidates.

    A row is looked at through its 64 most likely tokens, and through 1024 or all of them only if its nucleus is wider.

    Returns:
        Tuples (rows, ids_RK, weight_RK): row indices of the group, candidate ids from most to least likely, and their
        probabilities in float64, zero for candidates outside the nucleus. Every row is in exactly one group.
    """
    vocab = logits_BV.shape[-1]
    rows = torch.arange(len(logits_BV), device=logits_BV.device)
    if 0 < sampling.top_k < vocab:
        top_BK, ids_BK = logits_BV.topk(sampling.top_k, dim=-1)
        probability_BK = (top_BK.double() / sampling.temperature).softmax(-1)
        return [(rows, ids_BK, _cut(probability_BK, sampling.top_p))]
    log_z_B = torch.logsumexp(logits_BV / sampling.temperature, dim=-1)
    groups = []
    for width in (*(w for w in WIDTHS if w < vocab), vocab):
        top_RK, ids_RK = logits_BV.topk(width, dim=-1)
        probability_RK = (top_RK.double() / sampling.temperature - log_z_B[:, None]).exp()
        if width == vocab:
            return [*groups, (rows, ids_RK, _cut(probability_RK, sampling.top_p))]
        enough_R = probability_RK.sum(-1) >= sampling.top_p
        wide_R = ~enough_R
        if not wide_R.any():
            return [*groups, (rows, ids_RK, _cut(probability_RK, sampling.top_p))]
        groups.append((rows[enough_R], ids_RK[enough_R], _cut(probability_RK[enough_R], sampling.top_p)))
        rows, logits_BV, log_z_B = rows[wide_R], logits_BV[wide_R], log_z_B[wide_R]
    return groups


def _cut(probability_RK: Tensor, top_p: float) -> Tensor:
    """Probabilities in descending order, zero from the first token whose more likely ones already hold `top_p`."""
    before_RK = probability_RK.cumsum(-1) - probability_RK
    outside_RK = before_RK >= top_p
    outside_RK[:, 0] = False
    return probability_RK.masked_fill(outside_RK, 0.0)


def pick(weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One id per row (B,) with probability proportional to its weight: the inverse of the cumulative distribution.

    Ids come in their own order. Sums over chunks, then within the one chunk that holds the answer: the cost is one
    pass, not a running sum.
    """
    missing = -weight_BV.shape[-1] % CHUNK
    weight_BCX = torch.nn.functional.pad(weight_BV, (0, missing)).unflatten(-1, (-1, CHUNK))
    cumulative_BC = weight_BCX.sum(-1).double().cumsum(-1)
    target_B1 = uniform_B[:, None] * cumulative_BC[:, -1:]
    chunk_B1 = (cumulative_BC <= target_B1).sum(-1, keepdim=True).clamp_(max=cumulative_BC.shape[-1] - 1)
    before_B1 = torch.where(chunk_B1 > 0, cumulative_BC.gather(-1, (chunk_B1 - 1).clamp(min=0)), 0.0)
    weight_BX = weight_BCX.gather(1, chunk_B1[..., None].expand(-1, -1, CHUNK))[:, 0].double()
    inside_B1 = (weight_BX.cumsum(-1) <= target_B1 - before_B1).sum(-1, keepdim=True)
    positions_X = torch.arange(CHUNK, device=weight_BX.device)
    last_B1 = torch.where(weight_BX > 0, positions_X, 0).amax(-1, keepdim=True)
    return (chunk_B1 * CHUNK + inside_B1.minimum(last_B1))[:, 0]
