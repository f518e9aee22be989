"""Mistakes in who writes the responses: refused in one line before any model has worked, nothing written or lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.limbeck_command import CommandServer
from tests.pipeline.test_bad_input import refused
from tests.tiny_pair import TinyPair

PAIRS = ("responses.source=pairs",)
STUDENT = ("responses.source=student",)
MINILLM = (*STUDENT, "objective.name=policy_gradient", "contrast.rule={name: minillm}", "objective.temperature=1")
PUSHED = "contrast.student={name: srkl}"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # Who writes, and how much.
        (("responses.source=studnet",), ("responses.source", "'studnet'", "'student'")),
        (("responses.source=mixed", "responses.source.share=1.5"), ("responses.source.share", "1.5")),
        (("responses.source=mixed", "responses.source.share=-0.1"), ("responses.source.share", "-0.1")),
        (("responses.source=mixed", "responses.source.share_end=2"), ("responses.source.share_end", "2")),
        (
            ("responses.source=mixed", "responses.source.share_shape=exponential", "responses.source.share_end=1.0"),
            ("responses.source.share_shape is exponential", "share_end 1.0", "below 1", "0.995"),
        ),
        ((*STUDENT, "responses.source.teacher_share=1.0"), ("responses.source.teacher_share", "1.0")),
        ((*STUDENT, "responses.source.lambda=0.5"), ("'responses.source.lambda'",)),
        ((*STUDENT, "responses.source.refresh=0"), ("responses.source.refresh", "0")),
        ((*STUDENT, "responses.source.refresh=never"), ("responses.source.refresh", "'never'")),
        # Keys that this author does not read.
        ((*STUDENT, "responses.source.share=0.3"), ("source.share", "mixed or replay", "not student", "remove")),
        (("responses.source=mixed", "responses.source.capacity=9"), ("source.capacity", "replay", "not mixed")),
        (("responses.source.refresh=epoch",), ("source.refresh", "not teacher", "set responses.source.name=student")),
        ((*PAIRS, "responses.source.teacher_top_k=5"), ("source.teacher_top_k", "speculative", "not pairs")),
        ((*STUDENT, "responses.source.teacher_redraw=nucleus"), ("teacher_redraw", "speculative", "not student")),
        # What cannot be.
        (
            ("responses.source=replay", "responses.source.capacity=2000000000"),
            ("2000000000 responses", "GiB", "lower responses.source.capacity"),
        ),
        (("responses.source=replay", "responses.source.refresh=epoch"), ("source=replay", "source.refresh=step")),
        ((*PAIRS, "train.per_device_train_batch_size=3"), ("train.per_device_train_batch_size is 3", "even number")),
        ((*PAIRS, "responses.source.refresh=step"), ("refresh is step", "source.refresh=epoch")),
        (
            (*STUDENT, "responses.source.first_max_new_tokens=13"),
            ("first_max_new_tokens is 13", "responses.max_new_tokens (12)"),
        ),
        (
            (*STUDENT, "teacher.support=topk_tail"),
            ("teacher.support=topk_tail", "source=student", "teacher.support=full"),
        ),
        # What tells authors apart needs two.
        ((PUSHED,), ("contrast.student", "responses.source=teacher", "source=pairs")),
        (("contrast.beta=code",), ("contrast.beta", "responses.source=teacher")),
        ((*PAIRS, "contrast.scale=1.0"), ("contrast.beta=none", "contrast.beta=constant")),
        (
            (*STUDENT, "contrast.rule={name: dpkd}"),
            ("contrast.rule=dpkd", "source=student", "set responses.source=pairs"),
        ),
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
            ("teacher.support=topk_renorm", "teacher.support_k=4", "sft.objective={name: opd}"),
            ("sft.objective", "opd"),
        ),
        (("teacher.support=sampled", "sft.objective={name: rkl}"), ("rkl", "sampled")),
        # A policy gradient is one of the student as it samples.
        (
            (*STUDENT, "objective.name=opd", "responses.temperature=0.8"),
            ("opd", "temperature is 0.8", "responses.source.temperature=1"),
        ),
        ((*STUDENT, "objective.name=opd", "responses.source.top_p=0.9"), ("opd", "top_p is 0.9")),
        ((*STUDENT, "objective.name=opd", "responses.source.teacher_share=0.2"), ("opd", "teacher_share")),
        (("objective.name=opd",), ("opd", "responses.source=teacher", "set responses.source=student")),
        ((*PAIRS, "contrast.student={name: opd}", "responses.temperature=0.8"), ("opd", "temperature is 0.8")),
        (
            (*STUDENT, "objective.name=policy_gradient", "contrast.rule={name: minillm}", "responses.temperature=0.8"),
            ("contrast.rule=minillm", "temperature is 0.8"),
        ),
        ((*STUDENT, "objective.name=opd", "objective.temperature=2"), ("opd is", "set objective.temperature=1")),
        (
            (*STUDENT, "objective={name: sum, parts: [rkl, opd]}", "objective.temperature_adapt=0.5"),
            ("opd is", "remove objective.temperature_adapt"),
        ),
        # ... and of the current student, unless its tokens are weighed.
        (
            (*STUDENT, "objective.name=opd", "responses.source.refresh=epoch"),
            ("opd", "responses.source.refresh=epoch", "refresh=step", "contrast.rule={name: importance}"),
        ),
        ((*STUDENT, "objective.name=opd", "responses.source.refresh=2"), ("opd", "responses.source.refresh=2")),
        ((*PAIRS, "contrast.student={name: opd}"), ("contrast.student opd", "source=pairs", "{name: importance}")),
        (("contrast.rule={name: importance}",), ("contrast.rule=importance", "source=teacher", "source=student")),
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
