"""A probe: the pieces of a recipe, timed on this machine for a few seconds.

Pieces are what stages repeat: a step of writing, a pass over texts, a micro-batch with its backward pass, an update, a
measurement of held-out responses. Loading is not among the seconds that it may take, nor the first words of a model.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.plan.budget import Budget, Now
from limbeck.pipeline.plan.case import Case
from limbeck.pipeline.plan.probe_models import ProbedModels, out_of_memory
from limbeck.pipeline.plan.probe_pieces import Written, first_words, pass_seconds, writing
from limbeck.pipeline.plan.probe_training import StepCost, TextShape, measuring_seconds, training_seconds
from limbeck.pipeline.plan.writing_cost import WritingCost, alive_by_ends, alive_of
from limbeck.pipeline.sampled_responses import sampler_for
from limbeck.pipeline.sampling import sampling_of
from limbeck.pipeline.stages import prompts as prompts_stage
from limbeck.pipeline.stages.respond import load_responses
from limbeck.prompts.io import read_prompts
from limbeck.prompts.templates import TemplateName, encode_prompts, resolve_template
from limbeck.sampling.local import LocalSampler
from limbeck.types import Author, LimbeckError, TokenPrompt

# A template and the prompts in it.
Asked = tuple[TemplateName, Sequence[TokenPrompt]]

# Seconds of a probe, where none are given.
PROBE_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a probe found. Costs are None of pieces that the recipe has not, or that could not be timed.

    Attributes:
        spent: seconds of timed work.
        loading: seconds that loading each model took, and `passes` before the first that counts.
        processor: seconds of processor time for each second of all this; 1 for one thread that has a core of its own.
        teacher_scores, student_scores, measures: seconds of each token of a text, in a pass and in a measurement of
            fidelity.
        alive: share of the answers that have a token of each place.
        alive_from: where that is known from.
        notes: what was not timed, or otherwise than it is in a run.
    """

    spent: float
    loading: dict[str, float]
    processor: float
    teacher_writes: WritingCost | None
    student_writes: WritingCost | None
    teacher_scores: float | None
    student_scores: float | None
    training: StepCost | None
    measures: float | None
    alive: tuple[float, ...]
    alive_from: str
    notes: tuple[str, ...]


def probe(context: RunContext, case: Case, seconds: float, clock: Now = time.perf_counter) -> ProbeResult:
    """Time the pieces of a recipe.

    Args:
        seconds: that all pieces may take together.

    Raises:
        LimbeckError: no time, or devices that are not those of this machine.
    """
    if not seconds > 0:
        raise LimbeckError(f"--probe-seconds is {seconds:g}; expected a number of seconds above 0, such as 20")
    if case.fleet.device.host != (context.device.type == "cpu"):
        raise LimbeckError(
            f"--probe times the models on this machine's {context.device.type} and --devices is {case.fleet.name}; "
            "name the devices that are here, or leave --probe out"
        )
    return _Prober(context=context, case=case, seconds=seconds, clock=_synchronous(context, clock)).found()


def _synchronous(context: RunContext, clock: Now) -> Now:
    """A clock that is read when the device has done all that it was given."""
    if context.device.type == "cpu":
        return clock
    import torch

    def read() -> float:
        torch.cuda.synchronize()
        return clock()

    return read


@dataclass(kw_only=True)
class _Prober:
    context: RunContext
    case: Case
    seconds: float
    clock: Now

    def __post_init__(self) -> None:
        here = self.case.where == "in_process"
        self.teacher_here = here
        # Writing twice, passes twice, a training step, a measurement.
        shares = [2.0, 1.0] if here else []
        self.budget = Budget(seconds=self.seconds, shares=[*shares, 2.0, 1.0, 3.0, 1.0], clock=self.clock)
        self.models = ProbedModels(context=self.context, budget=self.budget)
        self.notes: list[str] = []

    def found(self) -> ProbeResult:
        began, processor = time.perf_counter(), time.process_time()
        case, work = self.case, self.case.work
        texts = work.train if work.train.count else work.heldout
        self.row = max(round(texts.mean), 2)
        self.answer = min(max(round(texts.answer), 1), self.row - 1)
        prompts = encoded_prompts(self.context)
        writes: dict[str, Written] = {}
        scores: dict[str, float] = {}
        if self.teacher_here:
            model, tokenizer = self.models.teacher()
            self._first_words("teacher", model, tokenizer, prompts)
            self._piece("what the teacher writes", lambda: self._write(writes, "teacher", model, tokenizer, prompts))
            self._piece("passes of the teacher", lambda: self._pass(scores, "teacher", model))
        student, tokenizer = self.models.student()
        self._first_words("student", student, tokenizer, prompts)
        self._piece("what the student writes", lambda: self._write(writes, "student", student, tokenizer, prompts))
        self._piece("passes of the student", lambda: self._pass(scores, "student", student))
        shape = TextShape(row=self.row, answer=self.answer, per_token=scores.get("student", 0.0))
        timed = (self.context, case, student, tokenizer, self.budget, shape)
        steps: list[StepCost] = []
        measures: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            self._piece("the training", lambda: steps.append(training_seconds(*timed, folder=Path(folder))))
        self._piece("the evaluation", lambda: measures.append(measuring_seconds(*timed)))
        alive, alive_from = self._alive(writes.get("teacher"))
        took = time.perf_counter() - began
        return ProbeResult(
            spent=self.budget.spent,
            loading=self.models.seconds,
            processor=(time.process_time() - processor) / max(took, 1e-9),
            teacher_writes=writes["teacher"].cost if "teacher" in writes else None,
            student_writes=writes["student"].cost if "student" in writes else None,
            teacher_scores=scores.get("teacher"),
            student_scores=scores.get("student"),
            training=steps[0] if steps else None,
            measures=measures[0] if measures else None,
            alive=alive,
            alive_from=alive_from,
            notes=(*self.models.notes, *self.notes),
        )

    def _piece(self, name: str, timed: Callable[[], Any]) -> None:
        """Time a piece; one that cannot be timed is said in a line, and the others go on."""
        ended = len(self.notes)
        try:
            with self.budget.piece():
                timed()
                return
        except (LimbeckError, MemoryError, RuntimeError) as error:
            line = out_of_memory(error)
            if line is None and not isinstance(error, LimbeckError):
                raise
            self.notes.append(f"{name}: not timed: {line or error}")
        if len(self.notes) == ended:
            self.notes.append(f"{name}: not timed: {self.seconds:g} s are too few; give --probe-seconds more")

    def _write(self, found: dict[str, Written], who: Author, model: Any, tokenizer: Any, asked: Asked) -> None:
        sampler, sampling = self._sampler(who, model, tokenizer, asked), sampling_of(self.context.recipe.responses)
        captures, few = who == "teacher" and self.case.captures, max(sampler.batch_size // 4, 1)
        if who == "student" and self.case.steps.written:
            few = self.case.written_at_once
        found[who] = writing(sampler, asked[1], sampling, self.budget, few=few, captures=captures)

    def _sampler(self, who: Author, model: Any, tokenizer: Any, asked: Asked) -> LocalSampler:
        rows = self.context.recipe.responses.batch_size
        return sampler_for(self.context, model, tokenizer, asked[0], who, rows)

    def _first_words(self, who: Author, model: Any, tokenizer: Any, asked: Asked) -> None:
        with self.budget.load(self.models.seconds, "first words"):
            sampler = self._sampler(who, model, tokenizer, asked)
            first_words(sampler, asked[1], sampling_of(self.context.recipe.responses))

    def _pass(self, found: dict[str, float], who: str, model: Any) -> None:
        found[who] = pass_seconds(self.context, model, self.budget, row=self.row, answer=self.answer)

    def _alive(self, written: Written | None) -> tuple[tuple[float, ...], str]:
        """The share of answers that are still being written at each place."""
        most = self.context.recipe.responses.max_new_tokens
        if self.context.run.done("respond") or self.context.recipe.base_author == "data":
            return self._known_lengths(most)
        if written is None or not written.ended:
            return (1.0,) * most, f"each answer counts as {most} tokens: none ended in the probe"
        alive = alive_by_ends(written.ended, written.tokens, most)
        return alive, (
            f"answers count as {sum(alive):.0f} tokens of at most {most}: {written.ended} ended in {written.tokens:,} "
            "tokens of the probe"
        )

    def _known_lengths(self, most: int) -> tuple[tuple[float, ...], str]:
        if not self.context.run.done("respond"):
            mean = max(round(self.case.work.train.answer), 1)
            return (1.0,) * min(mean, most), f"answers count as {min(mean, most)} tokens, as the data's do"
        lengths = [r.tokens for split in ("train", "heldout") for r in load_responses(self.context, split).values()]
        alive = alive_of(lengths)
        return alive, f"answers count as {sum(alive):.0f} tokens, as those of the run directory"


def encoded_prompts(context: RunContext) -> Asked:
    """The prompts of a recipe as the teacher reads them, and their template."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = RunContext(replace(context.recipe, output_dir=folder), context.console)
        prompts_stage.STAGE.run(scratch)
        prompts = read_prompts(scratch.run.prompts)
    section, tokenizer = context.recipe.prompts, context.teacher.tokenizer
    template = resolve_template(section.template, tokenizer, prompts)
    encoded = encode_prompts(
        prompts, tokenizer, template, control_tokens=section.control_tokens, chat_options=section.chat_options
    )
    window = (context.window or 2**31) - context.recipe.responses.max_new_tokens
    most = min(window, section.max_prompt_length or window)
    fitting = sorted((prompt for prompt in encoded if len(prompt.ids) <= most), key=lambda prompt: len(prompt.ids))
    if not fitting:
        raise LimbeckError(f"no prompt has room for responses.max_new_tokens in {most} tokens; lower it")
    # The middle of the lengths first, then those beside it.
    middle = len(fitting) // 2
    order = sorted(range(len(fitting)), key=lambda place: abs(place - middle))
    return template, [fitting[place] for place in order]
