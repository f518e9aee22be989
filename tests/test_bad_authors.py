"""Mistakes in who writes the responses: refused in one line before any model has worked, nothing written or lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.limbeck_command import CommandServer
from tests.test_bad_input import refused
from tests.tiny_pair import TinyPair

PAIRS = ("responses.author=pairs",)
STUDENT = ("responses.author=student",)
MINILLM = (*STUDENT, "objective.name=policy_gradient", "contrast.rule={name: minillm}", "objective.temperature=1")
PUSHED = "contrast.student={name: srkl}"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # Who writes, and how much.
        (("responses.author=studnet",), ("responses.author", "'studnet'", "student")),
        (("responses.author=mixed", "responses.on_policy.share=1.5"), ("responses.on_policy.share", "1.5")),
        (("responses.author=mixed", "responses.on_policy.share=-0.1"), ("responses.on_policy.share", "-0.1")),
        (("responses.author=mixed", "responses.on_policy.share_end=2"), ("responses.on_policy.share_end", "2")),
        ((*STUDENT, "responses.on_policy.teacher_share=1.0"), ("responses.on_policy.teacher_share", "1.0")),
        ((*STUDENT, "responses.on_policy.lambda=0.5"), ("'responses.on_policy.lambda'",)),
        ((*STUDENT, "responses.on_policy.refresh=0"), ("responses.on_policy.refresh", "0")),
        ((*STUDENT, "responses.on_policy.refresh=never"), ("responses.on_policy.refresh", "'never'")),
        # Keys that this author does not read.
        ((*STUDENT, "responses.on_policy.share=0.3"), ("on_policy.share", "mixed or replay", "not student", "remove")),
        (("responses.author=mixed", "responses.on_policy.buffer=9"), ("on_policy.buffer", "replay", "not mixed")),
        (("responses.on_policy.refresh=epoch",), ("on_policy.refresh", "not teacher", "change the author")),
        ((*PAIRS, "responses.on_policy.teacher_top_k=5"), ("on_policy.teacher_top_k", "speculative", "not pairs")),
        ((*STUDENT, "responses.on_policy.teacher_redraw=nucleus"), ("teacher_redraw", "speculative", "not student")),
        # What cannot be.
        (
            ("responses.author=replay", "responses.on_policy.buffer=2000000000"),
            ("2000000000 responses", "GiB", "lower responses.on_policy.buffer"),
        ),
        (("responses.author=replay", "responses.on_policy.refresh=epoch"), ("author=replay", "on_policy.refresh=step")),
        ((*PAIRS, "train.per_device_train_batch_size=3"), ("train.per_device_train_batch_size is 3", "even number")),
        ((*PAIRS, "responses.on_policy.refresh=step"), ("refresh is step", "on_policy.refresh=epoch")),
        (
            (*STUDENT, "responses.on_policy.first_max_new_tokens=13"),
            ("first_max_new_tokens is 13", "responses.max_new_tokens (12)"),
        ),
        ((*STUDENT, "signal.support=topk_tail"), ("signal.support=topk_tail", "author=student", "signal.support=full")),
        # What tells authors apart needs two.
        ((PUSHED,), ("contrast.student", "responses.author=teacher", "author=pairs")),
        (("contrast.beta=code",), ("contrast.beta", "responses.author=teacher")),
        ((*PAIRS, "contrast.scale=1.0"), ("contrast.beta=none", "contrast.beta=constant")),
        ((*STUDENT, "contrast.rule={name: dpkd}"), ("contrast.rule=dpkd", "author=student", "set pairs")),
        # Names and options inside.
        ((*PAIRS, "contrast.rule={name: adaptive_alpa}"), ("'adaptive_alpa'", "'adaptive_alpha'")),
        (
            (*PAIRS, "objective.name=skl", "contrast.rule={name: adaptive_alpha, alpha_0: 0.1}"),
            ("'adaptive_alpha'", "'alpha_0'", "'alpha0'"),
        ),
        ((*PAIRS, "contrast.rule={alpha0: 0.1}"), ("contrast.rule", "expected a name")),
        ((*PAIRS, "contrast.student={name: srlk}"), ("'srlk'", "'srkl'")),
        ((*PAIRS, "contrast.student={name: srkl, alfa: 0.1}"), ("'srkl'", "'alfa'", "'alpha'")),
        ((*PAIRS, "contrast.student={alpha: 0.1}"), ("contrast.student", "expected a name")),
        (("sft.objective={name: cee}",), ("'cee'", "'ce'")),
        (("sft.objective={name: skl, alpha: 7}",), ("skl alpha=7",)),
        (("sft.num_train_epochs=0",), ("sft.num_train_epochs", "0")),
        # What an objective cannot be combined with, it says for every place it stands in.
        (("sft.objective={name: opd}",), ("sft.objective", "opd", "the student's own")),
        ((*PAIRS, "contrast.rule={name: adaptive_alpha}"), ("adaptive_alpha", "alpha", "'fkl'")),
        ((*PAIRS, PUSHED, "contrast.rule={name: dpkd}"), ("dpkd", "train.reduction=sequence")),
        ((*PAIRS, PUSHED, "train.reduction=sequence", "contrast.rule={name: dpkd}"), ("dpkd", "advantage")),
        (
            ("signal.support=topk_renorm", "signal.k=4", "sft.objective={name: opd}"),
            ("sft.objective", "opd"),
        ),
        (("signal.support=sampled", "sft.objective={name: rkl}"), ("rkl", "sampled")),
        # A policy gradient is one of the student as it samples.
        (
            (*STUDENT, "objective.name=opd", "responses.temperature=0.8"),
            ("opd", "temperature is 0.8", "responses.on_policy.temperature=1"),
        ),
        ((*STUDENT, "objective.name=opd", "responses.on_policy.top_p=0.9"), ("opd", "top_p is 0.9")),
        ((*STUDENT, "objective.name=opd", "responses.on_policy.teacher_share=0.2"), ("opd", "teacher_share")),
        (("objective.name=opd",), ("opd", "responses.author=teacher", "set responses.author=student")),
        ((*PAIRS, "contrast.student={name: opd}", "responses.temperature=0.8"), ("opd", "temperature is 0.8")),
        (
            (*STUDENT, "objective.name=policy_gradient", "contrast.rule={name: minillm}", "responses.temperature=0.8"),
            ("contrast.rule=minillm", "temperature is 0.8"),
        ),
        # ... and of the student of now, unless its tokens are weighed.
        (
            (*STUDENT, "objective.name=opd", "responses.on_policy.refresh=epoch"),
            ("opd", "responses.on_policy.refresh=epoch", "refresh=step", "contrast.rule={name: importance}"),
        ),
        ((*STUDENT, "objective.name=opd", "responses.on_policy.refresh=2"), ("opd", "responses.on_policy.refresh=2")),
        ((*PAIRS, "contrast.student={name: opd}"), ("contrast.student opd", "author=pairs", "{name: importance}")),
        (("contrast.rule={name: importance}",), ("contrast.rule=importance", "author=teacher", "author=student")),
        (
            (*STUDENT, "contrast.rule={name: importance}", "responses.temperature=0.8"),
            ("contrast.rule=importance", "temperature is 0.8"),
        ),
        ((*STUDENT, "contrast.rule={name: importance, importance: prefx}"), ("importance='prefx'", "step, prefix")),
        # MiniLLM's two parts are one gradient at temperature 1 alone.
        (
            (*MINILLM, "objective.temperature=2"),
            ("contrast.rule=minillm", "temperature is 2", "objective.temperature=1"),
        ),
        ((*MINILLM, "objective.teacher_temperature=2"), ("minillm", "remove objective.teacher_temperature")),
        ((*MINILLM, "objective.student_temperature=2"), ("minillm", "remove objective.student_temperature")),
        ((*MINILLM, "objective.temperature_end=2"), ("minillm", "remove objective.temperature_end")),
        ((*MINILLM, "objective.temperature_adapt=0.5"), ("minillm", "remove objective.temperature_adapt")),
        ((*MINILLM, "contrast.rule={name: minillm, clip_ratio: 2.0}"), ("clip_ratio=2.0", "such as 0.2")),
    ],
)
def test_refused(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, overrides: tuple[str, ...], words: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    finished = limbeck.run("run", tiny.recipe(run), *overrides)
    refused(finished, *words)
    assert len(finished.stderr.splitlines()) == 1
    assert not run.exists()
