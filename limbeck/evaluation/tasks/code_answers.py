"""The program in a model's answer, and the job that tests it.

    block         the last fenced block (```python or without a language) that defines the function, else the last one
    whole         no block, but a definition of the function: from the first line of Python at the margin
    continuation  HumanEval's prompt with the text behind it, up to where it leaves the function (Chen et al. 2021)
    none          nothing of that (MBPP: the text itself is run, and fails)

A model that was given HumanEval's prompt as a text to continue has done so: then nothing else is looked for.
A block that an answer cut off leaves open counts as far as it goes.
"""

from __future__ import annotations

import re
from typing import Literal

from limbeck.evaluation.sandbox.host import Job
from limbeck.evaluation.tasks.problems import STOPS, Problem

How = Literal["block", "whole", "continuation", "none"]

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_CODE_LINE = re.compile(r"^(?:import |from |def |class |async def |@)", re.MULTILINE)


def program_of(problem: Problem, text: str, *, continues: bool) -> tuple[str, How]:
    """The program in an answer, and how it was found. The answer keeps its white space: a continuation needs it.

    Args:
        continues: the model was given `problem.plain`, not `problem.request`.
    """
    if continues and problem.opening:
        return problem.opening + _cut(text, STOPS["humaneval"]), "continuation"
    blocks = [body for language, body in _FENCE.findall(text) if language.lower() in ("", "python", "py", "python3")]
    defines = re.compile(rf"^(?:async )?(?:def|class) {re.escape(problem.names[0])}\b", re.MULTILINE)
    if blocks:
        chosen = next((body for body in reversed(blocks) if defines.search(body)), blocks[-1])
        return _completed(problem, chosen, whole=bool(defines.search(chosen))), "block"
    text = _cut(text, ("[DONE]",)) if problem.task == "mbpp" else text
    if defines.search(text):
        begin = _CODE_LINE.search(text)
        return _completed(problem, text[begin.start() if begin else 0 :], whole=True), "whole"
    if problem.opening:
        return problem.opening + _cut(text, STOPS["humaneval"]), "continuation"
    return text, "none"


def job_of(problem: Problem, program: str) -> Job:
    """A program with the tests of its problem."""
    return Job(program=program, setup=problem.setup, names=problem.names, tests=problem.tests)


def _completed(problem: Problem, code: str, *, whole: bool) -> str:
    """Code behind HumanEval's prompt, whose imports and helpers it may use; what it defines again counts."""
    if not problem.opening:
        return code
    return f"{problem.opening}\n\n{code}" if whole else problem.opening + code


def _cut(text: str, stops: tuple[str, ...]) -> str:
    ends = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(ends)] if ends else text
