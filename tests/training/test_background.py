"""Checkpoints that are written beside the training hold what the step left, and what goes wrong there is heard of."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from limbeck.training import checkpoint_files, checkpoints
from limbeck.training.background import Background, on_host
from limbeck.types import Interrupted
from tests.training.play import identical, metrics, play, settings, slowly, stop_after, tiny_model, weights
from tests.training.test_checkpoints import trained


def test_a_checkpoint_is_of_its_own_step_however_late_it_is_written(tmp_path, monkeypatch):
    chosen = settings(save_steps=1, save_total_limit=9)
    folders = [tmp_path / name for name in ("at_once", "late")]
    for folder in folders:
        folder.mkdir()
    play(tiny_model(1), folders[0], chosen)
    threads = slowly(monkeypatch, 0.1)
    play(tiny_model(1), folders[1], chosen)
    assert set(threads) == {"limbeck-background"}
    at_once, late = (checkpoints.all_in(folder / "checkpoints") for folder in folders)
    assert [path.name for path in late] == [path.name for path in at_once] == [f"step-00000{n}" for n in range(1, 5)]
    for one, other in zip(at_once, late, strict=True):
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert identical(load_file(one / name), load_file(other / name))
        assert checkpoints.usable(other.parent) == late[-1]


def test_a_training_that_is_stopped_leaves_its_last_step_on_disk(tmp_path, monkeypatch):
    slowly(monkeypatch, 0.2)
    (tmp_path / "straight").mkdir()
    straight = play(tiny_model(1), tmp_path / "straight", settings())
    with pytest.raises(Interrupted):
        play(tiny_model(1), tmp_path, settings(save_steps=1), should_stop=stop_after(3))
    newest = checkpoints.usable(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-000003"
    assert identical(weights(play(tiny_model(1), tmp_path, settings())), weights(straight))


def test_a_disk_that_is_full_ends_the_training_before_the_next_update(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "save_file", full)
    with pytest.raises(OSError, match="No space") as failed:
        play(tiny_model(1), tmp_path, settings(save_steps=2))
    assert failed.value.filename == str(tmp_path / "checkpoints" / "step-000002")
    assert not list((tmp_path / "checkpoints").iterdir())
    assert metrics(tmp_path)[-1]["step"] == 2


def test_what_reads_the_weights_ends_before_they_change():
    background, read = Background(), threading.Event()
    background.begin(lambda _: (time.sleep(0.1), read.set()), reads_weights=True)
    background.before_update()
    assert read.is_set()


def test_the_update_waits_for_no_more_than_the_reading():
    background, leave, order = Background(), threading.Event(), []

    def work(read: Callable[[], None]) -> None:
        time.sleep(0.1)
        order.append("read")
        read()
        leave.wait(10.0)
        order.append("hashed")

    background.begin(work, reads_weights=True)
    background.before_update()
    assert order == ["read"]
    leave.set()
    background.finish()
    assert order == ["read", "hashed"]


def test_what_reads_copies_goes_on_beside_the_update_and_the_next_one_waits():
    background, leave, order = Background(), threading.Event(), []
    background.begin(lambda _: (leave.wait(10.0), order.append("first")), reads_weights=False)
    background.before_update()
    assert not order
    leave.set()
    background.begin(lambda _: order.append("second"), reads_weights=False)
    background.finish()
    assert order == ["first", "second"]


def test_an_error_is_raised_once_and_the_trainings_own_comes_before_it():
    def fails(_: object) -> None:
        raise OSError(5, "Input/output error")

    background = Background()
    background.begin(fails, reads_weights=False)
    with pytest.raises(OSError, match="Input/output"):
        while True:
            background.before_update()
    background.finish()
    with pytest.raises(OSError, match="Input/output"), Background() as background:
        background.begin(fails, reads_weights=False)
    with pytest.raises(ZeroDivisionError), Background() as background:
        background.begin(fails, reads_weights=False)
        raise ZeroDivisionError


def test_a_signal_does_not_wait_and_an_error_does():
    leave, ended = threading.Event(), []

    def work(_: object) -> None:
        leave.wait(10.0)
        ended.append(True)

    with pytest.raises(KeyboardInterrupt), Background() as background:
        background.begin(work, reads_weights=True)
        raise KeyboardInterrupt
    assert not ended
    leave.set()
    with pytest.raises(ValueError), Background() as background:
        background.begin(lambda _: (time.sleep(0.1), ended.append(True)), reads_weights=True)
        raise ValueError
    assert ended


def test_copies_on_the_host_are_copies():
    model = tiny_model(1)
    optimizer = trained(model)
    kept = {"weight": next(model.parameters()), "step": next(iter(optimizer.state.values()))["step"]}
    copied = on_host(kept)
    assert identical(copied, kept)
    with torch.no_grad():
        for tensor in kept.values():
            tensor += 1
    assert not any(torch.equal(copied[name], kept[name]) for name in kept)


def test_counts_on_the_host_are_copied_where_the_weights_lie_elsewhere(tmp_path, monkeypatch):
    """Weights and moments of an accelerator come to the host as copies; what lies there already would not."""
    slowly(monkeypatch, 0.2)
    monkeypatch.setattr(checkpoints, "is_on_cpu", lambda model: False)
    model = tiny_model(1)
    optimizer = trained(model, steps=3)
    with Background() as background:
        path = checkpoints.save(tmp_path, 3, model=model, optimizer=optimizer, state={}, keep=1, background=background)
        optimizer.step()
        background.before_update()
        assert not path.exists()
    counts = [value for name, value in load_file(path / "optimizer.safetensors").items() if name.endswith(".step")]
    assert counts and {count.item() for count in counts} == {3.0}
