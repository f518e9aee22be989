"""Problems of the field, and the programs in the answers to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from limbeck.evaluation.sandbox import jail
from limbeck.evaluation.sandbox.host import Limits, run_program, run_programs
from limbeck.evaluation.tasks.code_answers import job_of, program_of
from limbeck.evaluation.tasks.problems import Problem, read_problems
from limbeck.types import LimbeckError
from tests.evaluation.few_problems import BODY, HUMANEVAL, MATH, MBPP, ROWS, WHOLE, write

confined = pytest.mark.skipif(bool(jail.missing()), reason=f"this machine has no {jail.missing()}")
LIMITS = Limits(timeout_s=20.0)


def problem(tmp_path: Path, task: Any) -> Problem:
    return read_problems(task, write(tmp_path, task))[0]


def test_what_is_asked(tmp_path):
    maths = problem(tmp_path, "gsm8k")
    assert maths.id == "gsm8k/1" and maths.answer == "4" and maths.plain == "Question: What is 2 + 2?\nAnswer:"
    assert maths.request.startswith("What is 2 + 2?") and "\\boxed{}" in maths.request
    assert problem(tmp_path, "math").answer == "\\frac{x}{2}"
    code = problem(tmp_path, "humaneval")
    assert code.plain == HUMANEVAL[0]["prompt"] and code.names == ("add",) and HUMANEVAL[0]["prompt"] in code.request
    chain = problem(tmp_path, "mbpp")
    assert chain.names == ("Pair", "sum") and chain.setup == "import math\n" and "assert False" not in chain.tests
    assert "assert sum([Pair(1), Pair(2)]) == 3" in chain.plain and chain.plain.endswith("[BEGIN]\n")


def test_limit_and_blank_lines(tmp_path):
    path = write(tmp_path, "gsm8k")
    path.write_text("\n" + path.read_text("utf-8") + "\n", "utf-8")
    assert [p.id for p in read_problems("gsm8k", path)] == ["gsm8k/2", "gsm8k/3"]
    assert [p.id for p in read_problems("gsm8k", path, 1)] == ["gsm8k/2"]


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        ("gsm8k", {"question": ""}, r"gsm8k.jsonl:1: got the fields answer, question; expected question"),
        ("gsm8k", {"answer": "4"}, r":1: .*####"),
        ("math", {"solution": "no box"}, r":1: .*boxed"),
        ("math", {"solution": "is \\boxed{ }"}, r":1: .*boxed"),
        ("math", {"problem": None}, r":1: .*expected problem"),
        ("humaneval", {"entry_point": "sub"}, r":1: prompt does not begin the function 'sub'"),
        ("humaneval", {"prompt": "def add(:"}, r":1: prompt is no Python"),
        ("mbpp", {"test_list": []}, r":1: got test_list '\[\]'; expected a list"),
        ("mbpp", {"test_list": "assert"}, r":1: got test_list"),
        ("mbpp", {"test_list": ["assert"]}, r":1: test_list is no Python"),
        ("mbpp", {"test_list": ["assert 1"], "test_setup_code": ""}, r":1: test_list tests nothing that code defines"),
        ("mbpp", {"code": "def f("}, r":1: code is no Python"),
    ],
)
def test_a_line_that_is_no_problem_is_named(task, change, said, tmp_path):
    path = write(tmp_path, task, [ROWS[task][0] | change])
    with pytest.raises(LimbeckError, match=said):
        read_problems(task, path)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "holds no problem"), ("{", ":1: got a line that is no JSON"), ("3", ":1: got a int"), (None, "no file")],
)
def test_a_file_that_is_none_is_named(text, said, tmp_path):
    path = tmp_path / "x.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LimbeckError, match=said):
        read_problems("gsm8k", path)


def test_a_problem_given_twice_is_named(tmp_path):
    with pytest.raises(LimbeckError, match=r"math.jsonl:2: got math/a/1 a second time"):
        read_problems("math", write(tmp_path, "math", MATH * 2))


def lines_of(tmp_path: Path, *lines: bytes) -> Path:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def test_only_a_line_feed_ends_a_line(tmp_path):
    """Every other line end of Unicode may stand in JSON as it is; a byte order mark before it, and CRLF behind it."""
    row = {"question": "One\u2028two\u2029three\x85four\x7f\u00a0?", "answer": "a\u2028b\n#### 4\n"}
    line = json.dumps(row, ensure_ascii=False).encode()
    path = lines_of(tmp_path, b"\xef\xbb\xbf" + line + b"\r", b"", line + b"\r", b"\r", b"")
    found = read_problems("gsm8k", path)
    assert [p.id for p in found] == ["gsm8k/1", "gsm8k/3"] and {p.answer for p in found} == {"4"}
    assert row["question"] in found[0].request and row["question"] in found[1].plain


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"a": "\xff"}', ":2: got byte 7 that is no UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', ":2: got byte 7 that is no UTF-8"),
        (b'{"a": ' + DEEP + b"}", ":2: got a line that is no JSON"),
        (DEEP, ":2: got a line that is no JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", ":2: got a line that is no JSON"),
        (b"\xff\xfe{\x00}\x00", ":2: got byte 0 that is no UTF-8"),
        (b"null", ":2: got a NoneType"),
        (b"{}", ":2: got the fields none"),
        (b'{"a\\nb\\u001b[2J": 1, "%s": 2}' % (b"x" * 9999), ":2: got the fields "),
    ],
    ids=["UTF-8", "surrogate bytes", "deep", "deep array", "digits", "UTF-16", "null", "empty", "keys"],
)
def test_a_line_that_cannot_be_read_is_named_in_one_line(task, line, said, tmp_path):
    good = json.dumps(ROWS[task][0]).encode()
    with pytest.raises(LimbeckError) as caught:
        read_problems(task, lines_of(tmp_path, good, line))
    assert said in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 400


ODD_VALUES = [
    None, True, 3, 1e400, float("nan"), [], ["x"], [[1]], {}, {"a": [1]}, "", " ", "\ud800", "x\udfff", "\0", "\x1b[2J",
    "-" * 100_000, "(" * 100_000, "a" + ".a" * 50_000, "x = " + "[" * 99 + "]" * 99, "lambda: " * 5000 + "1",
    "if 1:\n" + " if 1:\n" * 200, "'\\d'", "\ufeffx = 1", "def add(a, b):\n\treturn 1\n        return 2", "9" * 5000,
    "\\boxed{" * 2000, "####", "#### ", "#### \n", "import " + "a" * 5000, "f'{" * 200, "\u2028", "x" * (1 << 20),
    ["-" * 100_000], ["assert add"], ["\ud800"], [None, "x"], "x\ny", "async", "None", "1add", "add)", [""] * 1000,
]  # fmt: skip


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("number", range(len(ODD_VALUES)))
def test_an_odd_value_is_read_or_named_in_one_line(task, number, tmp_path):
    for field in (*ROWS[task][0], "id", "unique_id", "task_id", "test_setup_code", "test_imports", "answer"):
        path = write(tmp_path, task, [ROWS[task][0] | {field: ODD_VALUES[number]}])
        try:
            (found,) = read_problems(task, path)
        except LimbeckError as error:
            said = str(error)
            assert said.isprintable() and f"{task}.jsonl:1" in said and len(said) < 600, field
        else:
            # What is read can be asked, kept and run: it is text of Unicode, and has something to be compared with.
            texts = (found.id, found.request, found.plain, found.answer, found.tests, found.setup)
            assert json.dumps(texts, ensure_ascii=False).encode() and (found.answer or found.tests), field


ANSWERS = [
    (f"Sure!\n```python\n{WHOLE}```\nIt adds.", False, "block"),
    (f"```python\nprint(1)\n```\nthen\n```\n{WHOLE}```\n```python\nadd(1, 2)\n```", False, "block"),
    (f"```python\n{WHOLE}", False, "block"),
    (f"```py\n{BODY}```", False, "block"),
    (f"    ```python\n{WHOLE}    ```", False, "block"),
    (f"```bash\npip install x\n```\nUse this:\n{WHOLE}", False, "whole"),
    (f"Here it is:\nimport os\n{WHOLE}", False, "whole"),
    (BODY, False, "continuation"),
    (BODY, True, "continuation"),
    (f"{BODY}\n\ndef other():\n    broken(\n", True, "continuation"),
    (f"{BODY}\nprint(add(1, 2)", True, "continuation"),
]


@confined
@pytest.mark.parametrize(("text", "continues", "how"), ANSWERS)
def test_the_program_in_an_answer(text, continues, how, tmp_path):
    asked = problem(tmp_path, "humaneval")
    program, found = program_of(asked, text, continues=continues)
    assert found == how
    verdict = run_program(job_of(asked, program), LIMITS, tmp_path)
    assert verdict.passed, (verdict, program)


@confined
def test_mbpp_uses_classes_and_a_name_of_pythons_own(tmp_path):
    asked, code = problem(tmp_path, "mbpp"), MBPP[0]["code"]
    for text, continues in ((f"```python\n{code}```", False), (f"{code}\n[DONE]\nrubbish (", True)):
        program, _ = program_of(asked, text, continues=continues)
        assert run_program(job_of(asked, program), LIMITS, tmp_path).passed
    wrong = code.replace("math.fsum(p.a for p in pairs)", "0")
    assert run_program(job_of(asked, wrong), LIMITS, tmp_path).kind == "wrong"
    program, how = program_of(asked, "I cannot.", continues=False)
    assert how == "none" and run_program(job_of(asked, program), LIMITS, tmp_path).kind == "syntax"


@confined
def test_solutions_of_humaneval_pass_and_empty_bodies_fail(shared_data: Path, tmp_path):
    """A part of the 164, all kinds of helpers among them; all of them pass, which takes eight seconds."""
    path = shared_data / "humaneval/HumanEval.jsonl"
    solutions = [json.loads(line)["canonical_solution"] for line in path.read_text("utf-8").splitlines()]
    problems = read_problems("humaneval", path)
    assert len(problems) == 164
    chosen = [*range(0, 164, 8), 32, 33, 38, 50]
    for body, passes in ((None, True), ("    pass\n", False)):
        jobs = [job_of(problems[i], program_of(problems[i], body or solutions[i], continues=True)[0]) for i in chosen]
        for number, verdict in run_programs(jobs, LIMITS, tmp_path):
            assert verdict.passed is passes, (problems[chosen[number]].id, verdict)
