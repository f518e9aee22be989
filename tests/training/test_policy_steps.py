"""DPKD and MiniLLM through the real loop against the published formulas and plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from limbeck.objectives import build_objective
from limbeck.objectives.sequence.distillm2 import Beta
from limbeck.objectives.sequence.rules import DPKD, ImportanceWeights, MiniLLM
from limbeck.training.loss import LossPlan
from limbeck.training.weighting import TokenWeighting
from limbeck.types import LimbeckError, Response
from tests.training.naive import Both, gap, gradients, norm, one_step, pairs, read, stale, written

POLICY = build_objective("policy_gradient")
WHOLE = build_objective("sum", parts=[{"name": "rkl"}, {"name": "policy_gradient"}])
OWN = written("student", 6, seed=3)


# --- DPKD ---


def dpkd_loss(rows: Sequence[Both], beta: float) -> Tensor:
    """-log sigmoid(beta ([log q(y_t) - log q(y_s)] - [log p(y_t) - log p(y_s)])), token means, mean over pairs."""
    losses = []
    for theirs, own in zip(rows[::2], rows[1::2], strict=True):
        student = theirs.log_q_T.mean() - own.log_q_T.mean()
        losses.append(-logsigmoid(beta * (student - (theirs.log_p_T.mean() - own.log_p_T.mean()))))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("cut", [8, 4, 2])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_a_step_of_dpkd_has_the_gradient_of_its_formula(tmp_path, beta, cut):
    responses = pairs(4)
    loss_plan = LossPlan(objective=POLICY, rule=DPKD(beta=beta), authored=True)
    # With the scale of 2 at a beta of 0.5 each half is a mean over its rows, and the pairs are as many.
    weighting = TokenWeighting(reduction="sequence", beta=Beta())
    line, grads = one_step(tmp_path, responses, loss_plan, weighting=weighting, cut=cut)
    student, rows = read(responses)
    loss = dpkd_loss(rows, beta)
    expected = gradients(student, loss)
    assert gap(grads, expected) < 1e-4
    assert line["grad_norm"] == pytest.approx(norm(expected), rel=1e-4)
    assert line["dpkd/teacher"] == line["dpkd/student"] == pytest.approx(loss.item(), rel=1e-4)


def test_one_mean_over_rows_is_half_of_dpkd(tmp_path):
    responses = pairs(4)
    loss_plan = LossPlan(objective=POLICY, rule=DPKD(beta=2.0), authored=True)
    _, grads = one_step(tmp_path, responses, loss_plan, weighting=TokenWeighting(reduction="sequence"))
    student, rows = read(responses)
    assert gap(grads, gradients(student, dpkd_loss(rows, 2.0) / 2)) < 1e-4


def test_the_fit_of_a_student_that_learns_from_pairs_is_the_likelihood_of_the_teachers(tmp_path):
    """The value of a policy gradient says nothing of it, and is 0 on responses without a partner."""
    loss_plan = LossPlan(objective=POLICY, rule=DPKD(), authored=True)
    assert loss_plan.gauge == "nll"
    responses = pairs(4)
    line, _ = one_step(tmp_path, responses, loss_plan, weighting=TokenWeighting(reduction="sequence"))
    _, rows = read(responses)
    logp_N = torch.cat([row.log_q_T for row in rows[::2]])
    assert line["nll"] == pytest.approx(-logp_N.mean().item(), rel=1e-5)
    assert LossPlan(objective=WHOLE, rule=MiniLLM(), authored=True).gauge == "forward_kl"
    assert LossPlan(objective=build_objective("fkl")).gauge == "loss"


def test_pairs_that_would_be_cut_apart_are_refused(tmp_path):
    """Their partners would be missing, and the loss quietly another."""
    loss_plan = LossPlan(objective=POLICY, rule=DPKD(), authored=True)
    with pytest.raises(LimbeckError, match=r"batch_size is 3 and the rule dpkd compares pairs .*an even number"):
        one_step(tmp_path, pairs(3), loss_plan, cut=3)


# --- MiniLLM ---


def returns(row: Both, gamma: float, *, length_norm: bool, clip: float = 0.0) -> Tensor:
    """R_{t+1} = sum_k gamma^k r_{t+k}, r = log p - log q, over the tokens after t; of the last token 0."""
    reward = (row.log_p_T - row.log_q_T).detach().tolist()
    if clip:
        reward = [max(-clip, min(clip, r)) for r in reward]
    found = []
    for t in range(len(reward)):
        later = reward[t + 1 :]
        total = sum(gamma ** (k + 1) * r for k, r in enumerate(later))
        found.append(total / len(later) if length_norm and later else total)
    return torch.tensor(found)


def minillm_loss(rows: Sequence[Both], returned: Callable[[Both], Tensor], weight: Callable[[Both], Tensor]) -> Tensor:
    """Token mean of w_t [KL_t(q||p) - R_{t+1} log q(y_t)]: its gradient is MiniLLM's (arXiv 2306.08543, 2.2)."""
    losses = [weight(row) * (row.rkl_T() - returned(row) * row.log_q_T) for row in rows]
    return torch.cat(losses).mean()


def no_weight(row: Both) -> Tensor:
    return torch.ones(len(row.response.response_ids))


@pytest.mark.parametrize("cut", [6, 2])
@pytest.mark.parametrize(("gamma", "length_norm", "clip"), [(1.0, False, 0.0), (0.9, True, 0.0), (1.0, True, 1.5)])
def test_a_step_of_minillm_has_the_published_gradient(tmp_path, gamma, length_norm, clip, cut):
    rule = MiniLLM(gamma=gamma, length_norm=length_norm, clip_reward=clip)
    line, grads = one_step(tmp_path, OWN, LossPlan(objective=WHOLE, rule=rule, authored=True), cut=cut)
    student, rows = read(OWN)
    loss = minillm_loss(rows, lambda row: returns(row, gamma, length_norm=length_norm, clip=clip), no_weight)
    expected = gradients(student, loss)
    assert gap(grads, expected) < 1e-4
    assert line["grad_norm"] == pytest.approx(norm(expected), rel=1e-4)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
    reverse_kl = torch.stack([(row.log_q_T - row.log_p_T).mean() for row in rows]).mean()
    assert line["reverse_kl/student"] == pytest.approx(reverse_kl.item(), rel=1e-4)
    # The long-term part is not small beside the single-step part, so that it would be missed.
    alone = gradients(student, minillm_loss(rows, lambda row: torch.zeros(len(row.log_q_T)), no_weight))
    assert gap(expected, alone) > 0.1


def step_weight(row: Both) -> Tensor:
    drawn = row.response.sampled_logp or row.response.logp
    return no_weight(row) if drawn is None else (row.log_q_T.detach() - torch.tensor(drawn)).exp()


def prefix_weight(row: Both) -> Tensor:
    return step_weight(row).cumprod(0)


def sequence_weight(row: Both) -> Tensor:
    return step_weight(row).prod().expand(len(row.log_q_T))


DRAWN: dict[str, list[Response]] = {
    "stale": [stale(r, i) for i, r in enumerate(OWN)],
    "by a mixture": [stale(r, i, mixture=True) for i, r in enumerate(OWN)],
    "some not kept": [stale(r, i) if i % 2 else r for i, r in enumerate(OWN)],
}


@pytest.mark.parametrize("cut", [6, 2])
@pytest.mark.parametrize("importance", ["step", "sequence"])
@pytest.mark.parametrize("drawn", DRAWN)
def test_stale_responses_are_weighed_by_what_they_were_drawn_with(tmp_path, drawn, importance, cut):
    responses = DRAWN[drawn]
    rule = MiniLLM(length_norm=False, importance=importance)
    _, grads = one_step(tmp_path, responses, LossPlan(objective=WHOLE, rule=rule, authored=True), cut=cut)
    student, rows = read(responses)
    weight = {"step": step_weight, "sequence": sequence_weight}[importance]
    loss = minillm_loss(rows, lambda row: returns(row, 1.0, length_norm=False), weight)
    assert gap(grads, gradients(student, loss)) < 1e-4
    unweighed = minillm_loss(rows, lambda row: returns(row, 1.0, length_norm=False), no_weight)
    assert gap(grads, gradients(student, unweighed)) > 0.1


@pytest.mark.parametrize("cut", [6, 2])
@pytest.mark.parametrize("importance", ["step", "prefix", "sequence"])
@pytest.mark.parametrize("drawn", DRAWN)
def test_opd_on_stale_responses_is_weighed(tmp_path, drawn, importance, cut):
    """Token mean of w_t A_t (-log q(y_t)), A = log p - log q held constant."""
    responses = DRAWN[drawn]
    rule = ImportanceWeights(importance=importance)
    loss_plan = LossPlan(objective=build_objective("opd"), rule=rule, authored=True)
    line, grads = one_step(tmp_path, responses, loss_plan, cut=cut)
    student, rows = read(responses)

    def loss(weight: Callable[[Both], Tensor]) -> Tensor:
        return torch.cat([weight(r) * (r.log_q_T - r.log_p_T).detach() * r.log_q_T for r in rows]).mean()

    weight = {"step": step_weight, "prefix": prefix_weight, "sequence": sequence_weight}[importance]
    assert gap(grads, gradients(student, loss(weight))) < 1e-4
    assert gap(grads, gradients(student, loss(no_weight))) > 0.1
    mean = torch.stack([weight(row).mean() for row in rows]).mean().item()
    assert line["weight/student"] == pytest.approx(mean, rel=1e-4)


def test_responses_of_the_student_of_now_weigh_one(tmp_path):
    """Whether the sampler kept what it drew with or not: then it is what the student says now."""
    _, rows = read(OWN)
    kept = [replace(row.response, logp=tuple(row.log_q_T.tolist())) for row in rows]
    loss_plan = LossPlan(objective=WHOLE, rule=MiniLLM(importance="sequence"), authored=True)
    _, plain = one_step(tmp_path / "a", OWN, loss_plan)
    _, grads = one_step(tmp_path / "b", kept, loss_plan)
    assert gap(grads, plain) < 1e-4


@pytest.mark.parametrize("cut", [6, 4, 2, 1])
def test_whitening_is_of_the_whole_step_however_it_is_cut(tmp_path, cut):
    rule = MiniLLM(length_norm=False, gamma=0.95, own_reward=True, reward_scaling=0.5, whiten=True)
    _, grads = one_step(tmp_path, OWN, LossPlan(objective=WHOLE, rule=rule, authored=True), cut=cut)
    student, rows = read(OWN)

    def advantage(row: Both) -> Tensor:
        reward_T = 2 * (row.log_p_T - row.log_q_T).detach()
        return torch.stack([(0.95 ** torch.arange(len(r))) @ r for r in (reward_T[t:] for t in range(len(reward_T)))])

    every = torch.cat([advantage(row) for row in rows])
    mean, deviation = every.mean(), (every.var(correction=0) + 1e-8).sqrt()
    loss = minillm_loss(rows, lambda row: (advantage(row) - mean) / deviation, no_weight)
    assert gap(grads, gradients(student, loss)) < 1e-4
    plain = minillm_loss(rows, advantage, no_weight)
    assert gap(grads, gradients(student, plain)) > 0.1


@pytest.mark.parametrize("cut", [6, 2])
def test_ratios_beyond_ppos_clip_do_not_push_the_later_tokens_part(tmp_path, cut):
    responses = DRAWN["stale"]
    rule = MiniLLM(length_norm=False, clip_ratio=0.2, importance="policy")
    _, grads = one_step(tmp_path, responses, LossPlan(objective=WHOLE, rule=rule, authored=True), cut=cut)
    student, rows = read(responses)
    losses = []
    for row in rows:
        drawn, advantage = row.response.logp, returns(row, 1.0, length_norm=False)
        ratio = (row.log_q_T - torch.tensor(drawn)).exp()
        clipped = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
        losses.append(row.rkl_T() + clipped)
    assert gap(grads, gradients(student, torch.cat(losses).mean())) < 1e-4


def test_no_weight_is_above_its_clip(tmp_path):
    responses = DRAWN["stale"]
    rule = MiniLLM(length_norm=False, clip_weight=0.8)
    _, grads = one_step(tmp_path, responses, LossPlan(objective=WHOLE, rule=rule, authored=True))
    student, rows = read(responses)
    clipped = torch.cat([step_weight(row) > 0.8 for row in rows])
    assert 0 < int(clipped.sum()) < len(clipped)
    loss = minillm_loss(
        rows, lambda row: returns(row, 1.0, length_norm=False), lambda row: step_weight(row).clamp_max(0.8)
    )
    assert gap(grads, gradients(student, loss)) < 1e-4
