"""ROUGE-L against the package's own scorer and by hand, and a quiet import."""

import subprocess
import sys

import pytest
from rouge_score import rouge_scorer

from limbeck.evaluation.rouge import rouge_l
from limbeck.flow import LimbeckError

CANDIDATES = ["The cat sat on the mat.", "", "Dogs are running quickly", "unrelated words here", "Ünïcode 42"]
REFERENCES = ["A cat was sitting on the mat", "Something", "The dog runs quick", "entirely other text", "unicode 42"]


def test_equal_to_the_packages_own_scorer():
    own = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    rows = rouge_l([str(i) for i in range(5)], CANDIDATES, REFERENCES)
    for row, candidate, reference in zip(rows, CANDIDATES, REFERENCES, strict=True):
        assert row.values["rouge_l"] == pytest.approx(own.score(reference, candidate)["rougeL"].fmeasure, abs=1e-12)
        assert row.weight == 1.0


def test_by_hand():
    rows = rouge_l(["same", "none", "half"], ["one two", "x y", "a b c d"], ["one two", "one two", "a b"])
    assert [row.values["rouge_l"] for row in rows] == pytest.approx([1.0, 0.0, 2 * 0.5 * 1 / 1.5])


def test_uneven_lists_and_unscorable_texts_are_refused():
    with pytest.raises(LimbeckError, match="as many of each"):
        rouge_l(["a"], ["x", "y"], ["x"])
    with pytest.raises(LimbeckError, match="leave rouge out"):
        rouge_l(["a"], ["你好"], ["世界"])


def test_it_says_nothing_and_touches_no_log_handler():
    code = (
        "import logging\n"
        "from limbeck.evaluation.rouge import rouge_l\n"
        "import sys; assert 'rouge_score' not in sys.modules and 'nltk' not in sys.modules\n"
        "before = list(logging.getLogger().handlers)\n"
        "rouge_l(['a'], ['running dogs'], ['the dog runs'])\n"
        "assert logging.getLogger().handlers == before\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
