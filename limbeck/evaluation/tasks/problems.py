"""Problems with answers that a machine can check: GSM8K, MATH, HumanEval and MBPP, read from JSONL by their own fields.

    gsm8k      question, answer (its last line "#### 42")                                Cobbe et al. 2021
    math       problem, answer (or solution with \\boxed{...})                           Hendrycks et al. 2021
    humaneval  task_id, prompt, entry_point, test                                        Chen et al. 2021
    mbpp       task_id, text (or prompt), code, test_list, test_setup_code, test_imports Austin et al. 2021
    chain      question, answer (its last line "#### 4"); see limbeck.evaluation.tasks.generators

All are asked without examples. A model with a chat template (or the Alpaca wording) is instructed; one without
gets a text to continue: HumanEval's prompt itself, "Question: ... Answer:" for maths, the wording of
Austin et al. for MBPP. The extra tests of MBPP (challenge_test_list) do not count, as in the paper.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from limbeck.evaluation.tasks.math_answers import extract, last_boxed
from limbeck.types import LimbeckError, is_unicode

TaskName = Literal["gsm8k", "math", "humaneval", "mbpp", "chain"]
CODE: tuple[TaskName, ...] = ("humaneval", "mbpp")

MATHS_REQUEST = "Reason step by step, and put the final answer within \\boxed{}."
CODE_REQUEST = "Answer with Python code in one ```python block."

# Where what continues a text has left the answer: those of Chen et al. 2021, and of the wordings here.
STOPS: dict[TaskName, tuple[str, ...]] = {
    "gsm8k": ("\nQuestion:",),
    "math": ("\nQuestion:",),
    "humaneval": ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint("),
    "mbpp": ("[DONE]",),
    "chain": (),
}

_Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A problem.

    Attributes:
        id: TASK/NAME, the name as the data has it, or the number of its line.
        request: the instruction, for models that follow instructions.
        plain: what a model of text continues.
        answer: of a mathematical problem.
        solution: the data's own answer as a text to learn from; empty where it has none.
        opening: of HumanEval: imports, helpers and the head of the function, a program of its own.
        category: of problems of several kinds or sizes.
        setup: runs before the tests; `names` are those they use of the program, the first one that of its function.
    """

    id: str
    task: TaskName
    request: str
    plain: str
    answer: str = ""
    solution: str = ""
    category: str = ""
    opening: str = ""
    setup: str = ""
    names: tuple[str, ...] = ()
    tests: str = ""


def read_problems(task: TaskName, path: Path, limit: int | None = None) -> list[Problem]:
    """The problems of a file, or the first ones.

    Raises:
        LimbeckError: there is no file, no problem in it, or a line that is none; names file and line.
    """
    if not path.is_file():
        raise LimbeckError(
            f"evaluate.groups.tasks.files.{task} is {path}, which is no file; give the path of its JSONL"
        )
    problems: list[Problem] = []
    seen: set[str] = set()
    for number, line in _lines(path):
        if limit is not None and len(problems) == limit:
            break
        where = f"{path}:{number}"
        problem = problem_of(task, _row(line, where), where, number)
        if problem.id in seen:
            raise LimbeckError(
                f"{where}: got {_shown(problem.id)[1:-1]} a second time; expected one line per problem: remove one"
            )
        seen.add(problem.id)
        problems.append(problem)
    if not problems:
        raise LimbeckError(
            f"{path} holds no problem; expected one JSON object per line: see evaluate.groups.tasks.files.{task}"
        )
    return problems


def problem_of(task: TaskName, row: Mapping[str, Any], where: str, number: int) -> Problem:
    """The problem of one row.

    Args:
        where: its place, for messages.
        number: names it where the data does not.

    Raises:
        LimbeckError: the row is none, or has no answer that can be checked.
    """
    return _READERS[task](dict(row), where, number)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that hold something, with their numbers. JSON may hold every other line end of Unicode."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LimbeckError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _row(line: bytes, where: str) -> _Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise LimbeckError(f"{where}: got byte {error.start} that is no UTF-8; expected UTF-8: convert it") from None
    except (ValueError, RecursionError) as error:
        raise LimbeckError(f"{where}: got a line that is no JSON ({error}); expected one object per line") from None
    if not isinstance(row, dict):
        raise LimbeckError(f"{where}: got a {type(row).__name__}; expected a JSON object: one problem a line")
    return row


def _text(row: _Row, where: str, *fields: str) -> str:
    """The first of some fields that is there."""
    for name in fields:
        if isinstance(row.get(name), str) and row[name].strip():
            return _unicode(row[name], where, name)
    got = _shown(", ".join(sorted(row)) or "none")[1:-1]
    raise LimbeckError(f"{where}: got the fields {got}; expected {' or '.join(fields)}, a text that is not empty")


def _texts(row: _Row, where: str, name: str, *, needed: bool = False) -> list[str]:
    found = row.get(name) or []
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found) or (needed and not found):
        raise LimbeckError(f"{where}: got {name} {str(found)[:40]!r}; expected a list of lines of Python")
    return [_unicode(text, where, name) for text in found]


def _unicode(text: str, where: str, name: str) -> str:
    if not is_unicode(text):
        raise LimbeckError(f"{where}: {name} holds half of a surrogate pair; expected Unicode text: repair the line")
    return text


def _id(row: _Row, where: str, name: str, number: int) -> str:
    """The name of a problem as the data has it, or the number of its line."""
    found = row.get(name)
    if found is None:
        return str(number)
    if not isinstance(found, str | int | float):
        raise LimbeckError(f"{where}: got {name} {str(found)[:40]!r}; expected a text or a number: repair the line")
    return _unicode(str(found), where, name)


def _shown(text: str) -> str:
    """A text as one line of a message."""
    return repr(text if len(text) <= 120 else f"{text[:120]} ...")


def _tree(source: str, where: str, name: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            # What Python warns of, such as an unknown escape, it runs all the same.
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        # The parser's own stack ends in a MemoryError without a word.
        why = str(error) or "nested too deeply"
        raise LimbeckError(f"{where}: {name} is no Python ({why}); expected code: repair or remove the line") from None


def _gsm8k(row: _Row, where: str, number: int) -> Problem:
    question, solution = _text(row, where, "question"), _text(row, where, "answer")
    if "####" not in solution:
        raise LimbeckError(f"{where}: the answer ends in no '#### NUMBER'; expected the form of GSM8K: repair the line")
    answer = extract(solution.rstrip().rpartition("\n")[2]).answer
    if not answer:
        raise LimbeckError(f"{where}: nothing stands behind '####'; expected the form of GSM8K: repair the line")
    return _maths("gsm8k", f"gsm8k/{_id(row, where, 'id', number)}", question, answer, solution)


def _chain(row: _Row, where: str, number: int) -> Problem:
    """The question alone, without instruction: models that are made for the task know no other."""
    found = _gsm8k(row, where, number)
    steps = found.solution.count("\n") + 1
    return replace(
        found,
        id=f"chain/{number}",
        task="chain",
        request=row["question"],
        plain=row["question"],
        category=f"{steps} step{'s' if steps > 1 else ''}",
    )


def _math(row: _Row, where: str, number: int) -> Problem:
    given = _text(row, where, "answer", "solution")
    answer = given if isinstance(row.get("answer"), str) and row["answer"].strip() else last_boxed(given)
    if answer is None or not answer.strip():
        raise LimbeckError(f"{where}: the solution holds no \\boxed answer; expected one, or a field answer: add it")
    name, solution = f"math/{_id(row, where, 'unique_id', number)}", row.get("solution")
    return _maths("math", name, _text(row, where, "problem"), answer, solution if isinstance(solution, str) else given)


def _maths(task: TaskName, id: str, question: str, answer: str, solution: str) -> Problem:
    return Problem(
        id=id,
        task=task,
        request=f"{question}\n\n{MATHS_REQUEST}",
        plain=f"Question: {question}\nAnswer:",
        answer=answer,
        solution=solution,
    )


def _humaneval(row: _Row, where: str, number: int) -> Problem:
    opening, entry = _text(row, where, "prompt"), _text(row, where, "entry_point")
    tests = _text(row, where, "test") + f"\n\ncheck({entry})\n"
    if entry not in _defined(_tree(opening, where, "prompt")):
        raise LimbeckError(
            f"{where}: prompt does not begin the function {_shown(entry)}; expected the one of entry_point"
        )
    _tree(tests, where, "test")
    return Problem(
        id=f"humaneval/{_id(row, where, 'task_id', number)}",
        task="humaneval",
        request=f"Write the whole Python function that begins so. {CODE_REQUEST}\n\n```python\n{opening.rstrip()}\n```",
        plain=opening,
        solution=_block(opening + row["canonical_solution"]) if isinstance(row.get("canonical_solution"), str) else "",
        opening=opening,
        setup=opening,
        names=(entry,),
        tests=tests,
    )


def _mbpp(row: _Row, where: str, number: int) -> Problem:
    asked, checks = _text(row, where, "text", "prompt"), _texts(row, where, "test_list", needed=True)
    reference = _tree(_text(row, where, "code"), where, "code")
    imports = [ast.unparse(node) for node in reference.body if isinstance(node, ast.Import | ast.ImportFrom)]
    begin = row.get("test_setup_code") or ""
    if not isinstance(begin, str):
        raise LimbeckError(f"{where}: got test_setup_code {str(begin)[:40]!r}; expected Python in one text")
    tests = "\n".join([_unicode(begin, where, "test_setup_code"), *checks]) + "\n"
    used = [node.id for node in ast.walk(_tree(tests, where, "test_list")) if isinstance(node, ast.Name)]
    names = tuple(dict.fromkeys(name for name in used if name in _defined(reference)))
    if not names:
        raise LimbeckError(
            f"{where}: test_list tests nothing that code defines; expected its function: repair the line"
        )
    shown = "\n".join(checks)
    return Problem(
        id=f"mbpp/{_id(row, where, 'task_id', number)}",
        task="mbpp",
        request=f"{asked}\n\nYour code should pass these tests:\n\n{shown}\n\n{CODE_REQUEST}",
        plain=f"You are an expert Python programmer, and here is your task: {asked} Your code should pass these tests:"
        f"\n\n{shown}\n[BEGIN]\n",
        solution=_block(row["code"]),
        setup="\n".join([*_texts(row, where, "test_imports"), *imports]) + "\n",
        names=names,
        tests=tests,
    )


def _block(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```"


def _defined(tree: ast.Module) -> set[str]:
    """The names that a program defines itself, at its top level; imported ones are not among them."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


_READERS: dict[TaskName, Callable[[_Row, str, int], Problem]] = {
    "gsm8k": _gsm8k,
    "math": _math,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
    "chain": _chain,
}
