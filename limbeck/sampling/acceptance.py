"""Acceptance rules of speculative decoding: which drafted tokens are kept, and which token follows them.

One model drafted K tokens in a row, each from its distribution q; the other read them and gives its distribution p at
every place. Tokens stand up to the first one that is refused; in the place of that one comes another.

Shape suffixes: B rows, K drafted tokens, J places where the verifier was read (K, or K + 1 with the place after
the last draft), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal, Protocol

import torch
from torch import Tensor

from limbeck.sampling.top_p import pick, probabilities
from limbeck.types import Sampling

Redraw = Literal["top_k", "nucleus"]


def accept_or_resample(
    q_BKV: Tensor, p_BJV: Tensor, ids_BK: Tensor, accept_BK: Tensor, next_BJ: Tensor
) -> tuple[Tensor, Tensor]:
    """Speculative sampling: ids drafted from q become a sample of p, whatever q is.

    A drafted id x stands with probability min(1, p(x) / q(x)). The first one that does not is replaced by a draw from
    norm(max(p - q, 0)); where all K stand and p is known at one place more, a draw from p there follows (Leviathan et
    al. 2023, arXiv:2211.17192, algorithm 1; Chen et al. 2023, arXiv:2302.01318).

    Args:
        q_BKV: the distributions that `ids_BK` were drawn from, one after the other.
        p_BJV: the distributions that are wanted; J is K or K + 1.
        ids_BK: int64.
        accept_BK: uniform numbers in [0, 1) that decide, float64.
        next_BJ: uniform numbers for the token that follows if it follows at this place. All numbers of a place are to
            be independent of each other and of what the id there was drawn with; but at place K that id does not exist.

    Returns:
        How many ids of each row stand, (B,); and the token that comes after them, -1 where none does (J is K and all
        stand), (B,). int64 both.
    """
    drafted, places = ids_BK.shape[1], p_BJV.shape[1]
    q_BK = q_BKV.gather(-1, ids_BK[..., None])[..., 0]
    p_BK = p_BJV[:, :drafted].gather(-1, ids_BK[..., None])[..., 0]
    kept_B = (accept_BK * q_BK < p_BK).long().cumprod(-1).sum(-1)
    row_B = torch.arange(len(ids_BK), device=ids_BK.device)
    place_B = kept_B.clamp(max=places - 1)
    p_BV = p_BJV[row_B, place_B]
    # At the place after the last draft nothing was drawn from q, so nothing is to be taken off.
    q_BV = q_BKV[row_B, kept_B.clamp(max=drafted - 1)] * (kept_B < drafted)[:, None]
    residual_BV = (p_BV - q_BV).clamp_(min=0)
    # Rounding may refuse an id where p and q are the same but for it.
    none_B1 = residual_BV.sum(-1, keepdim=True) == 0
    next_B = pick(torch.where(none_B1, p_BV, residual_BV), next_BJ[row_B, place_B])
    return kept_B, next_B.masked_fill(kept_B == places, -1)


def veto(
    verifier_BKV: Tensor, ids_BK: Tensor, next_BK: Tensor, sampling: Sampling, *, top_k: int, redraw: Redraw = "top_k"
) -> tuple[Tensor, Tensor]:
    """Speculative knowledge distillation: an id outside the teacher's `top_k` most likely is replaced by the teacher's.

    The replacement is drawn from the teacher's distribution at the temperature of sampling over those tokens alone
    ("top_k"), or as in the authors' code over all that sampling allows, its own top-p and top-k ("nucleus"; Xu et al.
    2025, arXiv:2410.11325). Of equally likely tokens the lower ids are the more likely ones.

    Args:
        verifier_BKV: the teacher's logits, finite.
        next_BK: uniform numbers in [0, 1) for the replacement, float64.

    Returns:
        As `accept_or_resample`, with -1 where all ids stand.
    """
    drafted, vocabulary = ids_BK.shape[1], verifier_BKV.shape[-1]
    own_BK1 = verifier_BKV.gather(-1, ids_BK[..., None])
    earlier_BKV = torch.arange(vocabulary, device=ids_BK.device) < ids_BK[..., None]
    before_BK = ((verifier_BKV > own_BK1) | ((verifier_BKV == own_BK1) & earlier_BKV)).sum(-1)
    kept_B = (before_BK < top_k).long().cumprod(-1).sum(-1)
    row_B, place_B = torch.arange(len(ids_BK), device=ids_BK.device), kept_B.clamp(max=drafted - 1)
    wanted = sampling if redraw == "nucleus" else replace(sampling, top_p=1.0, top_k=min(top_k, vocabulary))
    next_B = pick(probabilities(verifier_BKV[row_B, place_B], wanted), next_BK[row_B, place_B])
    return kept_B, next_B.masked_fill(kept_B == drafted, -1)


@dataclass(frozen=True, kw_only=True)
class DraftedTokens:
    """Drafted tokens with both models' distributions: the input of an acceptance rule.

    Attributes:
        ids_BK: the drafted tokens.
        q_BKV: the distributions they were drawn from.
        verifier_BJV: logits of the model that did not draft.
        accept_BK, next_BJ: the row's own uniform numbers for these places.
    """

    ids_BK: Tensor
    q_BKV: Tensor
    verifier_BJV: Tensor
    accept_BK: Tensor
    next_BJ: Tensor
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class AcceptedTokens:
    """Tokens of a round after verification.

    Attributes:
        kept_B, next_B: as `accept_or_resample` returns them.
        drawn_from_BKV: the distributions that the tokens are a sample of, where that is neither model's own.
    """

    kept_B: Tensor
    next_B: Tensor
    drawn_from_BKV: Tensor | None = None


@dataclass(kw_only=True)
class AcceptanceStats:
    """Counts of accepted and rejected drafts. Only drafts up to the end of a response count.

    Attributes:
        rounds: passes of the verifier, one for each row in them.
        drafted: tokens proposed.
        accepted: those that stand in a response.
        rejected: those that were refused and replaced; what was drafted behind one was never looked at.
        by_position: of the first, second, ... draft of a round: how many stand, and how many were looked at.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    rejected: int = 0
    by_position: tuple[tuple[int, int], ...] = ()

    @property
    def replaced(self) -> int:
        """Number of the drafter's tokens that were replaced."""
        return self.rejected

    @property
    def acceptance(self) -> float:
        """Share of the drafts looked at that stand; NaN where there were none."""
        looked_at = self.accepted + self.rejected
        return self.accepted / looked_at if looked_at else float("nan")

    def counts(self) -> dict[str, int]:
        """The sums over all positions."""
        names = ("rounds", "drafted", "accepted", "rejected")
        return {name: getattr(self, name) for name in names}

    def decided(self, stand: int, refused: bool) -> None:
        """Count the drafts of one round that were looked at: the first ones stand, the next one may be refused."""
        self.accepted += stand
        self.rejected += refused
        round_ = tuple((int(place < stand), 1) for place in range(stand + refused))
        self.by_position = _summed(self.by_position, round_)

    def add(self, other: AcceptanceStats) -> None:
        """Add the counts of another."""
        self.rounds += other.rounds
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.rejected += other.rejected
        self.by_position = _summed(self.by_position, other.by_position)

    def taken(self) -> AcceptanceStats:
        """Return the counts so far and reset them."""
        counts = replace(self)
        self.rounds = self.drafted = self.accepted = self.rejected = 0
        self.by_position = ()
        return counts


def _summed(one: tuple[tuple[int, int], ...], other: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    pairs = zip_longest(one, other, fillvalue=(0, 0))
    return tuple((stand + more, seen + others) for (stand, seen), (more, others) in pairs)


class AcceptanceRule(Protocol):
    """Decides which drafted tokens are kept.

    Attributes:
        looks_ahead: whether the verifier is read at the place after the last draft too (J is K + 1).
    """

    @property
    def looks_ahead(self) -> bool: ...
    def __call__(self, seen: DraftedTokens) -> AcceptedTokens: ...


@dataclass(frozen=True, kw_only=True)
class SpeculativeSampling:
    """The tokens are a sample of the verifier."""

    looks_ahead: bool = True

    def __call__(self, seen: DraftedTokens) -> AcceptedTokens:
        p_BJV = _distributions(seen.verifier_BJV, seen.sampling)
        kept_B, next_B = accept_or_resample(seen.q_BKV, p_BJV, seen.ids_BK, seen.accept_BK, seen.next_BJ)
        return AcceptedTokens(kept_B=kept_B, next_B=next_B)


@dataclass(frozen=True, kw_only=True)
class MixtureSampling:
    """The tokens are a sample of alpha * p + (1 - alpha) * q, of which at least a share 1 - alpha of the drafts is."""

    alpha: float
    looks_ahead: bool = False

    def __call__(self, seen: DraftedTokens) -> AcceptedTokens:
        p_BKV = _distributions(seen.verifier_BJV, seen.sampling)
        mixture_BKV = self.alpha * p_BKV + (1 - self.alpha) * seen.q_BKV
        kept_B, next_B = accept_or_resample(seen.q_BKV, mixture_BKV, seen.ids_BK, seen.accept_BK, seen.next_BJ)
        return AcceptedTokens(kept_B=kept_B, next_B=next_B, drawn_from_BKV=mixture_BKV)


@dataclass(frozen=True, kw_only=True)
class TopKVeto:
    """The tokens are the drafter's where they are among the verifier's likeliest, else the verifier's."""

    top_k: int
    redraw: Redraw = "top_k"
    looks_ahead: bool = False

    def __call__(self, seen: DraftedTokens) -> AcceptedTokens:
        kept_B, next_B = veto(
            seen.verifier_BJV, seen.ids_BK, seen.next_BJ, seen.sampling, top_k=self.top_k, redraw=self.redraw
        )
        return AcceptedTokens(kept_B=kept_B, next_B=next_B)


def _distributions(logits_BJV: Tensor, sampling: Sampling) -> Tensor:
    return probabilities(logits_BJV.flatten(0, 1), sampling).unflatten(0, logits_BJV.shape[:2])
