"""The group `tasks`: problems whose answers a machine checks (GSM8K, MATH, HumanEval, MBPP), and lm-evaluation-harness.

Conditions are the tasks: `accuracy@gsm8k`, `pass_at_k@humaneval,k=1`. Programs run in the sandbox or not at all.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from limbeck.evaluation.context import EvaluationContext, EvaluationGroup, GroupResult, Who
from limbeck.evaluation.sandbox.host import NO_FILES, Limits, files_possible, require_sandbox
from limbeck.evaluation.sandbox.log import judge_all
from limbeck.evaluation.tasks.code_answers import job_of, program_of
from limbeck.evaluation.tasks.lm_eval import require_lm_eval, run_lm_eval
from limbeck.evaluation.tasks.math_answers import MathChecker, extract
from limbeck.evaluation.tasks.passk import pass_at_k
from limbeck.evaluation.tasks.problems import CODE, STOPS, Problem, read_problems
from limbeck.fields import STRICT, Count, NonNegative, Positive, Seed, Strings
from limbeck.prompts.readers import source_digest
from limbeck.types import Json, LimbeckError, Prompt, Response, Sampling, ScoredRow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graded:
    """One task: which answers to each problem are right, and what was wrong with the others."""

    right: Mapping[str, Sequence[bool]]
    failures: Counter[str]
    extraction: Counter[str]


@dataclass(config=STRICT, kw_only=True)
class TasksGroup(EvaluationGroup):
    """Problems whose answers a machine checks: mathematics, programs, and lm-evaluation-harness."""

    files: dict[Literal["gsm8k", "math", "humaneval", "mbpp"], str] = dataclasses.field(default_factory=dict)
    """The tasks and where their problems lie (JSONL in the fields of the original data sets)."""
    limit: Count | None = None
    """Only so many problems of each."""
    samples: Count = 1
    """Answers to each problem."""
    temperature: NonNegative = 0.0
    """Of the answers; more than one sample needs one above 0."""
    pass_at: tuple[Count, ...] = (1,)
    """k of pass@k, none above samples."""
    max_new_tokens: Count = 256
    timeout_s: Positive = 10.0
    """For a program in the sandbox."""
    memory_mb: Count = 512
    """For a program with its files, which lie in memory: they get 64 MiB of it, a quarter at most."""
    seed: Seed = 0
    lm_eval: Strings = ()
    """Tasks of lm-evaluation-harness, where it is installed."""

    def check(self, evaluation: EvaluationContext) -> None:
        del evaluation
        if not self.files and not self.lm_eval:
            raise LimbeckError(
                "evaluate asks for the group tasks, but names no task; give evaluate.groups.tasks.files, such as "
                "{gsm8k: test.jsonl}, or evaluate.groups.tasks.lm_eval"
            )
        most = max(self.pass_at, default=1)
        if most > self.samples:
            raise LimbeckError(
                f"evaluate.groups.tasks.pass_at asks for pass@{most} of {self.samples} answers a problem; raise "
                "evaluate.groups.tasks.samples, or lower pass_at"
            )
        if self.samples > 1 and self.temperature == 0:
            raise LimbeckError(
                f"evaluate.groups.tasks.samples={self.samples} at temperature 0 would give the same answer "
                f"{self.samples} times; set evaluate.groups.tasks.temperature above 0, or samples=1"
            )
        for task, path in self.files.items():
            read_problems(task, Path(path), self.limit)
            if task in CODE and not self.pass_at:
                raise LimbeckError(
                    f"evaluate.groups.tasks.pass_at is empty, but {task} is measured by pass@k; set it to [1]"
                )
        if any(task in CODE for task in self.files):
            with tempfile.TemporaryDirectory() as scratch:
                require_sandbox(Path(scratch), self._limits())
        if self.lm_eval:
            require_lm_eval()

    def inputs(self, evaluation: EvaluationContext) -> Json:
        del evaluation
        return {"content": {task: source_digest(path) for task, path in self.files.items()}}

    def measure(self, evaluation: EvaluationContext) -> GroupResult:
        tables: dict[str, Sequence[ScoredRow]] = {}
        detail: Json = {}
        scratch = evaluation.root / ".sandbox.partial"
        if any(task in CODE for task in self.files):
            detail["sandbox"] = require_sandbox(scratch, self._limits())
            if not files_possible():
                evaluation.console.warn(
                    f"tasks: programs have {NO_FILES}; an answer that writes a file counts as wrong"
                )
        for task, path in self.files.items():
            problems = read_problems(task, Path(path), self.limit)
            answers = self._answers(evaluation, problems)
            answered = [problem for problem in problems if problem.id in answers]
            if not answered:
                raise LimbeckError(
                    f"none of the {len(problems)} problems of {task} fits the student's window beside "
                    f"{self.max_new_tokens} new tokens; lower evaluate.groups.tasks.max_new_tokens or leave {task} out"
                )
            graded = (self._graded_code if task in CODE else _graded_maths)(evaluation, answered, answers)
            tables |= _tables(task, graded, self.pass_at)
            detail[task] = {
                "problems": len(problems),
                "too_long": len(problems) - len(answered),
                "answers": sum(len(marks) for marks in graded.right.values()),
                "right": sum(sum(marks) for marks in graded.right.values()),
                "failures": dict(graded.failures),
                "extraction": dict(graded.extraction),
            }
        if self.lm_eval:
            self._measure_lm_eval(evaluation, tables, detail)
        if scratch.exists():
            scratch.rmdir()
        return GroupResult(tables=tables, detail=detail)

    def _answers(self, evaluation: EvaluationContext, problems: Sequence[Problem]) -> dict[str, list[str]]:
        """The texts of the student, by problem; every sample has a seed of its own."""
        task = problems[0].task
        continues = _continues(evaluation)
        prompts = [Prompt(id=p.id, text=p.plain if continues else p.request, split="heldout") for p in problems]
        texts: dict[str, list[str]] = {}
        for number in range(self.samples):
            sampling = Sampling(
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                stop=STOPS[task] if continues else (),
                seed=self.seed + number,
            )
            for response in evaluation.answers("student", sampling, prompts):
                texts.setdefault(response.prompt_id, []).append(_text_behind(response, evaluation.tokenizer("student")))
        return texts

    def _graded_code(
        self, evaluation: EvaluationContext, problems: Sequence[Problem], answers: Mapping[str, Sequence[str]]
    ) -> Graded:
        continues = _continues(evaluation)
        owners, jobs = [], []
        extraction: Counter[str] = Counter()
        for problem in problems:
            for text in answers[problem.id]:
                program, how = program_of(problem, text, continues=continues)
                extraction[how] += 1
                owners.append(problem.id)
                jobs.append(job_of(problem, program))
        marks = [False] * len(jobs)
        failures: Counter[str] = Counter()
        root = evaluation.root
        # The log lies beside the scores, which are set aside when another group is added.
        judged = judge_all(jobs, self._limits(), log=root / "program_verdicts.jsonl", scratch=root / ".sandbox.partial")
        with evaluation.meter(f"run {problems[0].task}", len(jobs), "programs") as meter:
            for number, verdict in judged:
                marks[number] = verdict.passed
                if not verdict.passed:
                    failures[verdict.kind] += 1
                meter.advance(1)
        right: dict[str, list[bool]] = {}
        for owner, mark in zip(owners, marks, strict=True):
            right.setdefault(owner, []).append(mark)
        return Graded(right=right, failures=failures, extraction=extraction)

    def _measure_lm_eval(
        self, evaluation: EvaluationContext, tables: dict[str, Sequence[ScoredRow]], detail: Json
    ) -> None:
        """The student's rows and figures; the teacher's figures beside those of the student after training."""
        who = list[Who](("student",))
        if evaluation.part == "after" and evaluation.has_teacher:
            who.append("teacher")
        for one in who:
            speaker = evaluation.speaker(one)
            found = run_lm_eval(
                self.lm_eval,
                speaker.model,
                speaker.tokenizer,
                chat=speaker.template == "chat",
                batch_size=evaluation.settings.batch_size,
                limit=self.limit,
                seed=self.seed,
            )
            detail.setdefault("lm_eval", {"version": found.version})[one] = found.results
            if one == "student":
                tables |= {f"lm_eval,{task}": rows for task, rows in found.tables.items()}

    def _limits(self) -> Limits:
        return Limits(timeout_s=self.timeout_s, memory_mb=self.memory_mb)


def _continues(evaluation: EvaluationContext) -> bool:
    """Whether the student gets a text to continue, rather than a request."""
    return evaluation.student.template == "plain"


def _text_behind(response: Response, tokenizer: Any) -> str:
    """A response with its first white space, which some tokenizers drop from a text that begins with it."""
    before, ids = list(response.prompt_ids), list(response.response_ids)
    head, whole, alone = (
        str(tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for part in (before, before + ids, ids)
    )
    return whole[len(head) :] if whole.startswith(head) else alone


def _graded_maths(
    evaluation: EvaluationContext, problems: Sequence[Problem], answers: Mapping[str, Sequence[str]]
) -> Graded:
    right: dict[str, list[bool]] = {}
    failures: Counter[str] = Counter()
    extraction: Counter[str] = Counter()
    total = sum(len(answers[p.id]) for p in problems)
    with MathChecker() as checker, evaluation.meter(f"check {problems[0].task}", total, "answers") as meter:
        for problem in problems:
            for text in answers[problem.id]:
                found = extract(text)
                verdict = checker.check(problem.answer, found.answer)
                right.setdefault(problem.id, []).append(verdict == "equal")
                extraction[found.where] += 1
                if verdict != "equal":
                    kind = {"none": "no answer"}.get(found.where, "wrong")
                    failures[verdict if verdict == "timeout" else kind] += 1
                meter.advance(1)
    return Graded(right=right, failures=failures, extraction=extraction)


def _tables(task: str, graded: Graded, pass_at: Sequence[int]) -> dict[str, list[ScoredRow]]:
    """The accuracy of maths is the mean over the answers, which is pass@1; k above 1 is estimated for all tasks."""
    tables: dict[str, list[ScoredRow]] = {}
    if task not in CODE:
        tables[task] = [
            ScoredRow(id=id, weight=1.0, values={"accuracy": sum(marks) / len(marks)})
            for id, marks in graded.right.items()
        ]
    for k in pass_at:
        if task in CODE or k > 1:
            tables[f"{task},k={k}"] = [
                ScoredRow(id=id, weight=1.0, values={"pass_at_k": pass_at_k(len(marks), sum(marks), k)})
                for id, marks in graded.right.items()
            ]
    return tables
