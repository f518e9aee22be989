"""What each token counts, by hand."""

from __future__ import annotations

import pytest

from limbeck.objectives.sequence.distillm2 import Beta
from limbeck.rollouts.sources import StepCounter
from limbeck.training.weighting import TokenWeighting
from limbeck.types import Author, Response

HALF = StepCounter(step=5, total=10)


def response(author: Author, length: int) -> Response:
    return Response(prompt_id="p", author=author, prompt_ids=(1,), response_ids=(2,) * length, stop="length")


# Numbers of rows mean nothing; the teacher's and data's have 2 and 6 tokens, the student's 4, 8 and 12.
STEP = {
    7: response("teacher", 2),
    3: response("student", 4),
    9: response("data", 6),
    1: response("student", 8),
    4: response("student", 12),
}


def constant(start: float) -> Beta:
    return Beta(shape="constant", start=start)


@pytest.mark.parametrize(
    ("weighting", "weights"),
    [
        (TokenWeighting(), [1 / 32] * 5),
        (TokenWeighting(reduction="sequence"), [1 / 10, 1 / 20, 1 / 30, 1 / 40, 1 / 60]),
        # 2 * 0.75 over the 8 tokens of the teacher's, 2 * 0.25 over the student's 24.
        (TokenWeighting(beta=constant(0.25)), [1.5 / 8, 0.5 / 24, 1.5 / 8, 0.5 / 24, 0.5 / 24]),
        # The same over two rows and three.
        (
            TokenWeighting(reduction="sequence", beta=constant(0.25)),
            [1.5 / (2 * 2), 0.5 / (3 * 4), 1.5 / (2 * 6), 0.5 / (3 * 8), 0.5 / (3 * 12)],
        ),
        (TokenWeighting(reduction="sequence", beta=constant(0.0), scale=1.0), [1 / 4, 0, 1 / 12, 0, 0]),
        (TokenWeighting(beta=constant(1.0), scale=3.0), [0, 3 / 24, 0, 3 / 24, 3 / 24]),
    ],
)
def test_weights_by_hand(weighting, weights):
    found = weighting.weights(STEP, HALF, 2)
    assert list(found) == list(STEP)
    assert list(found.values()) == pytest.approx(weights)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize(("beta", "total"), [(None, 1.0), (0.3, 2.0), (0.5, 2.0)])
def test_all_tokens_together_count_as_much_as_the_scale(reduction, beta, total):
    weighting = TokenWeighting(reduction=reduction, beta=None if beta is None else constant(beta))
    weights = weighting.weights(STEP, HALF, 2)
    assert sum(len(STEP[row].response_ids) * weight for row, weight in weights.items()) == pytest.approx(total)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_released_distillm_2_is_the_sum_of_two_means(reduction):
    """At beta 0.5 with the scale of 2 that is the default: SKL + SRKL, each a mean over its own responses."""
    weights = TokenWeighting(reduction=reduction, beta=Beta()).weights(STEP, HALF, 2)
    for own in (False, True):
        alone = {row: r for row, r in STEP.items() if (r.author == "student") == own}
        mean = TokenWeighting(reduction=reduction).weights(alone, HALF, 2)
        assert {row: weights[row] for row in alone} == pytest.approx(mean)


@pytest.mark.parametrize(("own", "total"), [(False, 0.6), (True, 1.4)])
def test_a_step_by_one_author_alone_keeps_its_share(own, total):
    """It is not made up for: over training both authors have the weight that beta says, however they are mixed."""
    alone = {row: r for row, r in STEP.items() if (r.author == "student") == own}
    weights = TokenWeighting(beta=constant(0.7)).weights(alone, HALF, 2)
    assert sum(len(alone[row].response_ids) * weight for row, weight in weights.items()) == pytest.approx(total)


def test_beta_moves_with_the_clock():
    weighting = TokenWeighting(beta=Beta(shape="code", start=0.5, end=0.75))
    betas = [weighting.beta_at(StepCounter(step=step, total=8), 4) for step in (0, 2, 4, 7)]
    assert betas == pytest.approx([0.5, 0.625, 0.75, 0.75])
    early, late = (weighting.weights(STEP, StepCounter(step=step, total=8), 4) for step in (0, 4))
    assert late[3] == pytest.approx(1.5 * early[3]) and late[7] == pytest.approx(0.5 * early[7])
    # Epochs are counted by the steps of an epoch: the saw-tooth of two epochs begins anew in the second.
    saw = TokenWeighting(beta=Beta(shape="sawtooth", start=0.5, end=1.0))
    assert [saw.beta_at(StepCounter(step=step, total=8), 4) for step in (0, 1, 4)] == pytest.approx([0.75, 1.0, 1.0])
    assert TokenWeighting().beta_at(HALF, 4) is None
