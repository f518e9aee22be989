"""Where the answer of a text stands, and when two answers are the same."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.evaluation.tasks.math_answers import MathChecker, extract, last_boxed, settled
from limbeck.evaluation.tasks.problems import read_problems


@pytest.fixture(scope="module")
def checker():
    with MathChecker() as opened:
        yield opened


@pytest.mark.parametrize(
    ("text", "answer", "where"),
    [
        (r"so \boxed{5} or rather \boxed{\frac{1}{2}}. Done 7", r"\frac{1}{2}", "boxed"),
        (r"the set \boxed{\{1, 2\}}", r"\{1, 2\}", "boxed"),
        (r"cut off \boxed{\frac{1}{2", "2", "last number"),
        ("2 + 2 = 4\n#### 4", "4", "hashes"),
        ("#### 7\n#### $1,250.50 dollars", "1,250.50", "hashes"),
        ("#### x + 1.\n12", "x + 1", "hashes"),
        ("There are 3 and 12,000 of them, -5.50.", "-5.50", "last number"),
        ("none at all", "", "none"),
        ("", "", "none"),
    ],
)
def test_where_the_answer_stands(text, answer, where):
    found = extract(text)
    assert (found.answer, found.where) == (answer, where)


@given(st.text(alphabet="{}\\ab1", max_size=30))
def test_a_box_gives_back_what_was_put_in_where_its_braces_close(text):
    depth = 0
    for place, letter in enumerate(text):
        if place and text[place - 1] == "\\":
            return
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth < 0:
            return
    if depth == 0 and not text.endswith("\\"):
        assert last_boxed("x \\boxed{" + text + "} y") == text


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        ("18", "18.00", "equal"), (r"\frac{1}{2}", "0.5", "equal"), (r"\frac{1}{2}", "1/2", "equal"),
        ("18", r"\$18", "equal"), ("70000", "$70,000", "equal"), ("1,234.5", "1234.5", "equal"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", "equal"), (r"\text{Evelyn}", "Evelyn", "equal"),
        ("x+1", "1+x", "equal"), ("2", "3", "different"), ("3", "", "different"), ("3", "}{", "different"),
        (r"\frac{1}{3}", "0.3", "different"), ("5", r"10^{10^{10}}", "timeout"),
    ],
)  # fmt: skip
def test_equality(checker, reference, answer, verdict):
    assert checker.check(reference, answer) == verdict


def test_what_takes_too_long_is_ended_and_the_next_answer_is_checked():
    with MathChecker(timeout_s=0.5) as impatient:
        assert impatient.check("x+1", "1+x") == "equal"
        began = time.monotonic()
        assert impatient.check("5", r"9^{9^{9^{9}}}") == "timeout"
        assert time.monotonic() - began < 5
        assert impatient.check("x+1", "1+x") == "equal"


@given(st.integers(-(10**7), 10**7), st.integers(-(10**7), 10**7), st.booleans(), st.booleans())
def test_integers_are_settled_without_algebra(first, second, commas, spaces):
    text = f"{second:,}" if commas else str(second)
    assert settled(str(first), f" {text} " if spaces else text) is (first == second)


def test_integers_are_settled_as_math_verify_would(checker):
    from math_verify import parse, verify

    for first, second in (("18", "18"), ("18", "19"), ("1,000", "1000"), ("-5", "5"), ("0", "0"), ("12,345", "12345")):
        naive = verify(parse(f"\\boxed{{{first}}}"), parse(f"\\boxed{{{second}}}"))
        assert settled(first, second) is naive


def test_the_answers_of_math_are_those_of_its_solutions(shared_data: Path, checker):
    path = shared_data / "math/math500_test.jsonl"
    solutions = [json.loads(line)["solution"] for line in path.read_text("utf-8").splitlines()]
    problems = read_problems("math", path)
    assert len(problems) == len(solutions) == 500
    assert all(
        checker.check(problem.answer, extract(solution).answer) == "equal"
        for problem, solution in zip(problems, solutions, strict=True)
    )


def test_the_answers_of_gsm8k_are_those_of_its_solutions(shared_data: Path, checker):
    path = shared_data / "gsm8k/test.jsonl"
    solutions = [json.loads(line)["answer"] for line in path.read_text("utf-8").splitlines()]
    problems = read_problems("gsm8k", path)
    assert len(problems) == len(solutions) == 1319
    for problem, solution in zip(problems, solutions, strict=True):
        assert checker.check(problem.answer, extract(solution).answer) == "equal"
        assert checker.check(problem.answer, problem.answer + "1") == "different"


def boxed_one_by_one(text: str) -> str | None:
    """The last box whose braces close, each box read on its own."""
    for start in reversed([match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[start : start + brace.start()]
    return None


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.sampled_from(["\\boxed{", "\\fbox {", "\\", "{", "}", "x", "\n", "\\{", "\\}", "boxed{"]), max_size=14)
)
def test_boxes_are_found_in_one_pass(parts):
    assert last_boxed("".join(parts)) == boxed_one_by_one("".join(parts))


def test_boxes_without_end_take_no_time():
    many = 10**5
    assert last_boxed("\\boxed{" * many) is None
    assert last_boxed("\\boxed{" * many + "4}" + "{") == "4"
