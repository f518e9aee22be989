"""A tiny pair in memory and responses of random length: a training run takes a fraction of a second."""

from __future__ import annotations

import json
import random
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from limbeck.models.heads import head_of
from limbeck.objectives import Temperature, build_objective
from limbeck.objectives.sums import AnyObjective
from limbeck.recipe.load import TrainSection
from limbeck.rollouts.sources import SourceFactory, offline
from limbeck.teachers.local import LocalTeacher
from limbeck.training import checkpoint_files
from limbeck.training.corpus import Corpus
from limbeck.training.loop import train
from limbeck.training.loss import LossPlan
from limbeck.training.metrics import LoopContext
from limbeck.training.weighting import TokenWeighting
from limbeck.types import DenseSignal, Response, SignalSource, TokenBatch

# The heads have three rows more than there are ids.
VOCAB, HEAD_ROWS = 101, 104


def tiny_model(
    seed: int,
    *,
    family: str = "llama",
    tied: bool = True,
    width: int = 32,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A random model, sharp enough that teacher and student disagree."""
    config = AutoConfig.for_model(
        family,
        vocab_size=HEAD_ROWS,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tiny_lora(seed: int, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same under LoRA adapters whose first update is not zero."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft asks transformers for an attribute by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        spec = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights="gaussian")
        return get_peft_model(tiny_model(seed, dtype=dtype), spec)


def tiny_responses(count: int = 22, *, seed: int = 0) -> list[Response]:
    """Responses whose lengths differ by a factor of ten, so that a wrong normalisation shows."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCAB) for _ in range(draw.randint(low, high)))

    return [
        Response(prompt_id=str(i), author="teacher", prompt_ids=ids(1, 6), response_ids=ids(1, 15), stop="length")
        for i in range(count)
    ]


def tiny_corpus(rows: int = 2, *, weight: float = 0.7, blocks: int = 10, length: int = 12) -> Corpus:
    """Blocks of random ids."""
    ids_NL = torch.randint(3, VOCAB, (blocks, length), generator=torch.Generator().manual_seed(4))
    return Corpus(blocks_NL=ids_NL, weight=weight, rows=rows, seed=0)


def tiny_teacher(*, width: int = 48, dtype: torch.dtype = torch.float32) -> LocalTeacher:
    """A wider model than the student."""
    model = tiny_model(7, width=width, tied=False, dtype=dtype)
    return LocalTeacher(model, head_of(model, VOCAB))


def settings(**changes: Any) -> TrainSection:
    """Five optimizer steps of eight rows over two epochs of which the last step is short."""
    chosen: dict[str, Any] = {
        "max_steps": 5,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "compile": "off",
        "save_steps": 1000,
    }
    return TrainSection(**(chosen | changes))


def play(
    student: nn.Module,
    folder: Path,
    chosen: TrainSection,
    *,
    responses: Sequence[Response] | None = None,
    author: SourceFactory | None = None,
    teacher: SignalSource | None = None,
    objective: AnyObjective | None = None,
    loss_plan: LossPlan | None = None,
    weighting: TokenWeighting | None = None,
    temperature: float | Temperature = 2.0,
    heldout: Sequence[Response] = (),
    development: Mapping[int, Response] = MappingProxyType({}),
    corpus: Corpus | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> nn.Module:
    """Train through the public door, with checkpoints and metrics in `folder`."""
    return train(
        student,
        author or offline(tiny_responses() if responses is None else responses),
        teacher or tiny_teacher(),
        loss_plan or LossPlan(objective=objective or build_objective("fkl")),
        temperature=temperature if isinstance(temperature, Temperature) else Temperature(loss=temperature),
        weighting=weighting,
        heldout=heldout,
        development=development,
        corpus=corpus,
        settings=chosen,
        vocab_size=VOCAB,
        pad_id=0,
        context=LoopContext(
            learning_rate=folder / "learning_rate.json",
            checkpoints=folder / "checkpoints",
            metrics=folder / "metrics.jsonl",
            should_stop=should_stop,
        ),
    )


def play_evaluated(folder: Path, chosen: TrainSection, **how: Any) -> nn.Module:
    """Train on all responses but the last four, which are set aside to choose the best student by."""
    responses = tiny_responses()
    aside = dict(enumerate(responses[-4:], start=len(responses) - 4))
    return play(tiny_model(1), folder, chosen, responses=responses[:-4], temperature=1.0, development=aside, **how)


class FailingTeacher:
    """Judges like the tiny teacher until its `last` call is over; then raises, or says NaN."""

    def __init__(self, last: int, *, nan: bool = False):
        self.teacher, self.left, self.nan = tiny_teacher(), last, nan
        self.shapes: list[tuple[int, ...]] = []

    def signal(self, batch: TokenBatch) -> DenseSignal:
        self.left -= 1
        self.shapes.append(tuple(batch.input_ids_BT.shape))
        signal = self.teacher.signal(batch)
        if self.left >= 0:
            return signal
        if not self.nan:
            raise ConnectionAbortedError("killed")
        return replace(signal, hidden_ND=torch.full_like(signal.hidden_ND, float("nan")))


def stop_after(step: int) -> Callable[[], bool]:
    """Wish to stop when asked for the `step`-th time."""
    asked = iter(range(1, 1_000_000))
    return lambda: next(asked) == step


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between any two weights of the same name."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether all bits agree."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def slowly(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[str]:
    """Write the files of checkpoints late; returns the threads that wrote."""
    threads: list[str] = []

    def late(*given: object) -> None:
        time.sleep(seconds)
        threads.append(threading.current_thread().name)
        save_file(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_files, "save_file", late)
    return threads
