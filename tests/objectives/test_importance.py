"""Importance weights against exact gradients: every response of a tiny vocabulary, drawn from an earlier student."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.objectives.sequence.importance import importance_weight
from limbeck.objectives.sequence.rules import ImportanceWeights, SequenceStats, build_rule
from limbeck.types import LimbeckError
from tests.objectives.test_returns import Tables


def earlier(tables: Tables, distance: float = 1.5) -> Tensor:
    """Log-probabilities of all tokens under an earlier student."""
    noise = torch.randn(tables.student_PV.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    before = tables.student_PV.detach() + distance * noise
    log_before_NV = (tables.hidden_ND @ before).log_softmax(-1)
    return log_before_NV.gather(-1, tables.label_N[:, None])[:, 0]


def opd(tables: Tables, drawn_N: Tensor, rule: ImportanceWeights | None) -> Tensor:
    """The expected gradient of `opd` on responses drawn with these log-probabilities."""
    weight_N = torch.ones_like(drawn_N)
    if rule is not None:
        found_N = rule.apply(seen(tables, drawn_N)).weight_N
        assert found_N is not None
        weight_N = found_N
    return tables.estimate(drawn_N, weight_N, ["opd"])


def seen(tables: Tables, drawn_N: Tensor) -> SequenceStats:
    rows = int(tables.sequence_N.max()) + 1
    return SequenceStats(
        log_q_N=tables.log_q_N,
        log_p_N=tables.log_p_N,
        drawn_logp_N=drawn_N,
        sequence_N=tables.sequence_N,
        by_student_B=torch.ones(rows, dtype=torch.bool),
        partners=(-1,) * rows,
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("importance", ["prefix", "sequence"])
def test_opd_on_an_earlier_students_responses_has_the_gradient_on_the_students_own(seed, importance):
    tables = Tables(seed=seed)
    drawn_N, ones_N = earlier(tables), torch.ones_like(tables.log_q_N)
    own = tables.estimate(tables.log_q_N, ones_N, ["rkl"])
    found = opd(tables, drawn_N, ImportanceWeights(importance=importance))
    torch.testing.assert_close(found, own, rtol=1e-10, atol=1e-13)
    unweighed = opd(tables, drawn_N, None)
    assert (unweighed - own).norm() > 0.2 * own.norm(), "what the weights are for"


@pytest.mark.parametrize("seed", range(3))
def test_by_step_it_is_reverse_kl_after_the_tokens_that_are_there(seed):
    """The paper's per-token loss on the prefixes as they were drawn: what `rkl` says of the same responses."""
    tables = Tables(seed=seed)
    drawn_N, ones_N = earlier(tables), torch.ones_like(tables.log_q_N)
    exact = tables.estimate(drawn_N, ones_N, ["rkl"])
    found = opd(tables, drawn_N, ImportanceWeights())
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-13)
    unweighed = opd(tables, drawn_N, None)
    assert (unweighed - exact).norm() > 0.2 * exact.norm()


def test_a_mixture_with_the_teacher_is_weighed_too():
    tables = Tables()
    drawn_N, ones_N = tables.mixed(0.2), torch.ones_like(tables.log_q_N)
    exact = tables.estimate(drawn_N, ones_N, ["rkl"])
    torch.testing.assert_close(opd(tables, drawn_N, ImportanceWeights()), exact, rtol=1e-10, atol=1e-13)


def test_tokens_of_others_weigh_one():
    tables = Tables()
    drawn_N = earlier(tables)
    others_N = tables.sequence_N % 2 == 0
    told = ImportanceWeights(importance="prefix").apply(seen(tables, drawn_N.masked_fill(others_N, torch.nan)))
    assert told.weight_N is not None
    assert (told.weight_N[others_N] == 1).all() and (told.weight_N[~others_N] != 1).all()


def test_ratios_equal_a_loop():
    lengths = [4, 1, 3]
    g = torch.Generator().manual_seed(1)
    log_q_N, drawn_N = torch.randn(2, sum(lengths), generator=g)
    sequence_N = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    rows = (log_q_N - drawn_N).exp().split(lengths)
    expected = {
        "step": torch.cat(list(rows)),
        "prefix": torch.cat([row.cumprod(0) for row in rows]),
        "sequence": torch.cat([row.prod().expand(len(row)) for row in rows]),
    }
    for ratio, weight_N in expected.items():
        found_N = importance_weight(log_q_N, drawn_N, sequence_N, ratio=ratio)  # type: ignore[arg-type]
        torch.testing.assert_close(found_N, weight_N)
        clipped_N = importance_weight(log_q_N, drawn_N, sequence_N, ratio=ratio, clip_weight=0.8)  # type: ignore[arg-type]
        torch.testing.assert_close(clipped_N, weight_N.clamp_max(0.8))
        assert importance_weight(log_q_N[:0], drawn_N[:0], sequence_N[:0], ratio=ratio).shape == (0,)  # type: ignore[arg-type]


def test_the_ratio_of_a_late_row_is_not_rounded_by_the_rows_before():
    log_q_N, drawn_N = torch.full((30_000,), -1e-3), torch.full((30_000,), -30.0)
    drawn_N[-3:] = log_q_N[-3:]
    sequence_N = torch.arange(10_000).repeat_interleave(3)
    weight_N = importance_weight(log_q_N, drawn_N, sequence_N, ratio="prefix")
    torch.testing.assert_close(weight_N[-3:], torch.ones(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"importance": "token"}, "importance='token': expected one of step, prefix, sequence"),
        ({"clip_weight": -1}, "clip_weight=-1.0"),
    ],
)
def test_mistakes_are_refused(options, match):
    with pytest.raises(LimbeckError, match=match):
        build_rule("importance", **options)
