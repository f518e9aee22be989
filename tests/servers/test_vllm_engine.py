"""A real vLLM that writes the student's responses in three rounds, with the weights of each."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from limbeck.pipeline import student_engine
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.io import read_responses
from limbeck.runtime.rundir import RunDirectory
from limbeck.types import Response
from tests.servers.conftest import Figures, serving
from tests.tiny_pair import questions, write_prompts

ROUNDS, STEPS = 3, 2


def trained(smollm2: Path, student: Path, folder: Path, name: str, *, rounds: int, engine: str) -> RunDirectory:
    """Some rounds of two steps on some greedy answers of 16 tokens, by the student or by an engine."""
    rows = [{"prompt": text, "completion": f"An answer to: {text}"} for text in questions(10)]
    source = write_prompts(folder / "prompts.jsonl", rows)
    overrides = [
        *("sft=null", "objective={name: fkl, temperature: 1.0}", "evaluate.groups=[nll]", "teacher.cache=false"),
        *("student={init: pretrained, layers: null, freeze_embeddings: true}", f"student.model={student}"),
        *(
            f"teacher.model={smollm2}",
            f"prompts={{source: {source}, eval_fraction: 0.2}}",
            f"output_dir={folder / name}",
        ),
        f"responses.source={{name: student, refresh: {STEPS}, temperature: 0.0}}",
        *("responses.initial_author=data", "responses.max_new_tokens=16", "responses.batch_size=4"),
        f"responses.engine={engine}",
        *(
            "train.learning_rate=1e-3",
            "train.warmup_steps=0",
            "train.per_device_train_batch_size=4",
            "train.gradient_accumulation_steps=1",
        ),
        *(
            f"train.max_steps={rounds * STEPS}",
            "train.num_train_epochs=9",
            "train.eval_steps=null",
            "train.compile=off",
        ),
    ]
    return run_pipeline(load_recipe("gkd", overrides), stages=STAGES, until="train")


def written(run: RunDirectory) -> list[dict[str, Response]]:
    """The student's responses by their prompts, round by round."""
    folders = sorted(path for path in run.rounds.iterdir() if path.is_dir())
    return [{r.prompt_id: r for path in one.glob("student/*.jsonl") for r in read_responses(path)} for one in folders]


def gaps(run: RunDirectory) -> list[float]:
    rows = [json.loads(line) for line in run.metrics.read_text("utf-8").splitlines()]
    return [row["engine/gap"] for row in rows if "engine/gap" in row]


@pytest.mark.parametrize(("dtype", "rounds"), [("float32", ROUNDS), ("bfloat16", 1)])
def test_it_writes_the_student_s_responses(
    vllm_python: str,
    smollm2_dir: Path,
    student: Path,
    tmp_path: Path,
    figures: Figures,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    rounds: int,
) -> None:
    given: list[float] = []
    give = student_engine.StudentEngine.take

    def timed(self: Any, *args: Any) -> None:
        began = time.perf_counter()
        give(self, *args)
        given.append(time.perf_counter() - began)

    monkeypatch.setattr(student_engine.StudentEngine, "take", timed)
    with serving(vllm_python, student, tmp_path, "student", dtype=dtype) as server:
        engine = json.dumps({"name": "vllm", "base_url": server.url, "timeout_s": 1800.0, "retries": 1})
        there = trained(smollm2_dir, student, tmp_path, "there", rounds=rounds, engine=engine)
    here = trained(smollm2_dir, student, tmp_path, "here", rounds=rounds, engine="in_process")
    same = [
        sum(answer.response_ids == ours[name].response_ids for name, answer in theirs.items())
        for theirs, ours in zip(written(there), written(here), strict=True)
    ]
    total = sum(map(len, written(there)))
    figures.note(
        f"engine, {dtype}: greedy answers of 16 tokens in {rounds} rounds that are the local student's of that round",
        f"{sum(same)} of {total} ({', '.join(map(str, same))})",
    )
    figures.note(
        f"engine, {dtype}: `engine/gap` of each round, nats",
        ", ".join(f"{gap:.1e}" for gap in dict.fromkeys(gaps(there))),
    )
    figures.note(
        f"engine, {dtype}: saving, loading and checking the weights, each round",
        ", ".join(f"{seconds:.1f} s" for seconds in given),
    )
    assert len(given) == rounds and len(gaps(there)) == rounds * STEPS
    assert max(gaps(there)) < student_engine.GAP_LIMITS[dtype]
    if dtype == "float32":
        assert sum(same) == total >= 7 * rounds
        first, *_, last = written(here)
        assert any(first[name].response_ids != last[name].response_ids for name in first), "the student has not changed"
