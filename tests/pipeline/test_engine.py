"""The story engine: stages in order, done once, stopped and continued in order; failures as one line."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import limbeck
from limbeck.pipeline.context import RunContext, Stage
from limbeck.pipeline.engine import run_pipeline
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.io import read_responses
from limbeck.runtime.files import read_json, write_text
from limbeck.runtime.rundir import RunDirectory
from limbeck.types import AFTER_TRAINING, Json, LimbeckError
from tests.tiny_pair import TinyPair

# An alias bomb, one that holds itself, nested without end, no mapping, no text.
ODD_RECIPES = (
    b"a: &a [x, x]\n" + b"".join(b"%c: &%c [%s]\n" % (n, n, b"*%c, " % (n - 1) * 9) for n in range(98, 123)),
    b"a: &a {b: *a}\n",
    b"[" * 3_000,
    b"- a\n",
    b"\xff",
)


class Trace:
    """Stages that write one file each and count how often they were done_stages."""

    def __init__(self) -> None:
        self.done_stages: list[str] = []
        self.fail: dict[str, BaseException] = {}
        self.values = {"one": 1, "two": 1, "three": 1}

    def stage(self, name: str) -> Stage:
        def work(context: RunContext) -> Json:
            self.done_stages.append(name)
            if name in self.fail:
                raise self.fail.pop(name)
            write_text(context.run.root / f"{name}.txt", str(self.values[name]))
            return {"tokens": 10}

        return Stage(
            name=name,
            inputs=lambda context: {"value": self.values[name]},
            run=work,
            outputs=lambda run: (run.root / f"{name}.txt",),
        )

    def run(self, tiny: TinyPair, root: Path, until: str | None = None, update: bool = False) -> RunDirectory:
        recipe = load_recipe(tiny.tree(root))
        return run_pipeline(recipe, stages=[self.stage(name) for name in self.values], until=until, update=update)


class TestRunning:
    def test_once_each(self, tiny: TinyPair, tmp_path: Path) -> None:
        trace = Trace()
        trace.run(tiny, tmp_path / "run", until="two")
        assert trace.done_stages == ["one", "two"]
        run = trace.run(tiny, tmp_path / "run")
        assert trace.done_stages == ["one", "two", "three"]
        record = run.manifest("three")
        assert record is not None and record["done"] and record["tokens_per_s"] > 0 and record["peak_memory_mib"] > 0

    def test_time_of_interrupted_attempts_counts(
        self, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trace, clock = Trace(), iter(range(1000, 9000, 10))
        monkeypatch.setattr("limbeck.pipeline.engine.time.monotonic", lambda: float(next(clock)))
        trace.fail["two"] = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            trace.run(tiny, tmp_path / "run")
        first = read_json(tmp_path / "run" / "stages" / "two.json")
        assert not first["done"] and first["seconds"] == 10
        trace.run(tiny, tmp_path / "run")
        second = read_json(tmp_path / "run" / "stages" / "two.json")
        assert second["done"] and second["seconds"] == 20 and second["started"] == first["started"]

    def test_a_clock_that_is_set_back(self, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trace, clock = Trace(), iter(range(10**9, 0, -7200))
        monkeypatch.setattr("limbeck.pipeline.engine.time.time", lambda: float(next(clock)))
        run = trace.run(tiny, tmp_path / "run")
        for name in trace.values:
            record = run.manifest(name)
            assert record is not None and 0 <= record["seconds"] < 60 and record["tokens_per_s"] < 1e12

    @pytest.mark.parametrize("text", ODD_RECIPES)
    def test_a_directory_whose_recipe_cannot_be_read(self, tiny: TinyPair, tmp_path: Path, text: bytes) -> None:
        trace = Trace()
        trace.run(tiny, tmp_path / "run").recipe.write_bytes(text)
        trace.values["two"] = 2
        with pytest.raises(LimbeckError, match=r"was made by a recipe that cannot be read.*--update"):
            trace.run(tiny, tmp_path / "run")

    def test_update_redoes_what_depends_on_it(self, tiny: TinyPair, tmp_path: Path) -> None:
        trace, root = Trace(), tmp_path / "run"
        trace.run(tiny, root)
        trace.values["two"] = 2
        with pytest.raises(LimbeckError, match="the inputs of its stage two have changed"):
            trace.run(tiny, root)
        # Also by a verb that would only read what comes before: its recipe would be recorded as that of all.
        with pytest.raises(LimbeckError, match="--update"):
            trace.run(tiny, root, until="one")
        trace.done_stages.clear()
        trace.run(tiny, root, until="two", update=True)
        assert trace.done_stages == ["two"]
        assert (root / "two.txt").read_text() == "2" and not (root / "three.txt").exists()
        kept = {path.name: path.read_text() for path in (root / "superseded").rglob("*.txt")}
        assert kept == {"two.txt": "1", "three.txt": "1"}

    def test_files_of_unknown_origin_are_not_built_upon(self, tiny: TinyPair, tmp_path: Path) -> None:
        trace, root = Trace(), tmp_path / "run"
        trace.run(tiny, root)
        (root / "stages" / "three.json").unlink()
        (root / "three.txt").write_text("somebody's")
        trace.run(tiny, root)
        assert (root / "three.txt").read_text() == "1"
        assert [path.read_text() for path in (root / "superseded").rglob("three.txt")] == ["somebody's"]

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/file"), "cannot use /run/file: No space left"),
            (
                IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), "/run/x"),
                "/run/x: Is a directory; .*delete it",
            ),
            (SafetensorError("I/O error: File too large (os error 27)"), "File too large; free some space"),
            (MemoryError(), "out of memory; lower train.per_device"),
            (torch.OutOfMemoryError("tried to allocate 2 GiB\nand more"), "allocate 2 GiB and more.*batch_size"),
        ],
    )
    def test_failures_are_one_line(self, tiny: TinyPair, tmp_path: Path, error: Exception, words: str) -> None:
        trace = Trace()
        trace.fail["two"] = error
        with pytest.raises(LimbeckError, match=words) as caught:
            trace.run(tiny, tmp_path / "run")
        assert caught.value.__cause__ is error and "\n" not in str(caught.value)
        trace.run(tiny, tmp_path / "run")
        assert trace.done_stages == ["one", "two", "two", "three"]


def test_python_api(tiny: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From Python: a mapping in, the run out, errors as one exception."""
    recipe = tiny.tree(tmp_path / "run", train={"max_steps": 2})
    done = limbeck.run(recipe)
    assert done.student.is_dir() and done.report.is_file() and {"before", "after"} <= set(done.scores)
    assert capsys.readouterr().out == ""
    samples = [json.loads(line) for line in (done.directory / "samples.jsonl").read_text("utf-8").splitlines()]
    rounds = {"teacher": ("teacher", AFTER_TRAINING), "before": ("student", 0), "after": ("student", AFTER_TRAINING)}
    for sample in samples:
        found = {side: (r["author"], r["round"]) for side, r in sample["responses"].items()}
        assert found == rounds and len({r["id"] for r in sample["responses"].values()}) == 3
    # The page names them, and none of them is the address of a response that the teacher scored.
    ids = {r["id"] for sample in samples for r in sample["responses"].values()}
    scored = {r.id for path in (done.directory / "responses").glob("*.jsonl") for r in read_responses(path)}
    assert samples and scored and not ids & scored
    assert ids == set(re.findall(r'data-response="(\w+)"', done.report.read_text("utf-8")))
    with pytest.raises(LimbeckError, match=r"train\.max_steps is 2 there and 3 here"):
        limbeck.run(recipe, "train.max_steps=3")
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(done.student).config.num_hidden_layers == 2
