"""Students that write in a training of one process or of two: the same scenarios for both, and what was written.

In float64, for the reason in updates.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.models.whole import reader_copy
from limbeck.objectives import build_objective
from limbeck.objectives.sequence.rules import build_rule
from limbeck.rollouts.pairs import PairedSource
from limbeck.rollouts.replay import ReplaySettings, ReplaySource
from limbeck.rollouts.rounds import Rounds
from limbeck.rollouts.sources import OfflineSource, ResponseSource, SourceContext, SourceFactory, StepCounter
from limbeck.rollouts.student import RolloutConfig, StudentSource
from limbeck.sampling.local import LocalSampler
from limbeck.training.loss import LossPlan
from limbeck.types import Response, Sampling, TokenPrompt
from tests.distributed.updates import EXACT
from tests.training.play import VOCAB, play, settings, tiny_model, tiny_responses, tiny_teacher

# Eleven prompts: the last step of an epoch is short, and has nothing, or less, for the second rank.
BASE = tiny_responses(11)
PROMPTS = [TokenPrompt(id=r.prompt_id, ids=r.prompt_ids) for r in BASE]
SAMPLING = Sampling(max_new_tokens=9, seed=4)

Written = list[list[tuple[str, str, tuple[int, ...]]]]


def recorded(response_source: Any, written: Written) -> Any:
    """The supply, which now remembers what it gave: prompt, author and ids of every response of every step."""
    step = response_source.step

    def note(clock: StepCounter) -> dict[int, Response]:
        responses = step(clock)
        written.append([(r.prompt_id, r.author, r.response_ids) for r in responses.values()])
        return responses

    response_source.step = note
    return response_source


def writer(model: nn.Module, author: Any) -> LocalSampler:
    return LocalSampler(model=model, eos_token_ids=(2,), pad_token_id=0, vocab_size=VOCAB, author=author, batch_size=3)


def rollout(student: nn.Module, source_context: SourceContext, folder: Path, refresh: int | None) -> RolloutConfig:
    rounds = Rounds(folder=folder / "rounds", world=source_context.world)
    return RolloutConfig(
        sampler=writer(reader_copy(student), "student"), sampling=SAMPLING, rounds=rounds, refresh=refresh
    )


def own(student: nn.Module, folder: Path, refresh: int | None = 1) -> SourceFactory:
    return lambda source_context: StudentSource(
        PROMPTS, rollout(student, source_context, folder, refresh), source_context
    )


def pairs(student: nn.Module, folder: Path) -> SourceFactory:
    teacher = writer(tiny_teacher(dtype=EXACT).model, "teacher")

    def begin(source_context: SourceContext) -> ResponseSource:
        mine = rollout(student, source_context, folder, None)
        return PairedSource(BASE, PROMPTS, mine, source_context, teacher=teacher, teacher_sampling=SAMPLING)

    return begin


def replay(student: nn.Module, folder: Path) -> SourceFactory:
    chosen = ReplaySettings(share=0.7, capacity=9, tolerance=0.0, bump=0.2)

    def begin(source_context: SourceContext) -> ResponseSource:
        mine = StudentSource(PROMPTS, rollout(student, source_context, folder, 1), source_context)
        return ReplaySource(
            mine,
            OfflineSource(BASE, source_context),
            chosen,
            step_rows=source_context.step_rows,
            seed=source_context.seed,
        )

    return begin


CONTRAST = LossPlan(
    objective=build_objective("skl"),
    student_objective=build_objective("srkl"),
    rule=build_rule("adaptive_alpha"),
    authored=True,
)
PLAIN = LossPlan(objective=build_objective("rkl"), authored=True)
SCENARIOS: dict[str, tuple[Callable[[nn.Module, Path], SourceFactory], LossPlan, dict[str, Any]]] = {
    "own": (own, PLAIN, {}),
    "rounds": (lambda student, folder: own(student, folder, 3), PLAIN, {}),
    "pairs": (pairs, CONTRAST, {}),
    # The held-out loss grows, and with it the share.
    "replay": (replay, PLAIN, {"learning_rate": 0.02, "lr_scheduler_type": "constant", "max_steps": 7}),
}


def play_author(name: str, folder: Path, **cut: Any) -> tuple[nn.Module, Written]:
    """Play a scenario: first a stage on what is there, then with the student writing."""
    author_of, loss_plan, changes = SCENARIOS[name]
    student = tiny_model(1, dtype=EXACT)
    teacher = tiny_teacher(dtype=EXACT)
    written: Written = []
    # What the student would say now: the more it learns, the less it finds it likely.
    heldout = writer(student, "student").respond(PROMPTS[:5], SAMPLING)
    first = folder / "first"
    first.mkdir(exist_ok=True)
    play(student, first, settings(max_steps=2, **cut), responses=BASE, teacher=teacher)
    author = author_of(student, folder)
    play(
        student,
        folder,
        settings(**changes, **cut),
        author=lambda source_context: recorded(author(source_context), written),
        teacher=teacher,
        loss_plan=loss_plan,
        heldout=heldout,
    )
    return student, written
