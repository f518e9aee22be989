"""pass@k: the chance that at least one of k answers is right, estimated from n answers without bias."""

from __future__ import annotations

from math import comb

from limbeck.types import LimbeckError


def pass_at_k(answers: int, right: int, k: int) -> float:
    """``1 - C(n - c, k) / C(n, k)`` for n answers of which c are right (Chen et al. 2021, equation 1), exactly.

    Raises:
        LimbeckError: k is not in 1 .. n, or c not in 0 .. n.
    """
    if not (1 <= k <= answers and 0 <= right <= answers):
        raise LimbeckError(
            f"got pass@{k} of {answers} answers with {right} right; expected 1 <= k <= answers and as many right at "
            "most: raise evaluate.groups.tasks.samples or lower evaluate.groups.tasks.pass_at"
        )
    return 1.0 - comb(answers - right, k) / comb(answers, k)
