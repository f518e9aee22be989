"""Files of a finished run that are gone or hold something else: the same command brings them back, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.limbeck_command import CommandServer, KillAt
from tests.recovery.conftest import Reference
from tests.tiny_pair import TinyPair, write_model


@pytest.fixture
def run(reference: Reference, tmp_path: Path) -> Path:
    """A copy of the finished run, with links where the original has them."""
    root = tmp_path / "run"
    shutil.copytree(reference.root, root)
    for shard in (root / "signal").glob("[0-9]*.safetensors"):
        shard.unlink()
        os.link(root / "responses/batches" / shard.name[1:], shard)
    return root


def without_last_line(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def one_digit(path: Path) -> None:
    text = path.read_text()
    at = next(i for i in range(len(text) // 2, len(text)) if text[i] in "12345678")
    path.write_text(text[:at] + str(int(text[at]) + 1) + text[at + 1 :])


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(bytes(data))


def gone(path: Path) -> None:
    path.unlink()


DAMAGES = (
    ("prompts.jsonl", without_last_line),
    ("prompts.jsonl", gone),
    ("responses/teacher.jsonl", without_last_line),
    ("responses/teacher.jsonl", one_digit),
    ("responses/teacher.jsonl", gone),
    ("responses/teacher.arrow", one_bit),
    ("responses/teacher.arrow", gone),
    ("responses/batches/00001.safetensors", one_bit),
    ("signal/hidden.json", one_digit),
    ("signal/hidden.safetensors", one_bit),
    ("signal/000002.safetensors", one_bit),
    ("signal/000002.safetensors", gone),
)


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_damaged_before_the_training(
    limbeck: CommandServer, reference: Reference, run: Path, name: str, damage: object
) -> None:
    """What the training reads is what was written, or is written again: never trained on as it is."""
    for made in ("student", "checkpoints", "scores"):
        shutil.rmtree(run / made)
    for made in ("stages/train.json", "stages/evaluate.json", "stages/report.json", "metrics.jsonl", "blocks.json"):
        (run / made).unlink()
    for made in ("scores.json", "samples.jsonl", "report.html", "report.svg"):
        (run / made).unlink()
    damage(run / name)  # type: ignore[operator]
    finished = limbeck.run("run", run)
    assert finished.code == 0, finished.stderr
    assert "since it was written" in finished.stderr
    shutil.rmtree(run / "superseded", ignore_errors=True)
    reference.check(run)
    assert "since it was written" not in limbeck.run("run", run).stderr


def test_a_batch_that_was_changed_before_its_stage_ended(
    limbeck: CommandServer, reference: Reference, tiny: TinyPair, tmp_path: Path
) -> None:
    """No record of the stage says yet what it was: its checksum does."""
    run, name = tmp_path / "run", "responses/teacher.jsonl"
    recipe = tiny.recipe(run)
    assert limbeck.run("run", recipe, killed=KillAt(run, name, 0)).code == -signal.SIGKILL
    path = run / "responses/batches/00001.jsonl"
    one_digit(path)
    refused = limbeck.run("run", recipe)
    assert refused.code == 2 and f"{path} is damaged" in refused.error_line and f"delete {path}" in refused.error_line
    path.unlink()
    assert limbeck.run("run", recipe).code == 0
    reference.check(run)


AFTER = (
    *(("prompts.jsonl", gone), ("responses/teacher.jsonl", gone), ("student/model.safetensors", one_bit)),
    *(("student/config.json", gone), ("student/tokenizer.json", one_digit), ("student/README.md", gone)),
    *(("blocks.json", one_digit), ("scores.json", one_digit), ("samples.jsonl", gone), ("report.html", gone)),
    *(("report.svg", one_digit), ("scores/after.rouge.jsonl", one_digit), ("scores/before.fidelity.json", gone)),
)


@pytest.mark.parametrize(("name", "damage"), AFTER, ids=lambda value: getattr(value, "__name__", value))
def test_damaged_afterwards(limbeck: CommandServer, reference: Reference, run: Path, name: str, damage: object) -> None:
    """Also what nobody will read but the user; the model card comes back with the student."""
    before = (run / name).read_bytes()
    damage(run / name)  # type: ignore[operator]
    finished = limbeck.run("run", run)
    assert finished.code == 0, finished.stderr
    assert f"{name} {'is missing' if damage is gone else 'has changed'} since it was written" in finished.stderr
    if not name.startswith("report"):
        # The report shows how long everything took.
        assert (run / name).read_bytes() == before
    assert (run / name).is_file() and (run / "student/README.md").is_file()
    shutil.rmtree(run / "superseded", ignore_errors=True)
    reference.check(run)


def test_what_only_saves_time_may_be_deleted(limbeck: CommandServer, run: Path) -> None:
    for folder in ("signal", "checkpoints", "responses/batches", "scores/answers"):
        shutil.rmtree(run / folder)
    (run / "metrics.jsonl").write_text("")
    finished = limbeck.run("run", run)
    assert finished.code == 0 and "since it was written" not in finished.stderr
    assert not (run / "signal").exists() and not (run / "superseded").exists()


def test_made_again_and_different(limbeck: CommandServer, run: Path, reference: Reference) -> None:
    """Another machine may write other answers: what was made from the old ones is refused, and redone on request."""
    from limbeck.runtime.rundir import RunDirectory

    directory = RunDirectory(run)
    record = directory.manifest("train") or {}
    record["made_from"]["respond"] = "0" * 64
    directory.write_manifest("train", record)
    refused = limbeck.run("run", run)
    assert refused.code == 2 and "add --update" in refused.error_line
    finished = limbeck.run("run", run, "--update")
    assert finished.code == 0, finished.stderr
    shutil.rmtree(run / "superseded")
    reference.check(run)


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"done": 1}', "{", '{"a": ' * 3000])
def test_a_manifest_that_is_none(limbeck: CommandServer, run: Path, reference: Reference, text: str) -> None:
    path = run / "stages" / "evaluate.json"
    path.write_text(text)
    refused = limbeck.run("run", run)
    assert refused.code == 2 and f"{path} is damaged" in refused.error_line and "delete it" in refused.error_line
    path.unlink()
    finished = limbeck.run("run", run)
    assert finished.code == 0, finished.stderr
    shutil.rmtree(run / "superseded")
    reference.check(run)


def test_a_manifest_with_another_value(limbeck: CommandServer, run: Path) -> None:
    path = run / "stages" / "respond.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"template": "alpaca"}))
    assert f"{path} is damaged (it is not what was written)" in limbeck.run("run", run).error_line


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "generation_config.json"])
def test_the_teacher_speaks_another_way(limbeck: CommandServer, tmp_path: Path, tiny: TinyPair, name: str) -> None:
    """Answers to prompts in the old template are not trained on under the new one."""
    pair = TinyPair(teacher=write_model(tmp_path / "teacher"), prompts=tiny.prompts)
    recipe = pair.recipe(tmp_path / "run")
    assert limbeck.run("respond", recipe).code == 0
    path = pair.teacher / name
    if name.endswith(".jinja"):
        path.write_text("You are a pirate.\n" + path.read_text())
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.5, "model_max_length": 127}))
    refused = limbeck.run("run", recipe)
    assert refused.code == 2 and "the inputs of its stage respond have changed" in refused.error_line
    assert limbeck.run("run", recipe, "train.max_steps=1", "--update").code == 0


def test_no_bars_of_others(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    """What transformers draws while it reads and writes weights is not of the run."""
    finished = limbeck.run("train", tiny.recipe(tmp_path / "run", train={"max_steps": 1}))
    assert finished.code == 0 and "it/s" not in finished.stderr and "shards" not in finished.stderr


def test_a_damaged_student_is_not_exported(limbeck: CommandServer, run: Path, tmp_path: Path) -> None:
    path = run / "student/model.safetensors"
    one_bit(path)
    refused = limbeck.run("export", run, tmp_path / "exported")
    assert refused.code == 2 and f"{path} has changed since it was written" in refused.error_line
    assert limbeck.run("run", run).code == 0
    assert limbeck.run("export", run, tmp_path / "exported").code == 0
