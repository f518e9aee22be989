"""A teacher with other tokens: shared tokens and a class for the rest, against naive lines; permuted vocabularies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from limbeck.objectives import build_objective, token_values
from limbeck.objectives.fused.aligned import aligned_distillation_loss
from limbeck.objectives.fused.sorted_rest import sorted_rest_loss
from limbeck.teachers.across import head_order, in_order
from limbeck.types import DenseSignal, Head, LimbeckError, SharedSignal
from tests.objectives.cases import CASES
from tests.objectives.pairs import Pair

pytestmark = pytest.mark.filterwarnings("ignore:ab with alpha", "ignore:opd is unbiased")

TEACHER = {name: o for name, o in CASES.items() if "teacher" in o.reads}
TAIL = {name: o for name, o in TEACHER.items() if "topk_tail" in o.supports}
SHARED, OTHERS = 24, 19


class Foreign(Pair):
    """A pair of which 24 tokens are shared: a teacher with 43 tokens and a student with 37."""

    def __init__(self, shared: int = SHARED, others: int = OTHERS, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(5)
        self.size = shared + others
        self.mine = torch.randperm(self.v, generator=generator)[:shared].sort().values
        self.theirs = torch.randperm(self.size, generator=generator)[:shared]
        width = self.signal.hidden_ND.shape[1]
        weight_VD = torch.randn(self.size + 3, width, generator=generator, dtype=torch.float64) / 2
        self.dense = DenseSignal(
            hidden_ND=self.signal.hidden_ND, head=Head(weight_VD=weight_VD.to(self.hidden.dtype), vocab_size=self.size)
        )
        self.label_N = self.mine[torch.randint(shared, (self.n,), generator=generator)]

    def shared(self, aligned_N: Tensor | None = None) -> SharedSignal:
        aligned_N = torch.ones(self.n, dtype=torch.bool) if aligned_N is None else aligned_N
        order = head_order(self.theirs.tolist(), self.size)
        head = in_order(self.dense.head, order)
        return SharedSignal(hidden_ND=self.dense.hidden_ND, head=head, student_ids_S=self.mine, aligned_N=aligned_N)

    def kept(self, tau: float, *, tail: bool) -> tuple[Tensor, Tensor]:
        """Logits of shared tokens, and of all others together, of student and teacher."""
        theirs_NV = self.dense.hidden_ND @ self.dense.head.weight_VD[: self.size].T
        sides = ((self.student_logits(), self.mine), (theirs_NV, self.theirs))
        found = []
        for logits_NV, ids in sides:
            rest_NV = logits_NV.index_fill(-1, ids, -torch.inf)
            rest_N1 = tau * (rest_NV / tau).logsumexp(-1, keepdim=True)
            found.append(torch.cat([logits_NV[:, ids], rest_N1], dim=-1) if tail else logits_NV[:, ids])
        return found[0], found[1]


@pytest.mark.parametrize("name", TAIL)
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_tail_equals_the_naive_lines(name: str, tau: float) -> None:
    pair = Foreign(bias=True)
    expected_N = token_values(TAIL[name], *pair.kept(tau, tail=True), temperature=tau)
    pair.check(pair.fused(TAIL[name], tau, signal=pair.shared()), expected_N, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("tau", [1.0, 2.0, 4.0])
def test_the_measured_kl_is_that_at_temperature_1_whatever_the_losses_is(tau: float, tail: bool) -> None:
    pair, support = Foreign(bias=True), "shared_tail" if tail else "shared_renorm"
    measures = pair.fused(build_objective("rkl"), tau, signal=pair.shared(), support=support, measure=True).measures
    expected_N = token_values(build_objective("fkl"), *pair.kept(1.0, tail=tail)).detach()
    torch.testing.assert_close(measures["forward_kl"], expected_N)


@pytest.mark.parametrize("name", TEACHER)
def test_renormalised_is_a_vocabulary_of_its_own(name: str) -> None:
    pair = Foreign()
    places = {index: place for place, index in enumerate(pair.mine.tolist())}
    label_N = torch.tensor([places[index] for index in pair.label_N.tolist()])
    expected_N = token_values(TEACHER[name], *pair.kept(2.0, tail=False), temperature=2.0, label_N=label_N)
    fused = pair.fused(TEACHER[name], 2.0, signal=pair.shared(), support="shared_renorm")
    pair.check(fused, expected_N, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("support", ["shared_tail", "shared_renorm"])
@pytest.mark.parametrize("name", TAIL)
def test_a_permuted_vocabulary_gives_the_ordinary_loss(name: str, support: str) -> None:
    pair = Foreign(shared=37, others=0)
    weight_VD = pair.dense.head.weight_VD
    same = replace(pair.dense, head=replace(pair.dense.head, weight_VD=weight_VD[pair.theirs], vocab_size=37))
    ordinary = pair.fused(TAIL[name], 2.0, signal=same)
    found = pair.fused(TAIL[name], 2.0, signal=pair.shared(), support=support)
    torch.testing.assert_close(found.value_N, ordinary.value_N, rtol=0, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(found.loss, pair.parameters),
        torch.autograd.grad(ordinary.loss, pair.parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_tokens_give_the_ordinary_loss_bit_for_bit(dtype: torch.dtype) -> None:
    pair = Pair(dtype=dtype)
    head = in_order(pair.signal.head, head_order(range(pair.v), pair.v))
    assert head is pair.signal.head
    signal = SharedSignal(
        hidden_ND=pair.signal.hidden_ND,
        head=head,
        student_ids_S=torch.arange(pair.v),
        aligned_N=torch.ones(pair.n, dtype=torch.bool),
    )
    for name in ("fkl", "rkl", "js", "skl"):
        objective = build_objective(name)
        ordinary, found = pair.fused(objective, 2.0), pair.fused(objective, 2.0, signal=signal)
        assert torch.equal(ordinary.value_N, found.value_N) and torch.equal(ordinary.loss, found.loss)
        grads = [torch.autograd.grad(one.loss, pair.parameters) for one in (ordinary, found)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_where_nothing_is_aligned_labels_alone_count() -> None:
    pair = Foreign()
    aligned_N = torch.rand(pair.n, generator=torch.Generator().manual_seed(3)) < 0.5
    hidden_ND = pair.dense.hidden_ND.clone()
    hidden_ND[~aligned_N] = torch.nan
    signal = replace(pair.shared(aligned_N), hidden_ND=hidden_ND)
    both = build_objective("sum", parts=[{"name": "fkl", "weight": 0.7}, {"name": "ce", "weight": 0.3}])
    for objective, (one, other) in ((build_objective("fkl"), (1.0, 0.0)), (both, (0.7, 0.3))):
        fkl_N = torch.where(aligned_N, token_values(build_objective("fkl"), *pair.kept(1.0, tail=True)), 0.0)
        rows = pair.student_logits()
        ce_N = token_values(build_objective("ce"), rows, rows, label_N=pair.label_N)
        expected_N = one * fkl_N + other * ce_N
        found = aligned_distillation_loss(
            pair.hidden, pair.head, signal, objective, weight_N=pair.weight_N, label_N=pair.label_N, compile="off"
        )
        pair.check(found, expected_N, rtol=1e-7, atol=1e-9)
    assert set(found.parts) == {"fkl", "ce"}
    torch.testing.assert_close(found.parts["ce"], ce_N.detach())
    with pytest.raises(LimbeckError, match="not aligned"):
        pair.fused(both, signal=signal)


def test_a_batch_without_an_aligned_position_has_a_gradient_of_zero() -> None:
    pair = Foreign()
    signal = pair.shared(torch.zeros(pair.n, dtype=torch.bool))
    found = aligned_distillation_loss(
        pair.hidden,
        pair.head,
        signal,
        build_objective("fkl"),
        weight_N=pair.weight_N,
        label_N=pair.label_N,
        measure=True,
        compile="off",
    )
    assert float(found.loss.detach()) == 0 and not found.value_N.any()
    assert all(not grad.any() for grad in torch.autograd.grad(found.loss, pair.parameters))


def test_measures_say_what_is_shared() -> None:
    pair = Foreign()
    found = pair.fused(build_objective("fkl"), signal=pair.shared(), measure=True)
    mine_N = pair.student_logits().softmax(-1)[:, pair.mine].sum(-1)
    theirs_NV = (pair.dense.hidden_ND @ pair.dense.head.weight_VD[: pair.size].T).softmax(-1)
    torch.testing.assert_close(found.measures["student_kept"], mine_N.detach())
    torch.testing.assert_close(found.measures["teacher_kept"], theirs_NV[:, pair.theirs].sum(-1))


@pytest.mark.parametrize(("shared", "others"), [(37, 6), (24, 0)])
def test_where_one_side_has_no_others_the_shared_tokens_are_renormalised(shared: int, others: int) -> None:
    pair = Foreign(shared=shared, others=others)
    for name in ("fkl", "rkl"):
        expected_N = token_values(build_objective(name), *pair.kept(2.0, tail=False), temperature=2.0)
        pair.check(pair.fused(build_objective(name), 2.0, signal=pair.shared()), expected_N, rtol=1e-7, atol=1e-9)


def test_what_does_not_go_is_refused() -> None:
    pair = Foreign()
    with pytest.raises(LimbeckError, match=r"'csd' is not defined on support 'shared_tail'.*renormalised"):
        pair.fused(build_objective("csd"), signal=pair.shared())
    wrong = replace(pair.shared(), student_ids_S=pair.mine + 20)
    with pytest.raises(LimbeckError, match="ids of the student"):
        pair.fused(build_objective("fkl"), signal=wrong)
    with pytest.raises(LimbeckError, match="per_sequence"):
        pair.fused(build_objective("tad", per_sequence=True), signal=pair.shared(), support="shared_renorm")


@pytest.mark.parametrize("name", ["fkl", "rkl", "js", "skl", "tv"])
def test_groups_are_compared_by_the_probability_of_their_text(name: str) -> None:
    pair, objective = Foreign(), build_objective(name)
    numbers = torch.arange(pair.n)
    # Positions 5, 6, 7 are a group, 20 and 21 another, 30 a third.
    group_N = torch.full((pair.n,), -1)
    group_N[5:8], group_N[20:22], group_N[30] = 0, 1, 2
    log_p_G = torch.tensor([-1.3, -6.0, -0.01], dtype=torch.float64)
    pair.weight_N[5:8], pair.weight_N[20:22] = 0.4, 0.9
    aligned_N = (group_N < 0) & (numbers % 3 > 0)
    signal = replace(pair.shared(aligned_N), group_N=group_N, group_logp_G=log_p_G)
    found = aligned_distillation_loss(
        pair.hidden, pair.head, signal, objective, weight_N=pair.weight_N, label_N=pair.label_N, compile="off"
    )
    at_label_N = pair.student_logits().log_softmax(-1).gather(-1, pair.label_N.unsqueeze(-1)).squeeze(-1)
    log_q_G = torch.stack([at_label_N[5:8].sum(), at_label_N[20:22].sum(), at_label_N[30]])
    sides = [torch.stack([log_G, (1 - log_G.exp()).log()], dim=-1) for log_G in (log_q_G, log_p_G)]
    value_G = token_values(objective, sides[0], sides[1])
    alone_N = torch.where(aligned_N, token_values(objective, *pair.kept(1.0, tail=True)), 0.0)
    sizes_G = torch.bincount(group_N[group_N >= 0])
    grouped_N = torch.where(group_N >= 0, (value_G / sizes_G)[group_N], 0.0)
    pair.check(found, alone_N + grouped_N, rtol=1e-7, atol=1e-9)


def naive_sorted(pair: Foreign) -> Tensor:
    """The definition: probabilities of the tokens that only one side has, sorted, filled up with zeros."""
    theirs_NV = pair.dense.hidden_ND @ pair.dense.head.weight_VD[: pair.size].T
    sides = []
    for logits_NV, ids in ((pair.student_logits(), pair.mine), (theirs_NV, pair.theirs)):
        keep = torch.ones(logits_NV.shape[1], dtype=torch.bool)
        keep[ids] = False
        rest_NX = logits_NV.softmax(-1)[:, keep].sort(descending=True).values
        sides.append(rest_NX)
    width = max(side.shape[1] for side in sides)
    mine_NX, theirs_NX = (torch.nn.functional.pad(side, (0, width - side.shape[1])) for side in sides)
    return (mine_NX - theirs_NX).abs().sum(-1)


@pytest.mark.parametrize("others", [7, 13, 19, 0])
@pytest.mark.parametrize("block_bytes", [1, 64 << 20])
def test_sorted_rest_equals_the_naive_lines(others: int, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.objectives.fused.sorted_rest.BLOCK_BYTES", block_bytes)
    pair = Foreign(others=others, bias=True, scale=0.5, softcap=3.0)
    expected_N = naive_sorted(pair)
    weight_N = torch.rand(pair.n, dtype=torch.float64)
    loss, value_N = sorted_rest_loss(pair.hidden, pair.head, pair.shared(), weight_N=weight_N)
    torch.testing.assert_close(value_N, expected_N.detach(), rtol=1e-9, atol=1e-12)
    expected = torch.autograd.grad((weight_N * expected_N).sum(), pair.parameters)
    for found, there in zip(torch.autograd.grad(loss, pair.parameters), expected, strict=True):
        torch.testing.assert_close(found, there, rtol=1e-8, atol=1e-12)


def test_sorted_rest_is_added_where_the_two_are_aligned() -> None:
    pair, objective = Foreign(), build_objective("fkl")
    aligned_N = torch.arange(pair.n) % 3 != 1
    weight_N = torch.rand(pair.n, dtype=torch.float64)
    given = (pair.hidden, pair.head, pair.shared(aligned_N), objective)
    options = {"weight_N": weight_N, "label_N": pair.label_N, "support": "shared_tail"}
    without = aligned_distillation_loss(*given, **options)  # type: ignore[arg-type]
    found = aligned_distillation_loss(*given, sorted_weight=0.25, **options)  # type: ignore[arg-type]
    distance_N = naive_sorted(pair).detach() * aligned_N
    torch.testing.assert_close(found.value_N, without.value_N + 0.25 * distance_N)
    torch.testing.assert_close(found.loss, without.loss + 0.25 * (weight_N * distance_N).sum())
    torch.testing.assert_close(found.measures["sorted_distance"], distance_N)
