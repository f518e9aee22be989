"""A training that was killed, and of whose files some then were damaged: what it goes on with is looked at first."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.limbeck_command import CommandServer, KillAt
from tests.recovery.conftest import Reference
from tests.tiny_pair import TinyPair

JUNK = ("[]\n", "null\n", "\ud7ff\x00junk\n", '{"step": "x"}\n', "[" * 9999 + "\n")
STOPPED: dict[str, dict[str, object]] = {
    "responses": {"source": {"name": "student", "refresh": "epoch"}},
    "sft": {"num_train_epochs": 1.0},
    "train": {"per_device_train_batch_size": 8, "save_total_limit": 3},
}


@pytest.fixture(scope="module")
def whole(limbeck: CommandServer, tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    root = tmp_path_factory.mktemp("stopped") / "whole"
    assert limbeck.run("run", tiny.recipe(root, **STOPPED)).code == 0
    return Reference(root, 0.0)


@pytest.fixture(scope="module")
def at_step_8(limbeck: CommandServer, tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stopped") / "run"
    recipe = tiny.recipe(root, **STOPPED)
    assert limbeck.run("run", recipe, killed=KillAt(root, "checkpoints/step-000010")).code == -signal.SIGKILL
    return root


def test_a_checkpoint_of_other_tensors(
    limbeck: CommandServer, whole: Reference, at_step_8: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(at_step_8, run)
    newest = max(run.glob("checkpoints/step-*"))
    save_file({"zzz": torch.zeros(2)}, newest / "model.safetensors")
    finished = limbeck.run("run", run)
    assert finished.code == 0, finished.stderr
    assert f"{newest} is damaged" in finished.stderr and "passed over" in finished.stderr
    whole.check(run)


def test_nothing_but_the_first_stage_is_left(
    limbeck: CommandServer, whole: Reference, at_step_8: Path, tmp_path: Path
) -> None:
    """Not from the student as it was before: the first stage's weights are restored, or trained again."""
    for name in ("kept", "damaged"):
        run = tmp_path / name
        shutil.copytree(at_step_8, run)
        for checkpoint in run.glob("checkpoints/step-*"):
            (checkpoint / "state.json").write_text("null")
        if name == "damaged":
            save_file({"zzz": torch.zeros(2)}, run / "checkpoints/sft/done/model.safetensors")
        finished = limbeck.run("run", run)
        assert finished.code == 0, finished.stderr
        assert ("the first stage is trained again" in finished.stderr) == (name == "damaged")
        whole.check(run)


def test_a_first_stage_that_had_just_ended(
    limbeck: CommandServer, tiny: TinyPair, whole: Reference, tmp_path: Path
) -> None:
    """Its checkpoints do not stay for ever where the kill came between its end and their removal."""
    run = tmp_path / "run"
    recipe = tiny.recipe(run, **STOPPED)
    killed = limbeck.run("run", recipe, killed=KillAt(run, "metrics.jsonl"))
    assert killed.code == -signal.SIGKILL
    left = run / "checkpoints/sft/step-000002"
    shutil.copytree(max(at for at in whole.root.glob("checkpoints/step-*")), left)
    assert limbeck.run("run", recipe).code == 0
    assert [path.name for path in (run / "checkpoints/sft").iterdir()] == ["done"]
    whole.check(run)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("metrics.jsonl", text) for text in JUNK),
        *(("blocks.json", text) for text in ("[]", "null", '{"keep": 3}', "{}")),
        ("blocks.json", '{"keep": [[0]], "removed": [], "influence": [], "path": [], "criterion": "kl"}'),
        *(("rounds/examples.jsonl", text) for text in ("[]\n", "3\n")),
    ],
)
def test_junk(limbeck: CommandServer, whole: Reference, at_step_8: Path, tmp_path: Path, name: str, text: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(at_step_8, run)
    path = run / name
    logged = path.name in ("metrics.jsonl", "examples.jsonl")
    path.write_text(text + path.read_text() if logged else text)
    refused = limbeck.run("run", run)
    assert refused.code == 2 and f"{path}" in refused.error_line and "is damaged" in refused.error_line
    if logged:
        assert "delete the line and run the same command again" in refused.error_line
        path.write_bytes(path.read_bytes().partition(b"\n")[2])
    else:
        assert f"delete {path}" in refused.error_line or "delete it" in refused.error_line
        path.unlink()
    finished = limbeck.run("run", run)
    assert finished.code == 0, finished.stderr
    whole.check(run)


@pytest.mark.parametrize("text", ["", "[]\n", None])
def test_a_round(limbeck: CommandServer, whole: Reference, at_step_8: Path, tmp_path: Path, text: str | None) -> None:
    """The weights that wrote it are gone: it is not written again by others."""
    run = tmp_path / "run"
    shutil.copytree(at_step_8, run)
    path = max(run.glob("rounds/[0-9]*")) / "student/00000.jsonl"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    refused = limbeck.run("run", run)
    assert refused.code == 2 and f"{path} is missing or not what was written" in refused.error_line
    assert f"delete {run / 'rounds'} and {run / 'checkpoints'} and run the same command again" in refused.error_line
    shutil.rmtree(run / "rounds")
    shutil.rmtree(run / "checkpoints")
    finished = limbeck.run("run", run)
    assert finished.code == 0, finished.stderr
    whole.check(run)


def test_a_batch_of_a_round_that_is_still_written(
    limbeck: CommandServer, tiny: TinyPair, whole: Reference, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = tiny.recipe(run, **STOPPED)
    killed = limbeck.run("run", recipe, killed=KillAt(run, "rounds/000/student/00002.jsonl"))
    assert killed.code == -signal.SIGKILL
    path = run / "rounds/000/student/00001.jsonl"
    for text in ("[]\n", "null\n", '{"prompt_ids": "x"}\n', ""):
        path.write_text(text)
        line = limbeck.run("run", recipe).error_line
        assert f"{path}" in line and "is damaged" in line and f"delete {path} and run the same command again" in line
    path.unlink()
    assert limbeck.run("run", recipe).code == 0
    whole.check(run)
