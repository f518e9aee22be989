"""The tokens of each position that are kept of what a server says of it."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.teachers.served_answers import Answer
from limbeck.teachers.served_dialects import Candidates, ScoredText, check_candidates


def kept_tokens(
    rows: Sequence[Candidates], text: ScoredText, *, k: int, vocab_size: int, rows_of_head: int, scored: bool
) -> Answer:
    """The tokens that are kept of each position: ids and log-probabilities (positions, k).

    Args:
        k: how many, those that were chosen among them.
        vocab_size: of the tokens that there are; ids from there on are padding of the head.
        scored: the server says the log-probability of every token that followed.

    Raises:
        ValueError: what is said is no distribution, of other positions, or too little.
    """
    import torch

    check_candidates(rows, text, rows_of_head=rows_of_head)
    chosen = [
        _kept(row, label, frozenset(own), k=k, vocab_size=vocab_size, scored=scored)
        for row, label, own in zip(rows, text.labels, text.chosen or ((),) * len(rows), strict=True)
    ]
    ids, logps = zip(*chosen, strict=True)
    return {
        "ids": torch.tensor(ids, dtype=torch.int32),
        "logp": torch.tensor(logps, dtype=torch.float32).clamp_max(0.0),
    }


def _kept(
    row: Candidates, label: int, chosen: frozenset[int], *, k: int, vocab_size: int, scored: bool
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The tokens that are kept of a position, the likeliest first: with the one that followed, where it is known.

    Args:
        chosen: tokens that are kept in any case.

    Raises:
        ValueError: fewer are said than are kept, or the one that followed or a chosen one is not.
    """
    if missing := chosen - row.keys():
        raise ValueError(f"no log-probability of token {min(missing)}, which was asked for")
    if scored and label not in row:
        raise ValueError(f"no log-probability of token {label}, which followed")
    real = {token: logp for token, logp in row.items() if token < vocab_size}
    ranked = sorted(real.items(), key=lambda one: (-one[1], one[0]))
    own = [one for one in ranked if one[0] not in chosen][: k - len(chosen)]
    if len(own) + len(chosen) < k:
        raise ValueError(f"{len(own) + len(chosen)} log-probabilities of a position, expected {k}")
    if label in real and label not in chosen and all(token != label for token, _ in own):
        own[-1] = (label, real[label])
    kept = {token for token, _ in own} | chosen
    ranked = [one for one in ranked if one[0] in kept] if chosen else own
    ids, logps = zip(*ranked, strict=True)
    return ids, logps
