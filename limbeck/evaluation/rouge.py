"""ROUGE-L: how far an answer follows another, word by word in order (Lin 2004).

The figures are those of the package rouge-score with its Porter stemmer, as in the distillation papers. That package
lower-cases and keeps nothing but a-z and 0-9, so text without Latin letters or digits cannot be scored by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from limbeck.types import LimbeckError, ScoredRow


def rouge_l(ids: Sequence[str], candidates: Sequence[str], references: Sequence[str]) -> list[ScoredRow]:
    """ROUGE-L F1 of each candidate against its reference, one row per answer, each of weight 1.

    Args:
        ids: prompt ids, all different.
        candidates: the student's greedy answers.
        references: the teacher's greedy answers.

    Raises:
        LimbeckError: lengths differ, or no reference holds a single Latin letter or digit.
    """
    if not len(ids) == len(candidates) == len(references):
        raise LimbeckError(
            f"got {len(ids)} ids, {len(candidates)} candidates and {len(references)} references; expected as many of "
            "each: answer every prompt with both models"
        )
    scores = best_rouge_l(candidates, [(reference,) for reference in references])
    return [ScoredRow(id=name, weight=1.0, values={"rouge_l": f1}) for name, f1 in zip(ids, scores, strict=True)]


def best_rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L F1 of each candidate against the one of its references that gives the most, in [0, 1].

    An answer or a reference without a Latin letter or digit scores 0.

    Args:
        references: at least one for each candidate.

    Raises:
        LimbeckError: lengths differ, a candidate has no reference, or no reference of any holds a Latin letter or
            digit.
    """
    from rouge_score import rouge_scorer, tokenizers

    if len(candidates) != len(references) or not all(references):
        raise LimbeckError(
            f"got {len(candidates)} candidates and references for {sum(map(bool, references))}; expected one or more "
            "references for each candidate: leave out what has none"
        )
    count = sum(map(len, references))
    if count and not scorable(text for texts in references for text in texts):
        raise LimbeckError(
            f"none of the {count} reference answers holds a letter a-z or a digit, all that ROUGE-L sees: "
            "leave rouge out of `evaluate` for this data"
        )
    # The default tokenizer, given by hand: left to itself the scorer logs through absl, which then takes over the
    # root logger's handlers.
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=tokenizers.DefaultTokenizer(use_stemmer=True))
    return [
        float(scorer.score_multi(texts, candidate)["rougeL"].fmeasure)
        for texts, candidate in zip(references, candidates, strict=True)
    ]


def scorable(references: Iterable[str]) -> bool:
    """Whether one of the references has a word that ROUGE-L counts: a letter a-z or a digit."""
    return any(re.search("[a-z0-9]", text.lower()) for text in references)
