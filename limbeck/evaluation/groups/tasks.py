"""The group `tasks`: problems whose answers a machine checks (GSM8K, MATH, HumanEval, MBPP), and lm-evaluation-harness.

Conditions are the tasks: `accuracy@gsm8k`, `pass_at_k@humaneval,k=1`. Programs run in the sandbox or not at all.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from limbeck.evaluation.context import BOTH, AskedAnswers, EvaluationContext, Who, text_behind
from limbeck.evaluation.group import EvaluationGroup, GroupResult, Need
from limbeck.evaluation.sandbox.host import NO_FILES, Limits, files_possible, require_sandbox
from limbeck.evaluation.tasks.grades import Graded, tables_of
from limbeck.evaluation.tasks.lm_eval import HarnessResult, require_lm_eval, run_lm_eval
from limbeck.evaluation.tasks.marking import mark_answers
from limbeck.evaluation.tasks.problems import CODE, STOPS, Problem, TaskName, read_problems
from limbeck.fields import STRICT, Count, NonNegative, Positive, Seed, Strings
from limbeck.prompts.readers import source_digest
from limbeck.types import Json, LimbeckError, Prompt, Sampling, ScoredRow


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
    heldout: bool = False
    """The held-out prompts too, where they are problems (prompts.task): the condition `heldout`."""
    teacher: bool = False
    """Mark the teacher's answers too; they are written once."""
    by_category: bool = False
    """One more condition for each category of the problems, such as `heldout,5 steps`."""
    lm_eval: Strings = ()
    """Tasks of lm-evaluation-harness, where it is installed."""

    teacher_remedy = "set evaluate.groups.tasks.teacher=false"

    def needs(self) -> frozenset[Need]:
        return frozenset({"teacher", "teacher_answers"} if self.teacher else ())

    def check(self, evaluation: EvaluationContext) -> None:
        if not self.files and not self.lm_eval and not self.heldout:
            raise LimbeckError(
                "evaluate asks for the group tasks, but names no task; give evaluate.groups.tasks.files, such as "
                "{gsm8k: test.jsonl}, or evaluate.groups.tasks.lm_eval"
            )
        if self.heldout and evaluation.task is None:
            raise LimbeckError(
                "evaluate.groups.tasks.heldout asks for problems, but the prompts are none; set prompts.task to the "
                "task they are of, such as gsm8k, or give evaluate.groups.tasks.files"
            )
        most = max(self.pass_at, default=1)
        if most > self.samples:
            raise LimbeckError(
                f"evaluate.groups.tasks.pass_at asks for pass@{most} of {self.samples} answers per problem; raise "
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
        if any(task in CODE for task in self._tasks(evaluation)):
            with tempfile.TemporaryDirectory() as scratch:
                self._require_sandbox(Path(scratch))
        if self.lm_eval:
            require_lm_eval()

    def inputs(self, evaluation: EvaluationContext) -> Json:
        content: Json = {task: source_digest(path) for task, path in self.files.items()}
        return {"content": content} | ({"heldout": evaluation.task} if self.heldout else {})

    def asks(self, evaluation: EvaluationContext) -> Iterator[AskedAnswers]:
        for _, problems in self._problems(evaluation):
            for who in self._writers:
                yield from self._asked(evaluation, who, problems)

    def measure(self, evaluation: EvaluationContext) -> GroupResult:
        tables: dict[str, Sequence[ScoredRow]] = {}
        detail: Json = {}
        scratch = evaluation.root / ".sandbox.partial"
        if any(task in CODE for task in self._tasks(evaluation)):
            detail["sandbox"] = self._require_sandbox(scratch)
            if not files_possible():
                evaluation.console.warn(
                    f"tasks: programs have {NO_FILES}; an answer that writes a file counts as wrong"
                )
        for name, problems in self._problems(evaluation):
            graded = self._graded_of_all(evaluation, name, problems)
            tables |= tables_of(name, problems[0].task, graded, self.pass_at)
            for category, some in self._by_category(problems, graded).items():
                tables |= tables_of(f"{name},{category}", problems[0].task, some, self.pass_at)
            detail[name] = {"problems": len(problems)} | graded["student"].record(len(problems))
            if self.teacher:
                detail[name]["teacher"] = graded["teacher"].record(len(problems))
        if self.lm_eval:
            self._measure_lm_eval(evaluation, tables, detail)
        if scratch.exists():
            scratch.rmdir()
        return GroupResult(tables=tables, detail=detail)

    @property
    def _writers(self) -> tuple[Who, ...]:
        return BOTH if self.teacher else ("student",)

    def _tasks(self, evaluation: EvaluationContext) -> list[TaskName]:
        return [*self.files, *([evaluation.task] if self.heldout and evaluation.task else [])]

    def _problems(self, evaluation: EvaluationContext) -> Iterator[tuple[str, Sequence[Problem]]]:
        """Names of what is measured, with the problems."""
        for task, path in self.files.items():
            yield task, read_problems(task, Path(path), self.limit)
        if self.heldout:
            yield "heldout", evaluation.problems()[: self.limit]

    def _by_category(self, problems: Sequence[Problem], graded: Mapping[Who, Graded]) -> dict[str, dict[Who, Graded]]:
        """The marks of the problems of each category."""
        if not self.by_category:
            return {}
        ids: dict[str, set[str]] = {}
        for problem in problems:
            if problem.category and problem.id in graded["student"].right:
                ids.setdefault(problem.category, set()).add(problem.id)
        return {
            category: {who: one.of(ids[category]) for who, one in graded.items()} for category in sorted(ids, key=_size)
        }

    def _graded_of_all(
        self, evaluation: EvaluationContext, name: str, problems: Sequence[Problem]
    ) -> dict[Who, Graded]:
        """Marks of each writer, on the problems that fit the windows of all."""
        answers = {who: self._answers(evaluation, who, problems) for who in self._writers}
        answered = [problem for problem in problems if all(problem.id in found for found in answers.values())]
        if not answered:
            raise LimbeckError(
                f"none of the {len(problems)} problems of {name} fits the student's window beside "
                f"{self.max_new_tokens} new tokens; lower evaluate.groups.tasks.max_new_tokens or leave {name} out"
            )
        return {who: self._graded(evaluation, who, answered, answers[who]) for who in self._writers}

    def _answers(self, evaluation: EvaluationContext, who: Who, problems: Sequence[Problem]) -> dict[str, list[str]]:
        """The texts of the student or the teacher, by problem."""
        texts: dict[str, list[str]] = {}
        for asked in self._asked(evaluation, who, problems):
            for response in evaluation.answers(who, asked.sampling, asked.prompts):
                texts.setdefault(response.prompt_id, []).append(text_behind(response, evaluation.tokenizer(who)))
        return texts

    def _asked(self, evaluation: EvaluationContext, who: Who, problems: Sequence[Problem]) -> Iterator[AskedAnswers]:
        """The answers of the student or the teacher; every sample has a seed of its own."""
        continues = _continues(evaluation, who)
        prompts = [Prompt(id=p.id, text=p.plain if continues else p.request, split="heldout") for p in problems]
        for number in range(self.samples):
            sampling = Sampling(
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                stop=STOPS[problems[0].task] if continues else (),
                seed=self.seed + number,
            )
            yield AskedAnswers(who=who, sampling=sampling, prompts=prompts)

    def _graded(
        self, evaluation: EvaluationContext, who: Who, problems: Sequence[Problem], answers: Mapping[str, Sequence[str]]
    ) -> Graded:
        pairs = [(problem, text) for problem in problems for text in answers[problem.id]]
        root, code = evaluation.root, problems[0].task in CODE
        label = f"run {problems[0].task}" if code else f"check {problems[0].task}"
        with evaluation.meter(label, len(pairs), "programs" if code else "answers") as meter:
            marks = mark_answers(
                pairs,
                self._limits(),
                # The log lies beside the scores, which are set aside when another group is added.
                log=root / "program_verdicts.jsonl",
                scratch=root / ".sandbox.partial",
                continues=_continues(evaluation, who),
                advance=meter.advance,
            )
        right: dict[str, list[bool]] = {}
        for (problem, _), mark in zip(pairs, marks, strict=True):
            right.setdefault(problem.id, []).append(mark.right)
        return Graded(
            right=right,
            failures=Counter(mark.failure for mark in marks if mark.failure is not None),
            extraction=Counter(mark.extraction for mark in marks),
        )

    def _measure_lm_eval(
        self, evaluation: EvaluationContext, tables: dict[str, Sequence[ScoredRow]], detail: Json
    ) -> None:
        """The student's rows and figures; the teacher's figures beside those of the student after training."""
        who = list[Who](("student",))
        if evaluation.part == "after" and evaluation.has_teacher:
            who.append("teacher")
        for one in who:
            found = self._by_lm_eval(evaluation, one)
            detail.setdefault("lm_eval", {"version": found.version})[one] = found.results
            if one == "student":
                tables |= {f"lm_eval,{task}": rows for task, rows in found.tables.items()}

    def _by_lm_eval(self, evaluation: EvaluationContext, who: Who) -> HarnessResult:
        speaker = evaluation.alone(who)
        return run_lm_eval(
            self.lm_eval,
            speaker.model,
            speaker.tokenizer,
            chat=speaker.template == "chat",
            batch_size=evaluation.settings.batch_size,
            limit=self.limit,
            seed=self.seed,
        )

    def _limits(self) -> Limits:
        return Limits(timeout_s=self.timeout_s, memory_mb=self.memory_mb)

    def _require_sandbox(self, scratch: Path) -> Json:
        without = "take humaneval and mbpp out of evaluate.groups.tasks.files"
        return require_sandbox(scratch, self._limits(), section="evaluate.groups.tasks", otherwise=without)


def _size(category: str) -> tuple[int, str]:
    """Order of categories: by the number they begin with, where they begin with one."""
    first = category.partition(" ")[0]
    return (int(first) if first.isdigit() else 0, category)


def _continues(evaluation: EvaluationContext, who: Who) -> bool:
    """Whether a model gets a text to continue, rather than a request."""
    return evaluation.template(who) == "plain"
