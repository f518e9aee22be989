"""Micro-batches prepared while the student computes: the same bits, one at a time, errors where they are wanted.

A CPU prepares nothing ahead: here what a CUDA device asks for is made to happen on one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from limbeck.objectives import build_objective
from limbeck.teachers.store.base import Codec
from limbeck.teachers.store.dense import Hidden, Svd
from limbeck.teachers.store.reader import Store
from limbeck.teachers.store.source import StoredSignals
from limbeck.teachers.store.sparse import Sampled, TopK
from limbeck.training import micro_batches
from limbeck.training.loss import LossPlan, StudentLoss
from limbeck.training.micro_batches import HostBatch, MicroBatches, pin_of
from limbeck.types import Interrupted, LimbeckError, Response, Signal, Support, TokenBatch
from tests.teachers.store.made import make, manifest
from tests.teachers.store.made import tiny_teacher as stored_teacher
from tests.training.play import (
    identical,
    metrics,
    play,
    settings,
    stop_after,
    tiny_corpus,
    tiny_lora,
    tiny_model,
    tiny_responses,
    weights,
)
from tests.training.test_sources_in_the_loop import CHOSEN, author_of

AHEAD, HERE = "limbeck-background", "MainThread"
TIMED = ("seconds", "tokens_per_s", "writing_seconds")


@dataclass
class Watched:
    """A store that notes which thread reads which rows.

    Attributes:
        hook: called before each reading with the number of those before.
    """

    inner: StoredSignals
    reads: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    hook: Callable[[int], None] = lambda number: None

    def signal(self, batch: TokenBatch) -> Signal:
        raise AssertionError("all is on disk")

    def read_stored(self, batch: TokenBatch) -> Signal:
        self.hook(len(self.reads))
        self.reads.append((threading.current_thread().name, batch.rows))
        return self.inner.read_stored(batch)


def store_of(path: Path, codec: Codec | None = None, responses: list[Response] | None = None) -> Watched:
    if not path.exists():
        make(path, responses or tiny_responses(), identity=manifest(codec or Hidden()))
    return Watched(StoredSignals(Store(path), torch.device("cpu")))


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What a CUDA device would ask for; the list has the tensors that were pinned."""
    made: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        assert threading.current_thread().name == AHEAD
        made.append(tensor.clone())
        return made[-1]

    monkeypatch.setattr(micro_batches, "pin_of", lambda device: pin)
    return made


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMED} for line in metrics(folder)]


def both(
    folder: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[[Path], nn.Module]
) -> tuple[nn.Module, nn.Module]:
    """A training without and with preparing ahead; their losses are the same."""
    for name in ("here", "ahead"):
        (folder / name).mkdir()
    with monkeypatch.context() as plain:
        plain.setattr(micro_batches, "pin_of", lambda device: None)
        first = run(folder / "here")
    second = run(folder / "ahead")
    assert lines(folder / "here") == lines(folder / "ahead")
    return first, second


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    ("codec", "support"),
    [(Hidden(), "full"), (Svd(rank=8), "full"), (TopK(k=8), "topk_tail"), (Sampled(draws=9), "sampled")],
    ids=["hidden", "svd", "topk", "sampled"],
)
def test_weights_and_losses_are_the_same_bits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ahead: list[Tensor],
    codec: Codec,
    support: Support,
    accumulation: int,
) -> None:
    """Of a student with dropout, whose random numbers would show any that the thread drew."""
    store = store_of(tmp_path / "store", codec)
    plan = LossPlan(objective=build_objective("fkl"), support=support)
    chosen = settings(per_device_train_batch_size=4, gradient_accumulation_steps=accumulation)

    def run(folder: Path) -> nn.Module:
        return play(
            tiny_lora(1, dropout=0.2), folder, chosen, teacher=store, loss_plan=plan, corpus=tiny_corpus(rows=2)
        )

    one, other = both(tmp_path, monkeypatch, run)
    assert identical(weights(one), weights(other))
    half = len(store.reads) // 2
    assert [rows for _, rows in store.reads[:half]] == [rows for _, rows in store.reads[half:]]
    assert {thread for thread, _ in store.reads[:half]} == {HERE}
    assert [thread for thread, _ in store.reads[half:]] == [HERE] + [AHEAD] * (half - 1)
    assert ahead


@pytest.mark.parametrize("kind", ["own", "rounds", "mixed rounds", "pairs", "replay"])
def test_responses_that_the_student_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: list[Tensor], kind: str
) -> None:
    """Of a round that is written the next step is known; a teacher in the process is asked in the step itself."""
    asked: list[str] = []

    class Asked:
        inner = stored_teacher()

        def signal(self, batch: TokenBatch) -> Signal:
            asked.append(threading.current_thread().name)
            return self.inner.signal(batch)

    def run(folder: Path) -> nn.Module:
        student = tiny_model(1)
        heldout = tiny_responses(5, seed=8)
        author = author_of(kind, student, folder)
        return play(student, folder, CHOSEN, author=author, teacher=Asked(), heldout=heldout)

    one, other = both(tmp_path, monkeypatch, run)
    assert identical(weights(one), weights(other))
    assert set(asked) == {HERE}
    assert bool(ahead) == (kind not in ("own", "replay"))


def test_it_reads_while_the_student_computes_and_at_no_other_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: list[Tensor]
) -> None:
    store, forward, on_device = store_of(tmp_path / "store"), StudentLoss.forward, MicroBatches.on_device
    computing, begun = threading.Event(), list[int]()

    def computed(self: StudentLoss, *args: Any) -> Any:
        begun.append(len(store.reads))
        computing.set()
        return forward(self, *args)

    def reading(number: int) -> None:
        if threading.current_thread().name == AHEAD:
            assert computing.wait(10.0)
            computing.clear()
            # Longer than the student computes.
            time.sleep(0.05)

    def wanted(self: MicroBatches, *args: Any) -> Any:
        assert AHEAD not in [thread.name for thread in threading.enumerate()]
        return on_device(self, *args)

    monkeypatch.setattr(StudentLoss, "forward", computed)
    monkeypatch.setattr(MicroBatches, "on_device", wanted)
    store.hook = reading
    play(tiny_model(1), tmp_path, settings(per_device_train_batch_size=4), teacher=store)
    # One is there when the student begins on it, and no more.
    assert begun[: len(store.reads)] == list(range(1, len(store.reads) + 1))


class Copies(TorchFunctionMode):
    """Notes which tensors are copied without being waited for."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and (kwargs or {}).get("non_blocking"):
            self.made.append(args[0].data_ptr())
        return func(*args, **(kwargs or {}))


def test_what_is_pinned_is_what_is_copied(tmp_path: Path, ahead: list[Tensor]) -> None:
    store, responses = store_of(tmp_path / "store", TopK(k=8)), tiny_responses()
    reader = MicroBatches.of(store, torch.device("cpu"), 0)
    with reader.preparing((3, 0), lambda: reader.read(dict(enumerate(responses)), (0, 4))):
        pass
    with Copies() as copies:
        batch, signal = reader.on_device(lambda: pytest.fail("it was prepared"), (3, 0))
    pinned = {tensor.data_ptr() for tensor in ahead}
    assert len(ahead) == 6 + 3 and pinned == set(copies.made)
    assert batch.rows == (0, 4) and signal.ids_NK.data_ptr() in pinned  # type: ignore[union-attr]


def test_another_place_reads_anew(tmp_path: Path, ahead: list[Tensor]) -> None:
    store, responses = store_of(tmp_path / "store"), dict(enumerate(tiny_responses()))
    reader = MicroBatches.of(store, torch.device("cpu"), 0)
    with reader.preparing((3, 0), lambda: reader.read(responses, (0, 4))):
        pass
    assert reader.on_device(lambda: reader.read(responses, (1,)))[0].rows == (1,)
    assert reader.on_device(lambda: reader.read(responses, (2,)), (3, 0))[0].rows == (2,), "held no longer"


def damaging(path: Path, at: int) -> Callable[[int], None]:
    """A disk that spoils the shards before a reading."""

    def hook(number: int) -> None:
        if number == at:
            for shard in path.glob("0*.safetensors"):
                content = bytearray(shard.read_bytes())
                content[-400:] = bytes(400)
                with shard.open("r+b") as file:
                    file.write(content)

    return hook


def test_an_error_is_raised_in_the_step_that_wants_the_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: list[Tensor]
) -> None:
    said = []
    for name in ("here", "ahead"):
        folder = tmp_path / name
        folder.mkdir()
        store = store_of(tmp_path / f"{name}-store")
        store.hook = damaging(tmp_path / f"{name}-store", at=3)
        with monkeypatch.context() as maybe, pytest.raises(LimbeckError, match="is not what was written") as failed:
            if name == "here":
                maybe.setattr(micro_batches, "pin_of", lambda device: None)
            play(tiny_model(1), folder, settings(save_steps=3), teacher=store)
        assert [line["step"] for line in metrics(folder)] == [1, 2, 3]
        assert (folder / "checkpoints" / "step-000003").is_dir()
        said.append(str(failed.value).replace(name, ""))
    assert said[0] == said[1] and "\n" not in said[0]


def test_an_error_that_no_step_wants_is_no_error(tmp_path: Path, ahead: list[Tensor]) -> None:
    """Of a training that is stopped before the step."""
    store = store_of(tmp_path / "store")
    store.hook = damaging(tmp_path / "store", at=3)
    with pytest.raises(Interrupted):
        play(tiny_model(1), tmp_path, settings(), teacher=store, should_stop=stop_after(3))


def test_a_training_that_goes_on_is_the_one_that_was_never_stopped(tmp_path: Path, ahead: list[Tensor]) -> None:
    store = store_of(tmp_path / "store")
    (tmp_path / "straight").mkdir()
    straight = play(tiny_model(1), tmp_path / "straight", settings(), teacher=store)
    with pytest.raises(Interrupted):
        play(tiny_model(1), tmp_path, settings(), teacher=store, should_stop=stop_after(2))
    assert identical(weights(play(tiny_model(1), tmp_path, settings(), teacher=store)), weights(straight))


def test_a_search_for_the_learning_rate_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: list[Tensor]
) -> None:
    store, chosen = store_of(tmp_path / "store"), settings(learning_rate="auto", per_device_train_batch_size=4)
    one, other = both(tmp_path, monkeypatch, lambda folder: play(tiny_model(1), folder, chosen, teacher=store))
    assert identical(weights(one), weights(other))


def test_a_signal_does_not_wait_for_a_disk_that_hangs() -> None:
    leave = threading.Event()
    reader = MicroBatches(teacher=stored_teacher(), device=torch.device("cpu"), pad_id=0, pin=Tensor.clone)

    def hangs() -> HostBatch | None:
        leave.wait(30.0)
        return None

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), reader.preparing((0, 1), hangs):
        raise KeyboardInterrupt
    assert time.monotonic() - began < 5.0
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == AHEAD)
    leave.set()


def test_only_a_cuda_device_is_prepared_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pin_of(torch.device("cpu")) is None and pin_of(torch.device("meta")) is None
    entered: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: (entered.append(device), nullcontext())[1])
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self + 1)
    pin = pin_of(torch.device("cuda", 1))
    assert pin is not None and pin(torch.zeros(1)) == 1
    assert entered == [torch.device("cuda", 1)], "no context on the first device"

    def refused(self: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(Tensor, "pin_memory", refused)
    assert pin(torch.zeros(1)) == 0
