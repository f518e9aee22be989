"""A teacher sharded over two processes (gloo) says what a whole one says, in every stage that asks it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from limbeck.recipe.load import load_recipe
from limbeck.rollouts.collate import collate
from limbeck.teachers.base import TeacherModel
from limbeck.teachers.in_process import InProcess
from limbeck.teachers.sharded import Sharded
from limbeck.types import LimbeckError
from tests.distributed.conftest import ROOT
from tests.distributed.sharded_teacher import BATCHES
from tests.distributed.test_shared_stages import content
from tests.limbeck_command import CommandServer, all_end
from tests.pipeline.test_text import corpus
from tests.tiny_pair import TinyPair, questions, write_model, write_prompts
from tests.training.play import tiny_responses

SHARDED = "teacher.where=sharded"
HALF = "train.per_device_train_batch_size=2"
ROWS = [{"prompt": text, "completion": f"It is {text[8:20]}."} for text in questions(150)]
GROUPS = "evaluate.groups={fidelity: {whose: [responses, student]}, nll: {}}"
STEPS = ("train.max_steps=3", "evaluate.batch_size=4", "evaluate.prompts=20", GROUPS)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have asked a sharded teacher."""
    folder = tmp_path_factory.mktemp("asked")
    write_model(folder / "model", layers=6)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.distributed.sharded_teacher", str(folder)]
    ranks = []
    for rank in range(2):
        env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    try:
        ends = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(end[-3000:] for end in ends)
    return folder


def whole(folder: Path) -> Any:
    return InProcess().open(TeacherModel(model=str(folder / "model")), device=torch.device("cpu"), progress=None)


def test_each_rank_gets_the_bits_of_a_whole_teacher_for_as_many_batches_as_it_has(asked: Path) -> None:
    teacher = whole(asked)
    for rank, batches in enumerate(BATCHES):
        found = load_file(asked / f"rank{rank}.safetensors")
        assert torch.equal(found.pop("head"), teacher.head.weight_VD)
        assert len(found) == len(batches)
        for number, rows in enumerate(batches):
            expected = teacher.signal(collate(tiny_responses(), rows, pad_id=0)).hidden_ND
            assert torch.equal(found[str(number)], expected)


def test_each_rank_keeps_half_of_the_blocks(asked: Path) -> None:
    model = whole(asked).weights().model
    every, blocks = (4 * sum(p.numel() for p in part.parameters()) for part in (model, model.model.layers))
    for rank in range(2):
        said = json.loads((asked / f"rank{rank}.json").read_text())
        assert 0.45 * blocks <= said["blocks"] <= 0.55 * blocks
        # What lies outside of the blocks is whole: the loss reads the head.
        assert said["bytes"] - said["blocks"] == every - blocks


def test_a_rank_that_does_not_come_is_named(asked: Path) -> None:
    said = json.loads((asked / "rank0.json").read_text())["late"]
    assert said.startswith("rank 0 has waited for rank 1 before a pass of the sharded teacher") and "\n" not in said


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    tiny = TinyPair.write(folder)
    write_prompts(tiny.prompts, ROWS)
    student = {"model": str(write_model(folder / "student", layers=2, seed=1)), "init": "pretrained", "layers": None}
    return tiny.recipe(folder / "one", responses={"source": "data"}, student=student)


def test_two_ranks_write_signal_and_scores_of_a_whole_teacher(
    recipe: Path, limbeck: CommandServer, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    end = limbeck.run("run", recipe, *STEPS, f"output_dir={one}")
    assert end.code == 0, end.stderr[-3000:]
    all_end(limbeck.launch("run", recipe, *STEPS, SHARDED, HALF, f"output_dir={two}"))
    assert content(two, "signal") == content(one, "signal")
    before, after = (json.loads((run / "scores.json").read_text()) for run in (one, two))
    assert after["before"] == before["before"], "the student that was not trained yet"
    assert after["after"].keys() == before["after"].keys()


def test_a_teacher_beside_the_student_gives_the_losses_of_a_whole_one(
    recipe: Path, limbeck: CommandServer, tmp_path: Path
) -> None:
    """In one process too, which has all of it; the micro-batches of a rank are of other lengths than the other's."""
    losses = []
    uncached = ("train.logging_steps=1", "teacher.cache=false")
    for name, more in (("whole", ()), ("alone", (SHARDED,))):
        end = limbeck.run("train", recipe, *STEPS, *uncached, *more, f"output_dir={tmp_path / name}")
        assert end.code == 0, end.stderr[-3000:]
    launch = (
        "train",
        recipe,
        *STEPS,
        *uncached,
        SHARDED,
        HALF,
        "train.sharding=full",
        f"output_dir={tmp_path / 'two'}",
    )
    all_end(limbeck.launch(*launch))
    for name in ("whole", "alone", "two"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_plain_text_is_scored_by_a_sharded_teacher(recipe: Path, limbeck: CommandServer, tmp_path: Path) -> None:
    source = corpus(tmp_path, [f"Salt and moss {i}. " * 4 for i in range(60)])
    text = (f"prompts.source={source}", "responses.source=text", "responses.max_new_tokens=20")
    more = (*text, "train.max_steps=3", "train.logging_steps=1", "evaluate.groups=[fidelity]")
    one, two = tmp_path / "one", tmp_path / "two"
    end = limbeck.run("run", recipe, *more, f"output_dir={one}")
    assert end.code == 0, end.stderr[-3000:]
    all_end(limbeck.launch("run", recipe, *more, SHARDED, HALF, "train.sharding=full", f"output_dir={two}"))
    assert content(two, "signal") == content(one, "signal")
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"responses": {"source": "student"}}, "the student writes while it trains"),
        ({"teacher": {"where": "sharded", "cache_limit_gib": 1.0}}, r"teacher\.cache_limit_gib is set"),
        ({"teacher": {"where": "sharded", "model": "base"}}, r"teacher\.model=base is the student"),
    ],
)
def test_what_would_ask_it_from_one_rank_is_refused(
    tmp_path: Path, changes: dict[str, dict[str, Any]], said: str
) -> None:
    pair = TinyPair(teacher=tmp_path / "teacher", prompts=write_prompts(tmp_path / "prompts.jsonl"))
    sections: dict[str, dict[str, Any]] = {
        "teacher": {"where": "sharded"},
        "student": {"init": "pretrained", "model": "x", "layers": None},
    }
    tree = pair.tree(tmp_path / "run", **(sections | changes))
    with pytest.raises(LimbeckError, match=said):
        load_recipe(tree)


def test_it_gives_no_weights(tmp_path: Path) -> None:
    teacher = Sharded().open(TeacherModel(model=str(tmp_path)), device=torch.device("cpu"), progress=None)
    with pytest.raises(LimbeckError, match=r"provides hidden, expected weights"):
        teacher.weights()
