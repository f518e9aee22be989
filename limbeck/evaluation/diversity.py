"""Diversity of several answers to one prompt, counted in words.

Words are those of sacrebleu's tokenizer 13a, case kept, so that all figures are over the same words: punctuation stands
apart, and text written without spaces is one long word. N-grams never cross from one answer to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU


def diversity(answers: Sequence[str]) -> dict[str, float]:
    """All figures of the answers to one prompt: distinct_1, distinct_2, self_bleu and answer_words (their mean length).

    Raises:
        LimbeckError: fewer than two answers.
    """
    return {
        "distinct_1": distinct(answers, 1),
        "distinct_2": distinct(answers, 2),
        "self_bleu": self_bleu(answers),
        "answer_words": sum(len(words(answer)) for answer in answers) / len(answers),
    }


def words(text: str) -> list[str]:
    """The words of a text, see above."""
    return _bleu().tokenizer(text.rstrip()).split()


def distinct(answers: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams of the answers together, in (0, 1] (Li et al. 2016, distinct-n).

    0 where there are no n-grams at all: answers that say too little to differ are not diverse. The share falls with
    the amount of text, so it only compares between answers as many and as long.
    """
    found = [gram for answer in answers for gram in _ngrams(words(answer), n)]
    return len(set(found)) / len(found) if found else 0.0


def self_bleu(answers: Sequence[str]) -> float:
    """BLEU of each answer with the others as its references, the mean of it, in [0, 1]; 1 where all are alike.

    Self-BLEU of Zhu et al. 2018 (Texygen), lower is more diverse. BLEU is sacrebleu's for sentences, divided by 100:
    tokenizer 13a, n-grams up to 4, smoothing "exp", effective order (an answer of two words is measured by n-grams up
    to 2). For an answer without words it is undefined, and here 1 if another one has none either, else 0.

    Raises:
        LimbeckError: fewer than two answers.
    """
    if len(answers) < 2:
        raise LimbeckError(
            f"got {len(answers)} answers to a prompt; expected at least 2 to compare: raise "
            "evaluate.groups.diversity.samples"
        )
    empty = [not words(answer) for answer in answers]
    scores = []
    for i, answer in enumerate(answers):
        if empty[i]:
            scores.append(1.0 if sum(empty) > 1 else 0.0)
        else:
            others = [*answers[:i], *answers[i + 1 :]]
            # Equal answers come to a little more than 100 there.
            scores.append(min(1.0, _bleu().sentence_score(answer, others).score / 100))
    return sum(scores) / len(scores)


def sample_nll(logps: Sequence[Sequence[float]]) -> float:
    """Mean negative log-probability of all tokens of the answers to one prompt, nats/token.

    With log-probabilities at temperature 1 of answers drawn at temperature 1 this estimates the entropy of the model
    over its own answers. At another temperature it says how likely the answers are, not how uncertain their drawing
    was.

    Raises:
        LimbeckError: no tokens.
    """
    tokens = sum(map(len, logps))
    if not tokens:
        raise LimbeckError("got answers without tokens; expected at least the end of one: answer again")
    return -math.fsum(logp for answer in logps for logp in answer) / tokens


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


@cache
def _bleu() -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize="13a", smooth_method="exp", effective_order=True)
