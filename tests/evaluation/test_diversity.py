"""Distinct-n and Self-BLEU by hand, against sacrebleu, and what holds for any answers."""

import math
import subprocess
import sys

import pytest
import sacrebleu
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from limbeck.evaluation.diversity import distinct, diversity, sample_nll, self_bleu, words
from limbeck.types import LimbeckError

WORDS = st.sampled_from(["the", "The", "cat", "sat", "on", "a", "mat", ".", "3.5", "it's", "&amp;", "\n", "über"])
ANSWERS = st.lists(st.lists(WORDS, max_size=9).map(" ".join), min_size=2, max_size=5)


def test_words_are_those_of_13a():
    assert words('He said: "it\'s 3.5%, no?"\n') == ["He", "said", ":", '"', "it's", "3.5", "%", ",", "no", "?", '"']
    assert words("") == words(" \n ") == []


def test_distinct_by_hand():
    answers = ["a b a", "b c"]
    assert distinct(answers, 1) == 3 / 5
    assert distinct(answers, 2) == 1.0
    assert distinct(["a b", "a b", "a b"], 2) == 1 / 3
    assert distinct(["a A"], 1) == 1.0
    # No pair reaches from one answer into the next.
    assert distinct(["a", "b", "a b"], 2) == 1.0


def test_distinct_of_answers_that_say_too_little():
    assert distinct(["", ""], 1) == 0.0
    assert distinct(["yes", "no"], 2) == 0.0
    assert distinct(["", "a b"], 1) == 1.0


def test_self_bleu_by_hand():
    # Of three words two are there, of two pairs one, of one triple none, which "exp" counts as a half.
    assert self_bleu(["the cat sat", "the cat ran"]) == pytest.approx((2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3), abs=1e-12)
    # The shorter one is found in the longer; it is two words short of it, and of the longer two words of four are.
    short, long = math.exp(1 - 4 / 2), (2 / 4 * 1 / 3 * 1 / (2 * 2) * 1 / (4 * 1)) ** (1 / 4)
    assert self_bleu(["a b", "a b c d"]) == pytest.approx((short + long) / 2, abs=1e-12)
    assert self_bleu(["one two", "three four"]) == 0.0


def test_self_bleu_of_empty_answers():
    assert self_bleu(["", ""]) == 1.0
    assert self_bleu(["", "a b"]) == 0.0
    assert self_bleu(["", "a b", "a b"]) == pytest.approx(2 / 3)
    assert self_bleu(["", " ", "a b", "a b"]) == 1.0
    with pytest.raises(LimbeckError, match=r"got 1 answers to a prompt.*evaluate\.groups\.diversity\.samples"):
        self_bleu(["alone"])


@settings(max_examples=60, deadline=None)
@given(ANSWERS)
def test_self_bleu_is_sacrebleus_own(answers):
    said = [answer for answer in answers if words(answer)]
    assume(len(said) >= 2)
    naive = [
        sacrebleu.sentence_bleu(
            said[i], said[:i] + said[i + 1 :], smooth_method="exp", tokenize="13a", use_effective_order=True
        ).score
        for i in range(len(said))
    ]
    assert self_bleu(said) == pytest.approx(sum(naive) / len(naive) / 100, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(ANSWERS, st.randoms(use_true_random=False))
def test_what_holds_for_any_answers(answers, random):
    found = diversity(answers)
    assert all(0.0 <= found[name] <= 1.0 for name in ("distinct_1", "distinct_2", "self_bleu"))
    assert found["answer_words"] == sum(len(words(answer)) for answer in answers) / len(answers)
    shuffled = random.sample(answers, len(answers))
    assert diversity(shuffled) == pytest.approx(found, abs=1e-12)
    doubled = diversity(answers * 2)
    assert doubled["self_bleu"] == 1.0
    assert doubled["distinct_1"] == pytest.approx(found["distinct_1"] / 2)


def test_sample_nll_is_the_mean_over_all_tokens_and_estimates_the_entropy():
    assert sample_nll([(-1.0, -2.0, -3.0), (-6.0,)]) == 3.0
    with pytest.raises(LimbeckError, match="without tokens"):
        sample_nll([(), ()])
    shares = {"a": 0.5, "b": 0.25, "c": 0.25}
    drawn = [(math.log(share),) for share in shares.values() for _ in range(int(100 * share))]
    assert sample_nll(drawn) == pytest.approx(-sum(p * math.log(p) for p in shares.values()))


def test_it_says_nothing_and_loads_sacrebleu_only_when_used():
    code = (
        "import logging, sys\n"
        "from limbeck.evaluation.diversity import diversity\n"
        "assert 'sacrebleu' not in sys.modules\n"
        "before = list(logging.getLogger().handlers)\n"
        "diversity(['one two .', 'one two .'] * 60)\n"
        "assert logging.getLogger().handlers == before\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
