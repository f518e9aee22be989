"""ROUGE-L: how far the student's answers follow the teacher's, word by word in order (Lin 2004).

The figures are those of the package rouge-score with its Porter stemmer, as in the distillation papers. That package
lower-cases and keeps nothing but a-z and 0-9, so text without Latin letters or digits cannot be scored by it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from limbeck.flow import LimbeckError, ScoredRow


def rouge_l(ids: Sequence[str], candidates: Sequence[str], references: Sequence[str]) -> list[ScoredRow]:
    """ROUGE-L F1 of each candidate against its reference, one row an answer, each of weight 1.

    Args:
        ids: prompt ids, all different.
        candidates: the student's greedy answers.
        references: the teacher's greedy answers.

    Raises:
        LimbeckError: lengths differ, or no reference holds a single Latin letter or digit.
    """
    from rouge_score import rouge_scorer, tokenizers

    if not len(ids) == len(candidates) == len(references):
        raise LimbeckError(
            f"got {len(ids)} ids, {len(candidates)} candidates and {len(references)} references; expected as many of "
            "each: answer every prompt with both models"
        )
    if references and not any(re.search("[a-z0-9]", text.lower()) for text in references):
        raise LimbeckError(
            f"none of the {len(references)} reference answers holds a letter a-z or a digit, all that ROUGE-L sees: "
            "leave rouge out of `evaluate` for this data"
        )
    # The default tokenizer, given by hand: left to itself the scorer logs through absl, which then takes over the
    # root logger's handlers.
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=tokenizers.DefaultTokenizer(use_stemmer=True))
    return [
        ScoredRow(id=name, weight=1.0, values={"rouge_l": float(scorer.score(reference, candidate)["rougeL"].fmeasure)})
        for name, candidate, reference in zip(ids, candidates, references, strict=True)
    ]
