"""DistiLLM-2 through the real loop against two forwards and plain autograd; adaptive alpha by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from limbeck.objectives import build_objective
from limbeck.objectives.mixtures import SkewReverseKL
from limbeck.objectives.sequence.distillm2 import Beta
from limbeck.objectives.sequence.rules import AlphaByGap
from limbeck.training.loss import LossPlan
from limbeck.training.weighting import TokenWeighting
from limbeck.types import Interrupted
from tests.training.naive import (
    Both,
    Scripted,
    gap,
    gradients,
    norm,
    one_step,
    pairs,
    read,
    recorded,
    written,
)
from tests.training.play import identical, largest_gap, metrics, play, settings, stop_after, tiny_model, weights

SKL, SRKL = build_objective("skl", alpha=0.1), build_objective("srkl", alpha=0.1)
DISTILLM_2 = LossPlan(objective=SKL, student_objective=SRKL, authored=True)
RELEASED = TokenWeighting(reduction="sequence", beta=Beta())
PAIRS = pairs(4)


def own_of(rows: Sequence[Both]) -> list[Both]:
    return [row for row in rows if row.response.author == "student"]


def theirs_of(rows: Sequence[Both]) -> list[Both]:
    return [row for row in rows if row.response.author != "student"]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def row_mean(values: Sequence[Tensor]) -> Tensor:
    """Token means of each row, then a mean over rows."""
    return torch.stack([v.mean() for v in values]).mean()


def token_mean(values: Sequence[Tensor]) -> Tensor:
    """A mean over the tokens of all rows."""
    return torch.cat(list(values)).mean()


@pytest.mark.parametrize("cut", [8, 4, 2])
@pytest.mark.parametrize("detach", [False, True])
def test_a_step_of_distillm_2_is_skl_on_the_teachers_and_srkl_on_the_students(tmp_path, detach, cut):
    own = build_objective("srkl", alpha=0.1, detach_mixture=detach)
    loss_plan = LossPlan(objective=SKL, student_objective=own, authored=True)
    line, grads = one_step(tmp_path, PAIRS, loss_plan, weighting=RELEASED, cut=cut)
    student, rows = read(PAIRS)
    theirs, own = theirs_of(rows), own_of(rows)
    # The released code: token means of each response, then means over the pairs, then their sum.
    loss = row_mean([r.skl_T(0.1) for r in theirs]) + row_mean([r.srkl_T(0.1, detach=detach) for r in own])
    expected = gradients(student, loss)
    assert gap(grads, expected) < 1e-4
    assert line["grad_norm"] == pytest.approx(norm(expected), rel=1e-4)
    # What is logged are means over tokens, whatever the reduction.
    assert line["loss/teacher"] == pytest.approx(token_mean([r.skl_T(0.1) for r in theirs]).item(), rel=1e-4)
    assert line["loss/student"] == pytest.approx(token_mean([r.srkl_T(0.1) for r in own]).item(), rel=1e-4)
    assert line["log_q/student"] == pytest.approx(token_mean([r.log_q_T for r in own]).item(), rel=1e-4)
    assert line["log_p/teacher"] == pytest.approx(token_mean([r.log_p_T for r in theirs]).item(), rel=1e-4)
    assert line["beta"] == 0.5


def test_the_other_branch_of_a_row_would_show(tmp_path):
    _, grads = one_step(tmp_path, PAIRS, DISTILLM_2, weighting=RELEASED)
    student, rows = read(PAIRS)
    theirs, own = theirs_of(rows), own_of(rows)
    wrong = {
        "swapped": row_mean([r.srkl_T(0.1) for r in theirs]) + row_mean([r.skl_T(0.1) for r in own]),
        "both": 2 * row_mean([r.skl_T(0.1) + r.srkl_T(0.1) for r in rows]),
        "token": token_mean([r.skl_T(0.1) for r in theirs]) + token_mean([r.srkl_T(0.1) for r in own]),
    }
    for name, loss in wrong.items():
        assert gap(grads, gradients(student, loss)) > 0.01, name


@pytest.mark.parametrize("beta", [0.2, 0.7])
def test_beta_weighs_the_two_halves(tmp_path, beta):
    weighting = TokenWeighting(reduction="token", beta=Beta(shape="constant", start=beta), scale=1.0)
    line, grads = one_step(tmp_path, PAIRS, DISTILLM_2, weighting=weighting)
    student, rows = read(PAIRS)
    theirs, own = theirs_of(rows), own_of(rows)
    skl, srkl = token_mean([r.skl_T(0.1) for r in theirs]), token_mean([r.srkl_T(0.1) for r in own])
    assert gap(grads, gradients(student, (1 - beta) * skl + beta * srkl)) < 1e-4
    assert line["beta"] == beta


class Untouchable(SkewReverseKL):
    """No row may come here."""

    def pointwise(self, rows):
        raise AssertionError(f"{len(rows.student_logits_NK)} rows were judged by an objective that is not theirs")


def test_an_objective_sees_only_the_responses_of_its_author(tmp_path):
    theirs, own = written("teacher", 4, seed=0), written("student", 4, seed=1)
    with pytest.raises(AssertionError, match="rows were judged"):
        one_step(tmp_path / "a", PAIRS, LossPlan(objective=SKL, student_objective=Untouchable(), authored=True))
    line, grads = one_step(
        tmp_path / "b", theirs, LossPlan(objective=SKL, student_objective=Untouchable(), authored=True)
    )
    plain, plain_grads = one_step(tmp_path / "c", theirs, LossPlan(objective=SKL))
    assert gap(grads, plain_grads) < 1e-6 and line["loss"] == pytest.approx(plain["loss"])
    assert "loss/student" not in line and line["loss/teacher"] == line["loss"]
    line, _ = one_step(tmp_path / "d", own, LossPlan(objective=Untouchable(), student_objective=SRKL, authored=True))
    assert "loss/teacher" not in line and line["loss/student"] == line["loss"]


# --- adaptive alpha ---

# Wide bounds, so that hardly any alpha is clipped; a step of eight rows and one of four, so that a mean of means shows.
RULE = AlphaByGap(alpha0=0.5, low=0.01, high=0.99)
STEPS = (pairs(4, seed=20), pairs(2, seed=30))
ADAPTIVE = LossPlan(objective=SKL, student_objective=SRKL, rule=RULE, authored=True)


def alphas(rows: Sequence[Both], reference: dict[str, float]) -> list[float]:
    """1 - (1 - alpha0) m / gap within the bounds; the upper one where the other model likes the response better."""
    found = []
    for row in rows:
        alpha = 1 - 0.5 * reference[row.response.author] / row.gap if row.gap > 0 else 0.99
        found.append(min(max(alpha, 0.01), 0.99))
    return found


def test_alpha_waits_an_epoch_and_then_follows_the_mean_gap_of_that_epoch(tmp_path):
    student = tiny_model(1)
    passes = recorded(student)
    # A rate at which nothing moves: every gap is that of the weights we know.
    still = settings(max_steps=4, learning_rate=1e-20, max_grad_norm=0.0)
    play(student, tmp_path, still, author=Scripted(*STEPS), loss_plan=ADAPTIVE, weighting=RELEASED, temperature=1.0)
    lines = metrics(tmp_path)
    assert largest_gap(weights(student), weights(tiny_model(1))) < 1e-15
    assert all(line["alpha/teacher"] == line["alpha/student"] == 0.5 for line in lines[:2])
    model, every = read([r for step in STEPS for r in step])
    steps = [every[:8], every[8:]]
    for line, rows in zip(lines, steps * 2, strict=True):
        assert line["gap/teacher"] == pytest.approx(mean([r.gap for r in theirs_of(rows)]), rel=1e-4)
        assert line["gap/student"] == pytest.approx(mean([r.gap for r in own_of(rows)]), rel=1e-4)
    reference = {"teacher": mean([r.gap for r in theirs_of(every)]), "student": mean([r.gap for r in own_of(every)])}
    # Of responses, not of steps.
    assert mean([line["gap/teacher"] for line in lines[:2]]) != pytest.approx(reference["teacher"], rel=0.05)
    assert any(0.01 < alpha < 0.99 for alpha in alphas(every, reference))
    for number, rows in enumerate(steps):
        theirs, own = theirs_of(rows), own_of(rows)
        alpha_t, alpha_s = alphas(theirs, reference), alphas(own, reference)
        assert lines[2 + number]["alpha/teacher"] == pytest.approx(mean(alpha_t), abs=1e-3)
        assert lines[2 + number]["alpha/student"] == pytest.approx(mean(alpha_s), abs=1e-3)
        skl = row_mean([r.skl_T(alpha) for r, alpha in zip(theirs, alpha_t, strict=True)])
        srkl = row_mean([r.srkl_T(alpha) for r, alpha in zip(own, alpha_s, strict=True)])
        assert gap(passes[2 + number], gradients(model, skl + srkl)) < 1e-3
        first = row_mean([r.skl_T(0.5) for r in theirs]) + row_mean([r.srkl_T(0.5) for r in own])
        assert gap(passes[number], gradients(model, first)) < 1e-4


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_the_reference_gap_survives_a_checkpoint(tmp_path, stop):
    chosen = settings(max_steps=6, learning_rate=1e-2, warmup_steps=0)
    for folder in ("straight", "broken"):
        (tmp_path / folder).mkdir()

    def run(folder: str, wish: int) -> dict[str, Tensor]:
        student = tiny_model(1)
        play(
            student,
            tmp_path / folder,
            chosen,
            author=Scripted(*STEPS),
            loss_plan=ADAPTIVE,
            weighting=RELEASED,
            should_stop=stop_after(wish),
        )
        return weights(student)

    straight = run("straight", 1000)
    with pytest.raises(Interrupted):
        run("broken", stop)
    assert identical(straight, run("broken", 1000))
    timed = ("seconds", "tokens_per_s", "writing_seconds")
    lines = [
        [{k: v for k, v in line.items() if k not in timed} for line in metrics(tmp_path / folder)]
        for folder in ("straight", "broken")
    ]
    assert lines[0] == lines[1]
    assert [line["alpha/student"] == 0.5 for line in lines[0]] == [True, True, False, False, False, False]
