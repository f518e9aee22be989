"""Which drafted tokens stand: the rules alone, on distributions of a few tokens, against direct enumeration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.sampling.acceptance import DraftedTokens, MixtureSampling, accept_or_resample, veto
from limbeck.sampling.top_p import pick, probabilities
from limbeck.types import Sampling
from tests.sampling.shares import assert_shares

ROWS, DRAFTS, VOCAB = 5_000, 3, 7
SETTINGS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=1.3, top_p=0.8),
    Sampling(top_k=3),
    Sampling(temperature=0.8, top_p=0.9, top_k=5),
    Sampling(temperature=0.0),
]


def logits(places: int, seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(places, VOCAB, dtype=torch.float64, generator=draws)


def numbers(places: int, seed: int) -> Tensor:
    return torch.rand(ROWS, places, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def drafted(q_KV: Tensor) -> Tensor:
    """Ids of `ROWS` rows, each place drawn from its own distribution."""
    uniform_BK = numbers(DRAFTS, 1)
    return torch.stack([pick(q_KV[k].expand(ROWS, -1), uniform_BK[:, k]) for k in range(DRAFTS)], 1)


def place(ids_BK: Tensor, kept_B: Tensor, next_B: Tensor, k: int) -> Tensor:
    """The tokens at place `k` of the rows that came so far."""
    there = kept_B >= k if k == ids_BK.shape[1] else (kept_B > k) | ((kept_B == k) & (next_B >= 0))
    if k == ids_BK.shape[1]:
        return next_B[there]
    return torch.where(kept_B > k, ids_BK[:, k], next_B)[there]


@pytest.mark.parametrize("sampling", SETTINGS)
@pytest.mark.parametrize("looks_ahead", [True, False])
def test_every_place_follows_the_target(sampling: Sampling, looks_ahead: bool) -> None:
    q_KV, p_JV = probabilities(logits(DRAFTS, 2), sampling), probabilities(logits(DRAFTS + looks_ahead, 3), sampling)
    ids_BK = drafted(q_KV)
    kept_B, next_B = accept_or_resample(
        q_KV.expand(ROWS, -1, -1), p_JV.expand(ROWS, -1, -1), ids_BK, numbers(DRAFTS, 4), numbers(len(p_JV), 5)
    )
    assert ((next_B == -1) == (kept_B == len(p_JV))).all()
    for k in range(len(p_JV)):
        ids_N = place(ids_BK, kept_B, next_B, k)
        if len(ids_N):
            assert_shares(ids_N, p_JV[k])
    # A draft stands as often as the two distributions overlap: 1 - TV (Leviathan et al., corollary 3.6).
    overlap = q_KV[0].minimum(p_JV[0]).sum().item()
    assert (kept_B > 0).double().mean().item() == pytest.approx(overlap, abs=5 * 0.5 / ROWS**0.5)


def test_later_places_are_independent_of_what_stood_before() -> None:
    q_KV, p_KV = logits(DRAFTS, 2).softmax(-1), logits(DRAFTS, 3).softmax(-1)
    ids_BK = drafted(q_KV)
    kept_B, _ = accept_or_resample(
        q_KV.expand(ROWS, -1, -1), p_KV.expand(ROWS, -1, -1), ids_BK, numbers(DRAFTS, 4), numbers(DRAFTS, 5)
    )
    # Where the first draft stood, the second is decided as if it were the first.
    again_B, _ = accept_or_resample(
        q_KV[1:].expand(ROWS, -1, -1),
        p_KV[1:].expand(ROWS, -1, -1),
        ids_BK[:, 1:],
        numbers(DRAFTS, 4)[:, 1:],
        numbers(2, 5),
    )
    assert torch.equal(kept_B[kept_B > 0] - 1, again_B[kept_B > 0])


def test_the_same_distribution_keeps_every_draft() -> None:
    p_JV = probabilities(logits(DRAFTS + 1, 2), Sampling(top_p=0.9))
    ids_BK = drafted(p_JV[:DRAFTS])
    q_BKV = p_JV[:DRAFTS].expand(ROWS, -1, -1)
    kept_B, next_B = accept_or_resample(
        q_BKV, p_JV.expand(ROWS, -1, -1), ids_BK, numbers(DRAFTS, 4), numbers(DRAFTS + 1, 5)
    )
    assert (kept_B == DRAFTS).all()
    assert_shares(next_B, p_JV[-1])


def test_disjoint_supports_keep_nothing() -> None:
    q_V = torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0], dtype=torch.float64)
    p_V = torch.tensor([0, 0, 0.1, 0.2, 0.3, 0.4, 0], dtype=torch.float64)
    kept_B, next_B = accept_or_resample(
        q_V.expand(ROWS, DRAFTS, -1),
        p_V.expand(ROWS, DRAFTS + 1, -1),
        drafted(q_V.expand(DRAFTS, -1)),
        numbers(DRAFTS, 4),
        numbers(DRAFTS + 1, 5),
    )
    assert not kept_B.any()
    assert_shares(next_B, p_V)


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 1 - 2**-53]), st.sampled_from(SETTINGS))
@settings(max_examples=50, deadline=None)
def test_tokens_that_follow_are_possible_at_any_number(seed: int, number: float, sampling: Sampling) -> None:
    q_KV = probabilities(logits(2, seed).float(), sampling)
    p_JV = probabilities(logits(3, seed + 1).float(), sampling)
    ids_BK = q_KV.argmax(-1)[None]
    extreme = torch.full((1, 3), number, dtype=torch.float64)
    kept_B, next_B = accept_or_resample(q_KV[None], p_JV[None], ids_BK, extreme[:, :2], extreme)
    assert p_JV[kept_B[0], next_B[0]] > 0
    assert all(p_JV[k, ids_BK[0, k]] > 0 for k in range(int(kept_B[0])))


@pytest.mark.parametrize("top_k", [1, 3, VOCAB, VOCAB + 5])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.8), Sampling(temperature=0.0)])
def test_veto_replaces_what_the_teacher_ranks_low(top_k: int, sampling: Sampling) -> None:
    student_KV, teacher_KV = logits(DRAFTS, 2), logits(DRAFTS, 3)
    q_KV = probabilities(student_KV, sampling)
    ids_BK = drafted(q_KV)
    kept_B, next_B = veto(teacher_KV.expand(ROWS, -1, -1), ids_BK, numbers(DRAFTS, 5), sampling, top_k=top_k)
    assert ((next_B == -1) == (kept_B == DRAFTS)).all()
    for k in range(DRAFTS):
        high = teacher_KV[k].topk(min(top_k, VOCAB)).indices
        among_V = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, high, True)
        narrow = probabilities(teacher_KV[k : k + 1], replace(sampling, top_p=1.0, top_k=0))[0] * among_V
        expected_V = q_KV[k] * among_V + (q_KV[k] * ~among_V).sum() * narrow / narrow.sum()
        if len(ids_N := place(ids_BK, kept_B, next_B, k)):
            assert_shares(ids_N, expected_V)
    if top_k >= VOCAB:
        assert (kept_B == DRAFTS).all()
    if top_k == 1:
        assert (place(ids_BK, kept_B, next_B, 0) == teacher_KV[0].argmax()).all()


@pytest.mark.parametrize("top_k", [1, 3, VOCAB])
@pytest.mark.parametrize("sampling", SETTINGS)
def test_veto_replaces_with_the_teachers_whole_nucleus(top_k: int, sampling: Sampling) -> None:
    """The authors' code: a refused token is drawn anew from all that the settings leave of the teacher."""
    student_KV, teacher_KV = logits(DRAFTS, 2), logits(DRAFTS, 3)
    q_KV, p_KV = probabilities(student_KV, sampling), probabilities(teacher_KV, sampling)
    ids_BK = drafted(q_KV)
    kept_B, next_B = veto(
        teacher_KV.expand(ROWS, -1, -1), ids_BK, numbers(DRAFTS, 5), sampling, top_k=top_k, redraw="nucleus"
    )
    for k in range(DRAFTS):
        among_V = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, teacher_KV[k].topk(top_k).indices, True)
        expected_V = q_KV[k] * among_V + (q_KV[k] * ~among_V).sum() * p_KV[k]
        # Few rows come to a late place where most are refused.
        if len(ids_N := place(ids_BK, kept_B, next_B, k)) > 200:
            assert_shares(ids_N, expected_V)


def test_of_equally_likely_tokens_the_lower_ids_rank_higher() -> None:
    flat = torch.zeros(1, 1, 5)
    for token in range(5):
        kept_B, _ = veto(flat, torch.tensor([[token]]), torch.zeros(1, 1, dtype=torch.float64), Sampling(), top_k=2)
        assert kept_B.item() == (token < 2)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_the_mixture_is_drawn_exactly_and_keeps_most_drafts(alpha: float) -> None:
    q_KV, teacher_KV = logits(DRAFTS, 2).softmax(-1), logits(DRAFTS, 3)
    ids_BK = drafted(q_KV)
    seen = DraftedTokens(
        ids_BK=ids_BK,
        q_BKV=q_KV.expand(ROWS, -1, -1),
        verifier_BJV=teacher_KV.expand(ROWS, -1, -1),
        accept_BK=numbers(DRAFTS, 4),
        next_BJ=numbers(DRAFTS, 5),
        sampling=Sampling(),
    )
    verdict = MixtureSampling(alpha=alpha)(seen)
    mixture_KV = alpha * teacher_KV.softmax(-1) + (1 - alpha) * q_KV
    assert verdict.drawn_from_BKV is not None
    torch.testing.assert_close(verdict.drawn_from_BKV[0], mixture_KV)
    for k in range(DRAFTS):
        assert_shares(place(ids_BK, verdict.kept_B, verdict.next_B, k), mixture_KV[k])
    assert (verdict.kept_B > 0).double().mean() >= 1 - alpha - 0.03
