"""The story engine: stages in order, done once, stopped and continued in order; failures as one line."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import limbeck
from limbeck.pipeline.engine import GracefulStop, RunContext, Stage, run_pipeline
from limbeck.recipe.load import load_recipe
from limbeck.runtime.errors import explain, in_one_line
from limbeck.runtime.rundir import RunDirectory, flatten, read_json, write_text
from limbeck.types import Json, LimbeckError
from tests.tiny_pair import TinyPair, write_model

# An alias bomb, one that holds itself, nested without end, no mapping, no text.
ODD_RECIPES = (
    b"a: &a [x, x]\n" + b"".join(b"%c: &%c [%s]\n" % (n, n, b"*%c, " % (n - 1) * 9) for n in range(98, 123)),
    b"a: &a {b: *a}\n",
    b"[" * 3_000,
    b"- a\n",
    b"\xff",
)


class TestStopWish:
    def test_at_once(self) -> None:
        stop, before = GracefulStop(), signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as caught, stop.installed():
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.args == (signal.SIGTERM,)
        assert signal.getsignal(signal.SIGINT) is before

    def test_deferred_then_heeded(self, capsys: pytest.CaptureFixture[str]) -> None:
        stop, finished = GracefulStop(), []
        with pytest.raises(KeyboardInterrupt), stop.installed():
            with stop.deferred() as requested, stop.deferred():
                assert not requested()
                signal.raise_signal(signal.SIGINT)
                assert requested()
                finished.append("the write")
            stop.raise_if_requested()
        assert finished == ["the write"]
        assert "stopping after this step" in capsys.readouterr().err

    def test_second_time_at_once(self) -> None:
        stop = GracefulStop()
        with pytest.raises(KeyboardInterrupt), stop.installed(), stop.deferred():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        GracefulStop().raise_if_requested()

    @pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
    def test_of_terminals_and_schedulers(self, number: signal.Signals) -> None:
        stop, before = GracefulStop(), signal.getsignal(number)
        with pytest.raises(KeyboardInterrupt) as caught, stop.installed():
            signal.raise_signal(number)
        assert caught.value.args == (number,) and signal.getsignal(number) is before

    def test_nohup(self) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with GracefulStop().installed():
                signal.raise_signal(signal.SIGHUP)
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_outside_the_main_thread(self) -> None:
        before, entered = signal.getsignal(signal.SIGINT), []

        def other() -> None:
            with GracefulStop().installed():
                entered.append(signal.getsignal(signal.SIGINT) is before)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert entered == [True]


class Trace:
    """Stages that write one file each and count how often they were played."""

    def __init__(self) -> None:
        self.played: list[str] = []
        self.fail: dict[str, BaseException] = {}
        self.values = {"one": 1, "two": 1, "three": 1}

    def stage(self, name: str) -> Stage:
        def work(context: RunContext) -> Json:
            self.played.append(name)
            if name in self.fail:
                raise self.fail.pop(name)
            write_text(context.run.root / f"{name}.txt", str(self.values[name]))
            return {"tokens": 10}

        return Stage(
            name=name,
            inputs=lambda context: {"value": self.values[name]},
            play=work,
            outputs=lambda run: (run.root / f"{name}.txt",),
        )

    def play(self, tiny: TinyPair, root: Path, until: str | None = None, update: bool = False) -> RunDirectory:
        recipe = load_recipe(tiny.tree(root))
        return run_pipeline(recipe, stages=[self.stage(name) for name in self.values], until=until, update=update)


class TestPlaying:
    def test_once_each(self, tiny: TinyPair, tmp_path: Path) -> None:
        trace = Trace()
        trace.play(tiny, tmp_path / "run", until="two")
        assert trace.played == ["one", "two"]
        run = trace.play(tiny, tmp_path / "run")
        assert trace.played == ["one", "two", "three"]
        record = run.manifest("three")
        assert record is not None and record["done"] and record["tokens_per_s"] > 0 and record["peak_memory_mib"] > 0

    def test_time_of_interrupted_attempts_counts(
        self, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trace, clock = Trace(), iter(range(1000, 9000, 10))
        monkeypatch.setattr("limbeck.pipeline.engine.time.monotonic", lambda: float(next(clock)))
        trace.fail["two"] = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            trace.play(tiny, tmp_path / "run")
        first = read_json(tmp_path / "run" / "stages" / "two.json")
        assert not first["done"] and first["seconds"] == 10
        trace.play(tiny, tmp_path / "run")
        second = read_json(tmp_path / "run" / "stages" / "two.json")
        assert second["done"] and second["seconds"] == 20 and second["started"] == first["started"]

    def test_a_clock_that_is_set_back(self, tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trace, clock = Trace(), iter(range(10**9, 0, -7200))
        monkeypatch.setattr("limbeck.pipeline.engine.time.time", lambda: float(next(clock)))
        run = trace.play(tiny, tmp_path / "run")
        for name in trace.values:
            record = run.manifest(name)
            assert record is not None and 0 <= record["seconds"] < 60 and record["tokens_per_s"] < 1e12

    @pytest.mark.parametrize("text", ODD_RECIPES)
    def test_a_directory_whose_recipe_cannot_be_read(self, tiny: TinyPair, tmp_path: Path, text: bytes) -> None:
        trace = Trace()
        trace.play(tiny, tmp_path / "run").recipe.write_bytes(text)
        trace.values["two"] = 2
        with pytest.raises(LimbeckError, match=r"was made by a recipe that cannot be read.*--update"):
            trace.play(tiny, tmp_path / "run")

    def test_update_redoes_what_depends_on_it(self, tiny: TinyPair, tmp_path: Path) -> None:
        trace, root = Trace(), tmp_path / "run"
        trace.play(tiny, root)
        trace.values["two"] = 2
        with pytest.raises(LimbeckError, match="the inputs of its stage two have changed"):
            trace.play(tiny, root)
        # Also by a verb that would only read what comes before: its recipe would be recorded as that of all.
        with pytest.raises(LimbeckError, match="--update"):
            trace.play(tiny, root, until="one")
        trace.played.clear()
        trace.play(tiny, root, until="two", update=True)
        assert trace.played == ["two"]
        assert (root / "two.txt").read_text() == "2" and not (root / "three.txt").exists()
        kept = {path.name: path.read_text() for path in (root / "superseded").rglob("*.txt")}
        assert kept == {"two.txt": "1", "three.txt": "1"}

    def test_files_of_unknown_origin_are_not_built_upon(self, tiny: TinyPair, tmp_path: Path) -> None:
        trace, root = Trace(), tmp_path / "run"
        trace.play(tiny, root)
        (root / "stages" / "three.json").unlink()
        (root / "three.txt").write_text("somebody's")
        trace.play(tiny, root)
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
            trace.play(tiny, tmp_path / "run")
        assert caught.value.__cause__ is error and "\n" not in str(caught.value)
        trace.play(tiny, tmp_path / "run")
        assert trace.played == ["one", "two", "two", "three"]


class TestFailures:
    def test_of_a_real_allocation(self) -> None:
        with pytest.raises(LimbeckError, match="out of memory"), in_one_line():
            torch.empty(1 << 50, dtype=torch.uint8)

    def test_damaged_weights(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        (tmp_path / "a.safetensors").write_bytes(b"12345678{")
        with (
            pytest.raises(LimbeckError, match=rf"{tmp_path / 'a.safetensors'} is damaged .*; delete it"),
            in_one_line(),
        ):
            load_file(tmp_path / "a.safetensors")

    @pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), KeyError("x")])
    def test_own_faults_keep_their_traceback(self, error: Exception) -> None:
        assert explain(error) is None
        with pytest.raises(type(error)), in_one_line():
            raise error

    def test_own_lines_pass(self) -> None:
        line = LimbeckError("a line")
        with pytest.raises(LimbeckError) as caught, in_one_line():
            raise line
        assert caught.value is line


def test_window_is_the_smaller_one(tiny: TinyPair, tmp_path: Path) -> None:
    student = write_model(tmp_path / "student", window=64, layers=2)
    section = {"model": str(student), "init": "pretrained", "layers": None}
    windows: list[Callable[[], int | None]] = []
    for sections in (
        {},
        {"student": section},
        {"student": section | {"init": "scratch", "config": {"max_position_embeddings": 32}}},
    ):
        context = RunContext(load_recipe(tiny.tree(tmp_path / "run", **sections)))
        windows.append(lambda context=context: context.window)
    assert [window() for window in windows] == [128, 64, 32]


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2], "e": {}}


def test_python_api(tiny: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From Python: a mapping in, the run out, errors as one exception."""
    recipe = tiny.tree(tmp_path / "run", train={"max_steps": 2})
    done = limbeck.run(recipe)
    assert done.student.is_dir() and done.report.is_file() and {"before", "after"} <= set(done.scores)
    assert capsys.readouterr().out == ""
    with pytest.raises(LimbeckError, match=r"train\.max_steps is 2 there and 3 here"):
        limbeck.run(recipe, "train.max_steps=3")
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(done.student).config.num_hidden_layers == 2


def test_a_directory_of_an_earlier_version_is_refused(tiny: TinyPair, tmp_path: Path) -> None:
    """Its stages had other names, and would all be played again beside what is there."""
    (tmp_path / "run" / "stages").mkdir(parents=True)
    (tmp_path / "run" / "recipe.resolved.yaml").write_text("name: run\n", "utf-8")
    (tmp_path / "run" / "stages" / "responses.json").write_text("{}", "utf-8")
    with pytest.raises(LimbeckError, match=r"earlier version of limbeck \(stages/responses.json\); name another"):
        limbeck.run(tiny.tree(tmp_path / "run"))
