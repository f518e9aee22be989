"""MiniLLM's advantage against exact gradients: every response of a tiny vocabulary, weighed by its probability."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.objectives import build_objective, fused_distillation_loss, label_logp, minillm_advantage
from limbeck.objectives.sequence.minillm import Importance
from limbeck.types import DenseSignal, Head, LimbeckError

V, T = 3, 3


class Tables:
    """Student and teacher as tables: the logits of the next token after each prefix. Hidden states say which prefix."""

    def __init__(self, length: int = T, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        prefixes = {p: i for i, p in enumerate(p for t in range(length) for p in itertools.product(range(V), repeat=t))}
        sequences = list(itertools.product(range(V), repeat=length))
        self.student_PV, self.teacher_PV = torch.randn(2, len(prefixes), V, generator=g, dtype=torch.float64)
        self.student_PV.requires_grad_()
        self.label_N = torch.tensor(sequences).flatten()
        self.sequence_N = torch.arange(len(sequences)).repeat_interleave(length)
        prefix_N = torch.tensor([prefixes[s[:t]] for s in sequences for t in range(length)])
        self.hidden_ND = torch.eye(len(prefixes), dtype=torch.float64)[prefix_N]
        self.head = Head(weight_VD=self.student_PV.T, vocab_size=V)
        self.signal = DenseSignal(hidden_ND=self.hidden_ND, head=Head(weight_VD=self.teacher_PV.T, vocab_size=V))
        self.log_q_N, self.log_p_N = label_logp(self.hidden_ND, self.head, self.signal, self.label_N)

    def total(self, value_N: Tensor) -> Tensor:
        """Sum over the tokens of each response."""
        return value_N.new_zeros(int(self.sequence_N.max()) + 1).index_add(0, self.sequence_N, value_N)

    def exact(self) -> Tensor:
        """Gradient of KL(q||p) between whole responses, by autograd."""
        logits = (self.hidden_ND @ self.student_PV, self.hidden_ND @ self.teacher_PV)
        log_q, log_p = (t.log_softmax(-1).gather(-1, self.label_N[:, None])[:, 0] for t in logits)
        log_q_S, log_p_S = self.total(log_q), self.total(log_p)
        return torch.autograd.grad((log_q_S.exp() * (log_q_S - log_p_S)).sum(), self.student_PV)[0]

    def estimate(self, log_drawn_N: Tensor, weight_N: Tensor, parts: list[str], **options: Tensor) -> Tensor:
        """Gradient of the loss, on average over responses drawn with these log-probabilities."""
        chance_N = self.total(log_drawn_N).exp()[self.sequence_N]
        loss = fused_distillation_loss(
            self.hidden_ND,
            self.head,
            self.signal,
            build_objective("sum", parts=parts),
            weight_N=chance_N * weight_N,
            label_N=self.label_N,
            token_options=options,
        ).loss
        return torch.autograd.grad(loss, self.student_PV, retain_graph=True)[0]

    def minillm(self, drawn: Tensor | None = None, **settings: Any) -> Tensor:
        """Single-step part and long-term part."""
        settings = {"length_norm": False} | settings
        advantage_N, weight_N = minillm_advantage(self.log_q_N, self.log_p_N, drawn, self.sequence_N, **settings)
        log_drawn_N = self.log_q_N if drawn is None else drawn
        return self.estimate(log_drawn_N, weight_N, ["rkl", "policy_gradient"], advantage=advantage_N)

    def mixed(self, share: float) -> Tensor:
        """Log-probabilities of teacher-mixed sampling, token by token."""
        return (share * self.log_p_N.exp() + (1 - share) * self.log_q_N.exp()).log()


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_gradient_of_kl_between_responses(seed):
    tables = Tables(seed=seed)
    torch.testing.assert_close(tables.minillm(), tables.exact(), rtol=1e-10, atol=1e-13)


def test_it_is_what_reinforce_estimates_with_less_noise():
    """REINFORCE credits a token with its own reward too, from the sample alone."""
    tables = Tables()
    reward_N, ones_N = tables.log_p_N - tables.log_q_N, torch.ones_like(tables.log_q_N)
    later_N, _ = minillm_advantage(tables.log_q_N, tables.log_p_N, None, tables.sequence_N, length_norm=False)
    reinforce = tables.estimate(tables.log_q_N, ones_N, ["policy_gradient"], advantage=reward_N + later_N)
    torch.testing.assert_close(reinforce, tables.exact(), rtol=1e-10, atol=1e-13)
    opd = tables.estimate(tables.log_q_N, ones_N, ["opd", "policy_gradient"], advantage=later_N)
    torch.testing.assert_close(opd, tables.exact(), rtol=1e-10, atol=1e-13)


def test_without_the_long_term_part_it_is_not():
    tables = Tables()
    single = tables.minillm(gamma=0.0)
    rkl = tables.estimate(tables.log_q_N, torch.ones_like(tables.log_q_N), ["rkl"])
    torch.testing.assert_close(single, rkl)
    exact = tables.exact()
    assert (single - exact).norm() > 0.1 * exact.norm()
    # The last token has no later ones: there it is exact.
    last = slice(-(V ** (T - 1)), None)
    torch.testing.assert_close(single[last], exact[last], rtol=1e-10, atol=1e-13)


def test_weights_of_whole_responses_repair_teacher_mixed_sampling():
    tables = Tables()
    drawn_N = tables.mixed(0.2)
    torch.testing.assert_close(tables.minillm(drawn_N, importance="sequence"), tables.exact(), rtol=1e-10, atol=1e-13)


def test_weights_by_step_are_biased_and_bounded():
    tables = Tables()
    drawn_N, exact = tables.mixed(0.2), tables.exact()
    _, weight_N = minillm_advantage(tables.log_q_N, tables.log_p_N, drawn_N, tables.sequence_N)
    torch.testing.assert_close(weight_N, (tables.log_q_N - drawn_N).exp())
    assert weight_N.max() <= 1.25
    later_N, _ = minillm_advantage(tables.log_q_N, tables.log_p_N, None, tables.sequence_N, length_norm=False)
    plain = tables.estimate(drawn_N, torch.ones_like(drawn_N), ["rkl", "policy_gradient"], advantage=later_N)
    by_step, without = ((found - exact).norm() / exact.norm() for found in (tables.minillm(drawn_N), plain))
    assert 0.05 < by_step < 0.3, "what the tokens before and after were drawn from is left as it is"
    assert by_step > 0.8 * without, "it repairs next to nothing"
    # A response of one token has neither.
    short = Tables(length=1)
    torch.testing.assert_close(short.minillm(short.mixed(0.2)), short.exact(), rtol=1e-10, atol=1e-13)


def part(tables: Tables, parts: list[str], drawn: Tensor | None = None, **settings: Any) -> Tensor:
    """The expected gradient of some parts, MiniLLM's advantage in the policy gradient."""
    settings = {"length_norm": False} | settings
    advantage_N, weight_N = minillm_advantage(tables.log_q_N, tables.log_p_N, drawn, tables.sequence_N, **settings)
    return tables.estimate(tables.log_q_N if drawn is None else drawn, weight_N, parts, advantage=advantage_N)


def test_with_a_tokens_own_reward_the_policy_gradient_is_the_whole_gradient():
    """The released code's return: REINFORCE, so that beside `rkl` the current token's part counts twice."""
    tables = Tables()
    torch.testing.assert_close(
        part(tables, ["policy_gradient"], own_reward=True), tables.exact(), rtol=1e-10, atol=1e-13
    )
    single = tables.estimate(tables.log_q_N, torch.ones_like(tables.log_q_N), ["rkl"])
    both = part(tables, ["rkl", "policy_gradient"], own_reward=True)
    torch.testing.assert_close(both, tables.exact() + single, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("scaling", [0.5, 2.0])
def test_scaled_rewards_scale_the_later_tokens_part(scaling):
    tables = Tables()
    later_part = part(tables, ["policy_gradient"])
    found = part(tables, ["policy_gradient"], reward_scaling=scaling)
    torch.testing.assert_close(found, later_part / scaling, rtol=1e-10, atol=1e-13)
    # What is clipped is the scaled reward.
    reward_N = (tables.log_p_N - tables.log_q_N) / scaling
    clipped_N, _ = minillm_advantage(
        tables.log_q_N,
        tables.log_p_N,
        None,
        tables.sequence_N,
        gamma=0.0,
        own_reward=True,
        length_norm=False,
        reward_scaling=scaling,
        clip_reward=0.3,
    )
    torch.testing.assert_close(clipped_N, reward_N.clamp(-0.3, 0.3))


def test_a_baseline_does_not_move_the_expected_gradient_and_the_deviation_divides_it():
    tables = Tables()
    plain = part(tables, ["policy_gradient"])
    found = part(tables, ["policy_gradient"], whitening=(0.7, 2.5))
    torch.testing.assert_close(found, plain / 2.5, rtol=1e-10, atol=1e-13)


def test_the_codes_weights_leave_the_current_tokens_part_as_it_was_drawn():
    tables = Tables()
    drawn_N, ones_N = tables.mixed(0.2), torch.ones_like(tables.log_q_N)
    by_policy = part(tables, ["rkl", "policy_gradient"], drawn_N, importance="policy")
    single = tables.estimate(drawn_N, ones_N, ["rkl"])
    long_term = part(tables, ["policy_gradient"], drawn_N)
    torch.testing.assert_close(by_policy, single + long_term, rtol=1e-10, atol=1e-13)


def ppo(tables: Tables, drawn_N: Tensor, epsilon: float) -> Tensor:
    """Gradient of the mean of max(-A ratio, -A clip(ratio)) over responses drawn so, by autograd."""
    advantage_N, _ = minillm_advantage(tables.log_q_N, tables.log_p_N, None, tables.sequence_N, length_norm=False)
    log_q_N = (tables.hidden_ND @ tables.student_PV).log_softmax(-1).gather(-1, tables.label_N[:, None])[:, 0]
    ratio_N = (log_q_N - drawn_N).exp()
    loss_N = torch.max(-advantage_N * ratio_N, -advantage_N * ratio_N.clamp(1 - epsilon, 1 + epsilon))
    chance_N = tables.total(drawn_N).exp()[tables.sequence_N]
    return torch.autograd.grad((chance_N * loss_N).sum(), tables.student_PV)[0]


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.9])
@pytest.mark.parametrize("importance", ["step", "policy"])
@pytest.mark.parametrize("seed", range(2))
def test_a_clipped_ratio_is_ppos(epsilon, importance, seed):
    tables = Tables(seed=seed)
    drawn_N = tables.mixed(0.2) if epsilon < 0.5 else (0.9 * tables.log_p_N.exp() + 0.1 * tables.log_q_N.exp()).log()
    found = part(tables, ["policy_gradient"], drawn_N, clip_ratio=epsilon, importance=importance)
    torch.testing.assert_close(found, ppo(tables, drawn_N, epsilon), rtol=1e-10, atol=1e-13)
    unclipped = part(tables, ["policy_gradient"], drawn_N, importance=importance)
    assert (found - unclipped).norm() > 0.01 * unclipped.norm()


def test_on_fresh_responses_no_ratio_is_clipped():
    tables = Tables()
    torch.testing.assert_close(tables.minillm(tables.log_q_N, clip_ratio=0.2), tables.exact(), rtol=1e-10, atol=1e-13)


def later(reward: list[float], t: int, gamma: float) -> float:
    return sum(gamma**k * reward[t + k] for k in range(1, len(reward) - t))


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("length_norm", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.7])
@pytest.mark.parametrize("own", [0, 1])
def test_returns_equal_a_loop(gamma, length_norm, clip, own):
    lengths = [5, 1, 8, 3, 0, 2]
    g = torch.Generator().manual_seed(0)
    log_q_N, log_p_N = torch.randn(2, sum(lengths), generator=g, dtype=torch.float64)
    sequence_N = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    advantage_N, weight_N = minillm_advantage(
        log_q_N,
        log_p_N,
        None,
        sequence_N,
        gamma=gamma,
        length_norm=length_norm,
        clip_reward=clip,
        own_reward=bool(own),
    )
    reward_N = (log_p_N - log_q_N).clamp(-clip, clip) if clip else log_p_N - log_q_N
    expected = []
    for reward in (part.tolist() for part in reward_N.split(lengths)):
        counts = [max(1, len(reward) - t - 1 + own) if length_norm else 1 for t in range(len(reward))]
        returns = [later(reward, t, gamma) + own * reward[t] for t in range(len(reward))]
        expected += [value / count for value, count in zip(returns, counts, strict=True)]
    torch.testing.assert_close(advantage_N, torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(weight_N, torch.ones_like(weight_N))


def test_weights_are_clipped():
    log_q_N, drawn_N, sequence_N = (
        torch.tensor([-1.0, -1.0, -1.0]),
        torch.tensor([-3.0, -0.5, -2.0]),
        torch.tensor([0, 0, 1]),
    )
    cases: list[tuple[Importance, list[float]]] = [("step", [2.0, -0.5, 1.0]), ("sequence", [1.5, 1.5, 1.0])]
    for importance, ratio in cases:
        _, weight_N = minillm_advantage(log_q_N, log_q_N, drawn_N, sequence_N, importance=importance, clip_weight=4.0)
        torch.testing.assert_close(weight_N, torch.tensor(ratio).exp().clamp_max(4.0))


def test_no_tokens_have_no_advantage():
    nothing_N = torch.zeros(0)
    advantage_N, weight_N = minillm_advantage(nothing_N, nothing_N, nothing_N, torch.zeros(0, dtype=torch.int64))
    assert advantage_N.shape == weight_N.shape == (0,)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gamma": 1.5}, "gamma=1.5: expected a number in"),
        ({"clip_reward": -1.0}, "clip_reward=-1.0: expected zero"),
        ({"clip_weight": float("nan")}, "clip_weight=nan"),
        ({"importance": "product"}, "expected one of step, sequence"),
        ({"reward_scaling": 0.0}, "reward_scaling=0.0: expected a number above 0"),
        ({"clip_ratio": 1.0}, "clip_ratio=1.0: expected zero"),
        ({"sequence_N": torch.tensor([1, 0])}, "row by row"),
    ],
)
def test_mistakes_are_refused(options, match):
    given = {"sequence_N": torch.tensor([0, 0])} | options
    with pytest.raises(LimbeckError, match=match):
        minillm_advantage(torch.zeros(2), torch.zeros(2), None, **given)
