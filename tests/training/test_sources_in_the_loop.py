"""Authors in the real loop: a run that continues is the run that was never interrupted, and nobody writes twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from limbeck.objectives import build_objective
from limbeck.objectives.sequence.distillm2 import Beta
from limbeck.objectives.sequence.rules import AlphaByGap
from limbeck.rollouts.mixed import MixedSource, SharePath
from limbeck.rollouts.pairs import PairedSource
from limbeck.rollouts.replay import ReplaySettings, ReplaySource
from limbeck.rollouts.rounds import Rounds
from limbeck.rollouts.sources import OfflineSource, ResponseSource, SourceContext, SourceFactory
from limbeck.rollouts.student import RolloutConfig, StudentSource
from limbeck.sampling.local import LocalSampler
from limbeck.training.loss import LossPlan
from limbeck.training.weighting import TokenWeighting
from limbeck.types import Interrupted, LimbeckError, Response, Sampling, TokenPrompt
from tests.training.naive import Both
from tests.training.play import (
    VOCAB,
    FailingTeacher,
    identical,
    metrics,
    play,
    settings,
    stop_after,
    tiny_model,
    tiny_responses,
    tiny_teacher,
    weights,
)

BASE = tiny_responses(14)
PROMPTS = [TokenPrompt(id=r.prompt_id, ids=r.prompt_ids) for r in BASE]
HELDOUT = tiny_responses(5, seed=8)
TIMED = ("seconds", "tokens_per_s", "writing_seconds")
# Fourteen prompts in steps of four: four steps an epoch, the eight steps of two epochs.
CHOSEN = settings(max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, warmup_steps=0, save_steps=3)


def sampler_of(model: Any, author: Any) -> LocalSampler:
    return LocalSampler(
        model=model, eos_token_ids=(2,), pad_token_id=0, vocab_size=VOCAB, author=author, batch_size=3, keep_logp=True
    )


def author_of(kind: str, student: nn.Module, folder: Path) -> SourceFactory:
    def begin(source_context: SourceContext) -> ResponseSource:
        sampling = Sampling(max_new_tokens=6, seed=4)
        rollout = RolloutConfig(
            sampler=sampler_of(student, "student"),
            sampling=sampling,
            rounds=Rounds(folder=folder / "rounds", world=source_context.world),
            refresh={"rounds": 3, "pairs": None, "mixed rounds": 2}.get(kind, 1),
            first_tokens=2,
        )
        if kind == "pairs":
            teacher = sampler_of(tiny_teacher().model, "teacher")
            return PairedSource(BASE, PROMPTS, rollout, source_context, teacher=teacher, teacher_sampling=sampling)
        own, base = StudentSource(PROMPTS, rollout, source_context), OfflineSource(BASE, source_context)
        if kind.startswith("mixed"):
            return MixedSource(own, base, share=SharePath(start=0.4, end=0.9), seed=source_context.seed)
        if kind == "replay":
            replay = ReplaySettings(share=0.8, capacity=8, tolerance=-10.0, bump=0.05)
            return ReplaySource(own, base, replay, step_rows=source_context.step_rows, seed=source_context.seed)
        return own

    return begin


def run(kind: str, folder: Path, **changes: Any) -> dict[str, Tensor]:
    student = tiny_model(1)
    loss_plan = LossPlan(
        objective=build_objective("skl"),
        student_objective=build_objective("srkl"),
        rule=AlphaByGap(alpha0=0.5, high=0.9),
        authored=True,
    )
    changes = {"author": author_of(kind, student, folder), "heldout": HELDOUT} | changes
    play(student, folder, CHOSEN, loss_plan=loss_plan, weighting=TokenWeighting(beta=Beta(shape="code")), **changes)
    return weights(student)


def timeless(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMED} for line in metrics(folder)]


def by_wish(kind: str, folder: Path) -> None:
    with pytest.raises(Interrupted):
        run(kind, folder, should_stop=stop_after(2))
    torch.rand(3)
    with pytest.raises(Interrupted):
        run(kind, folder, should_stop=stop_after(3))


def by_force(kind: str, folder: Path) -> None:
    with pytest.raises(ConnectionAbortedError):
        run(kind, folder, teacher=FailingTeacher(6))
    torch.rand(3)


@pytest.mark.parametrize("interrupted", [by_wish, by_force])
@pytest.mark.parametrize("kind", ["student", "rounds", "mixed", "mixed rounds", "replay", "pairs"])
def test_a_run_that_continues_is_the_run_that_was_never_interrupted(
    tmp_path: Path, kind: str, interrupted: Callable[[str, Path], None]
):
    for folder in ("straight", "broken"):
        (tmp_path / folder).mkdir()
    straight = run(kind, tmp_path / "straight")
    interrupted(kind, tmp_path / "broken")
    assert identical(straight, run(kind, tmp_path / "broken"))
    assert timeless(tmp_path / "straight") == timeless(tmp_path / "broken")
    assert [line["step"] for line in metrics(tmp_path / "straight")] == list(range(1, 9))


def test_a_round_begins_with_a_checkpoint_so_that_only_its_writing_is_repeated(tmp_path):
    """Killed while the second round, which begins with the fourth step, is written: the steps before it are kept."""
    student = tiny_model(1)
    whole = author_of("rounds", student, tmp_path)

    def killed(source_context: SourceContext) -> ResponseSource:
        own = whole(source_context)
        assert isinstance(own, StudentSource)
        told: list[int] = []

        def report(author: str, done: int, total: int) -> None:
            told.append(done)
            # A round of three steps is four batches of three prompts.
            if len(told) == 5:
                raise ConnectionAbortedError("killed")

        rounds = replace(own.rollout.rounds, report=report)
        return StudentSource(PROMPTS, replace(own.rollout, rounds=rounds), source_context)

    chosen = replace(CHOSEN, save_steps=1000)
    with pytest.raises(ConnectionAbortedError):
        play(student, tmp_path, chosen, author=killed, loss_plan=LossPlan(objective=build_objective("fkl")))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    written = [(tmp_path / "rounds" / name / "student").glob("0*.jsonl") for name in ("000", "001")]
    assert [len(list(files)) for files in written] == [4, 1]


def test_the_replay_is_told_the_held_out_loss_before_training_and_after_each_epoch(tmp_path):
    told: list[float] = []

    class Listening(ReplaySource):
        def validated(self, loss: float) -> None:
            told.append(loss)
            super().validated(loss)

    student = tiny_model(1)

    def author(source_context: SourceContext) -> ResponseSource:
        whole = author_of("replay", student, tmp_path)(source_context)
        assert isinstance(whole, ReplaySource)
        return Listening(
            whole.own, whole.base, whole.settings, step_rows=source_context.step_rows, seed=source_context.seed
        )

    run("replay", tmp_path, author=author)
    # Of the untrained student, by hand; then once more after the first epoch of four steps.
    rows = [Both(tiny_model(1), response) for response in HELDOUT]
    assert told[0] == pytest.approx(-torch.cat([row.log_q_T for row in rows]).mean().item(), rel=1e-5)
    assert len(told) == 2 and told[1] != told[0]
    # A tolerance that is always exceeded: the share grows after the epoch.
    assert [line["share"] for line in metrics(tmp_path)] == pytest.approx([0.8] * 4 + [0.85] * 4)


def test_a_replay_without_anything_held_out_is_refused(tmp_path):
    with pytest.raises(LimbeckError, match=r"asks for the held-out loss and got no held-out responses"):
        run("replay", tmp_path, heldout=[])


def test_what_the_student_writes_is_what_it_would_write_at_that_step(tmp_path):
    """The second step's responses are those of the weights after the first, word for word."""
    seen: list[list[Response]] = []

    def watched(student: nn.Module, folder: Path) -> SourceFactory:
        def begin(source_context: SourceContext) -> ResponseSource:
            response_source = author_of("student", student, folder)(source_context)
            original = response_source.step

            def step(clock: Any) -> dict[int, Response]:
                seen.append(list(original(clock).values()))
                return original(clock)

            response_source.step = step  # type: ignore[method-assign]
            return response_source

        return begin

    student = tiny_model(1)
    loss_plan = LossPlan(objective=build_objective("rkl"), authored=True)
    chosen = settings(max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, warmup_steps=0, save_steps=1)
    play(student, tmp_path, chosen, author=watched(student, tmp_path), loss_plan=loss_plan)
    stored = load_file(tmp_path / "checkpoints" / "step-000001" / "model.safetensors")
    after_one = tiny_model(1)
    after_one.load_state_dict({k.removeprefix("student."): v for k, v in stored.items()}, strict=False)
    for model, responses in ((tiny_model(1), seen[0]), (after_one, seen[1])):
        for response in responses:
            row = Both(model, response)
            assert response.logp == pytest.approx(row.log_q_T.tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", ["fkl", "hidden"])
def test_the_projection_of_hidden_states_does_not_make_the_replay_write_twice(tmp_path, kind):
    objective = build_objective("sum", parts=[{"name": "fkl"}, {"name": kind}])
    student = tiny_model(1)

    def always(source_context: SourceContext) -> ResponseSource:
        whole = author_of("replay", student, tmp_path)(source_context)
        assert isinstance(whole, ReplaySource)
        whole.settings, whole.phi = ReplaySettings(share=1.0), 1.0
        return whole

    # Seven responses; a second writing would fill the buffer of eight.
    chosen = settings(max_steps=1, per_device_train_batch_size=7)
    loss_plan = LossPlan(objective=objective, authored=True)
    play(student, tmp_path, chosen, author=always, loss_plan=loss_plan, heldout=HELDOUT)
    (line,) = metrics(tmp_path)
    assert line["buffer"] == 7
