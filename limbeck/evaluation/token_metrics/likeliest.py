"""The k likeliest tokens of many rows of logits, from the largest logit of every few neighbouring ids.

The k largest of a row lie in the k groups of ids whose own largest come first. Of those maxima, one pass over the row
leaves a sixty-fourth to look through, where `torch.topk` orders whole rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Ids of a group.
WIDTH = 64


def group_maxima(logits_NV: Tensor) -> Tensor:
    """The largest logit of each group of WIDTH neighbouring ids, (N, groups); the last group may be smaller."""
    N, V = logits_NV.shape
    whole = V // WIDTH * WIDTH
    parts = [logits_NV[:, :whole].reshape(N, -1, WIDTH).amax(-1)] if whole else []
    if whole < V:
        parts.append(logits_NV[:, whole:].amax(-1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def likeliest(logits_NV: Tensor, maxima_NG: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits, (N, k): the largest first, of equal ones the lowest id first.

    Args:
        maxima_NG: what `group_maxima` gives for the same logits.
    """
    V = logits_NV.shape[1]
    # In the order of the ids, so that the first of equal candidates is the one with the lowest id.
    group_NK = _first(maxima_NG, min(k, maxima_NG.shape[1])).sort(1).values
    ids_NC = (group_NK[:, :, None] * WIDTH + torch.arange(WIDTH, device=logits_NV.device)).flatten(1)
    candidates_NC = logits_NV.gather(1, ids_NC.clamp_max(V - 1)).masked_fill_(ids_NC >= V, -math.inf)
    return ids_NC.gather(1, _first(candidates_NC, k))


def _first(values_NM: Tensor, k: int) -> Tensor:
    """Places of the k largest, (N, k), largest first, of equal ones the first; argmax gives the first, topk any."""
    values_NM, places = values_NM.clone(), []
    for _ in range(k):
        places.append(values_NM.argmax(1, keepdim=True))
        values_NM.scatter_(1, places[-1], -math.inf)
    return torch.cat(places, dim=1)
