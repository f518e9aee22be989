"""Stages that two ranks share by files: the files of one process, whoever wrote what, and after a kill too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.limbeck_command import CommandServer, KillAt, all_end
from tests.recovery.conftest import Sampled
from tests.tiny_pair import TinyPair, questions, write_prompts

# Enough for several batches and several chunks of the signal on each rank.
ROWS = [{"prompt": text, "completion": f"It is {text[8:20]}."} for text in questions(150)]
GROUPS = "evaluate.groups={rouge: {}, fidelity: {whose: [responses, student]}, nll: {}, likelihood: {}}"
STEPS = ("train.max_steps=2", "responses.batch_size=8", "evaluate.batch_size=4", "evaluate.prompts=20", GROUPS)


def content(root: Path, *folders: str) -> dict[str, bytes]:
    """All files below some folders of a run."""
    paths = [path for folder in folders for path in sorted((root / folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module", params=["teacher", "data"])
def pair(request, tmp_path_factory, limbeck: CommandServer) -> tuple[Path, Path]:
    """A recipe, and the run directory of one process: the teacher's answers, or its signal on the data's."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny = TinyPair.write(folder)
    write_prompts(tiny.prompts, ROWS)
    more = {"support": "topk_tail", "support_k": 5} if request.param == "data" else {}
    recipe = tiny.recipe(
        folder / "one", responses={"source": request.param}, teacher={"model": str(tiny.teacher), **more}
    )
    end = limbeck.run("run", recipe, *STEPS)
    assert end.code == 0, end.stderr[-3000:]
    return recipe, folder / "one"


def test_two_ranks_write_the_responses_and_the_signal_of_one(pair, limbeck: CommandServer, tmp_path: Path) -> None:
    recipe, one = pair
    two = tmp_path / "two"
    ranks = limbeck.launch("teach", recipe, *STEPS, f"output_dir={two}")
    all_end(ranks)
    assert content(two, "responses", "signal") == content(one, "responses", "signal")
    assert not list(two.rglob("*.partial")) and not list((two / ".ranks").glob("work/*"))


def test_two_ranks_write_the_scores_of_one(pair, limbeck: CommandServer, tmp_path: Path) -> None:
    recipe, one = pair
    two = tmp_path / "two"
    shutil.copytree(one, two)
    for name in ("scores", "scores.json", "samples.jsonl", "stages/evaluate.json", "stages/report.json"):
        path = two / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    half = "train.per_device_train_batch_size=2"
    ranks = limbeck.launch("run", recipe, *STEPS, f"output_dir={two}", half)
    all_end(ranks)
    assert content(two, "scores") == content(one, "scores")
    assert (two / "scores.json").read_bytes() == (one / "scores.json").read_bytes()


def test_what_two_ranks_have_finished_before_a_kill_is_not_done_again(
    pair, limbeck: CommandServer, tmp_path: Path
) -> None:
    """The second rank dies as it ends its third batch, or its first chunk; then the first one dies."""
    recipe, one = pair
    two = tmp_path / "two"
    writes = (one / "responses" / "teacher.jsonl").exists()
    name, count = ("responses/batches/0*.jsonl", 2) if writes else ("signal/shares/0*.json", 0)
    launch = ("teach", recipe, *STEPS, f"output_dir={two}")
    first, second = limbeck.launch(*launch, killed={1: KillAt(two, name, count)})
    assert second.wait().code == -9
    first.kill()
    sampled = Sampled(two)
    sampled.look()
    parts = {path.stat().st_ino for path in two.glob("signal/0*.safetensors")}
    assert len(sampled.seen) >= count
    all_end(limbeck.launch(*launch))
    sampled.look()
    assert content(two, "responses", "signal") == content(one, "responses", "signal")
    # Those that were whole are the same files.
    assert parts <= {path.stat().st_ino for path in two.glob("signal/0*.safetensors")}


def test_two_ranks_share_the_windows_of_a_signal(pair, limbeck: CommandServer, tmp_path: Path) -> None:
    """Each scores its share of the files of a window, and both read all: the losses of one process."""
    recipe, straight = pair
    # Hidden states take more than the likeliest tokens.
    gib = "2e-5" if (straight / "responses" / "teacher.jsonl").exists() else "6e-6"
    limit = (*STEPS, "train.max_steps=6", "train.logging_steps=1", f"teacher.cache_limit_gib={gib}")
    one, two = tmp_path / "one", tmp_path / "two"
    end = limbeck.run("train", recipe, *limit, f"output_dir={one}")
    assert end.code == 0, end.stderr[-3000:]
    half = "train.per_device_train_batch_size=2"
    all_end(limbeck.launch("train", recipe, *limit, f"output_dir={two}", half))
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)
    ]
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert end.stderr.count("the signal of steps") > 1 and not (two / "signal-windows").exists()
