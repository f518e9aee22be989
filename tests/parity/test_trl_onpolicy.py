"""One step of TRL's on-policy trainers beside one of ours, on the very ids that TRL sampled: loss and all gradients.

Conventions that differ (TRL 1.16):

- Neither multiplies by tau: their factor is `scale="none"` here.
- `GKDTrainer` reads its temperature for sampling alone; its loss is always at temperature 1. `DistillationTrainer` has
  one temperature for both.
- `GKDTrainer` divides by the tokens of the step if asked directly, but `train()` hands it the count of the *data's*
  answers, even where the student has just written others: loss and gradient are off by the ratio of the two counts.
  `DistillationTrainer` counts what was sampled, and so do we.
- TRL pads prompts on the left and lets positions begin before them. With rotary positions that is the same to rounding.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.models.heads import head_of
from limbeck.objectives import build_objective
from limbeck.objectives.temperature import Temperature
from limbeck.rollouts.collate import collate
from limbeck.rollouts.sources import StepCounter, offline
from limbeck.teachers.local import LocalTeacher
from limbeck.training.loop import train
from limbeck.training.loss import LossPlan, StepSettings, StudentLoss
from limbeck.training.metrics import LoopContext
from limbeck.training.weighting import TokenWeighting
from limbeck.types import Response
from tests.tiny_pair import questions, write_model
from tests.training.play import metrics, settings

ROWS = 4
pytestmark = [pytest.mark.filterwarnings("ignore")]
pytest.importorskip("trl")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student and a wider teacher with one tokenizer."""
    folder = tmp_path_factory.mktemp("pair")
    student = load(write_model(folder / "student", layers=2, seed=1))
    with torch.no_grad():
        # So that about half of its answers end before their limit.
        student.get_input_embeddings().weight[2] *= 4.0
    student.save_pretrained(folder / "student")
    return {"student": folder / "student", "teacher": write_model(folder / "teacher", width=48, seed=2)}


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def objective_of(beta: float) -> Any:
    return {0.0: build_objective("fkl"), 1.0: build_objective("rkl")}.get(beta) or build_objective("js", beta=beta)


def ours(
    pair: dict[str, Path], responses: Sequence[Response], beta: float, tau: float, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our gradients of a step, and what the loop logs of it."""
    teacher_model, vocab = load(pair["teacher"]).eval(), len(AutoTokenizer.from_pretrained(pair["student"]))
    teacher = LocalTeacher(teacher_model, head_of(teacher_model, vocab))
    loss_plan = LossPlan(objective=objective_of(beta), authored=True)
    temperature = Temperature(loss=tau, scale="none")
    module = StudentLoss(load(pair["student"]), loss_plan, vocab_size=vocab, projection_ED=None, compile="off")
    by_row = dict(enumerate(responses))
    batch = collate(by_row, tuple(by_row), pad_id=0)
    weights = TokenWeighting().weights(by_row, StepCounter(step=0, total=1), 1)
    weight_N = torch.tensor([weights[row] for row in batch.rows])[batch.sequence_N]
    loss, _, _ = module(batch, teacher.signal(batch), weight_N, StepSettings(temperature=temperature))
    loss.backward()
    train(
        load(pair["student"]),
        offline(responses),
        teacher,
        loss_plan,
        temperature=temperature,
        settings=settings(max_steps=1, per_device_train_batch_size=len(responses)),
        vocab_size=vocab,
        pad_id=0,
        context=LoopContext(
            learning_rate=folder / "learning_rate.json",
            checkpoints=folder / "checkpoints",
            metrics=folder / "metrics.jsonl",
        ),
    )
    (line,) = metrics(folder)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    return gradients(module.student), line


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def norm(grads: dict[str, Tensor]) -> float:
    return float(torch.stack([grad.norm() for grad in grads.values()]).norm())


def assert_same(grads: dict[str, Tensor], line: dict[str, Any], theirs: dict[str, Tensor], loss: float) -> None:
    assert line["loss"] == pytest.approx(loss, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm(theirs), rel=1e-4)
    assert grads.keys() == theirs.keys()
    assert norm({name: grads[name] - theirs[name] for name in grads}) < 1e-4 * norm(theirs)


def responses_of(ids: Tensor, mask: Tensor, scored: Tensor) -> list[Response]:
    """TRL's padded rows as responses: its ids, none made anew."""
    found = []
    for i, (row, real, own) in enumerate(zip(ids, mask.bool(), scored, strict=True)):
        found.append(
            Response(
                prompt_id=str(i),
                author="student",
                prompt_ids=tuple(row[real & ~own].tolist()),
                response_ids=tuple(row[real & own].tolist()),
                stop="eos",
            )
        )
    return found


def shared_config(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "per_device_train_batch_size": ROWS,
        "max_steps": 1,
        "seed": 0,
        "disable_tqdm": True,
    }


@pytest.fixture
def gkd(pair: dict[str, Path], tmp_path: Path) -> Iterator[Any]:
    """Makes a `GKDTrainer` on questions with answers of different lengths."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        def make(**options: Any) -> Any:
            turns = [
                [{"role": "user", "content": q}, {"role": "assistant", "content": "rain and salt " * (i + 1)}]
                for i, q in enumerate(questions(ROWS))
            ]
            return GKDTrainer(
                model=load(pair["student"]),
                teacher_model=load(pair["teacher"]),
                args=GKDConfig(**shared_config(tmp_path / "gkd"), max_new_tokens=12, **options),
                train_dataset=Dataset.from_dict({"messages": turns}),
                processing_class=AutoTokenizer.from_pretrained(pair["student"]),
            )

        yield make


def gkd_step(trainer: Any, num_items: int | None = None) -> tuple[Any, float, dict[str, Tensor]]:
    """A training step up to its gradients: the batch as it was trained on, the loss, the gradients."""
    inputs = trainer.data_collator(list(trainer.train_dataset))
    random.seed(0)
    torch.manual_seed(0)
    # What `train()` sets before its first step.
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, inputs, num_items)
    return inputs, float(loss), gradients(trainer.model)


@pytest.mark.parametrize(("lmbda", "beta"), [(1.0, 0.0), (1.0, 0.5), (1.0, 1.0), (0.0, 0.5)])
def test_a_step_of_gkd(gkd, pair, tmp_path, lmbda, beta):
    # A temperature of sampling alone: the loss is at 1.
    trainer = gkd(lmbda=lmbda, beta=beta, temperature=0.8)
    before = trainer.data_collator(list(trainer.train_dataset))
    inputs, loss, theirs = gkd_step(trainer)
    assert torch.equal(inputs["labels"], before["labels"]) == (lmbda == 0.0)
    responses = responses_of(inputs["input_ids"], inputs["attention_mask"], inputs["labels"] != -100)
    assert len({len(r.response_ids) for r in responses}) > 1
    grads, line = ours(pair, responses, beta, 1.0, tmp_path)
    assert_same(grads, line, theirs, loss)


def test_gkd_in_its_own_loop_divides_by_the_datas_tokens(gkd, pair, tmp_path):
    trainer = gkd(lmbda=1.0, beta=0.5)
    batches = [trainer.data_collator(list(trainer.train_dataset))]
    _, counted = trainer.get_batch_samples(iter(batches), 1, torch.device("cpu"))
    of_data = int((batches[0]["labels"] != -100).sum())
    inputs, loss, theirs = gkd_step(trainer, counted)
    responses = responses_of(inputs["input_ids"], inputs["attention_mask"], inputs["labels"] != -100)
    sampled = sum(len(r.response_ids) for r in responses)
    assert int(counted) == of_data != sampled
    _, line = ours(pair, responses, 0.5, 1.0, tmp_path)
    assert loss * int(counted) / sampled == pytest.approx(line["loss"], rel=1e-5)
    assert norm(theirs) * int(counted) / sampled == pytest.approx(line["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(("beta", "tau"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 1.7)])
def test_a_step_of_the_distillation_trainer(pair, tmp_path, beta, tau):
    from datasets import Dataset
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    prompts = [[{"role": "user", "content": question}] for question in questions(ROWS)]
    trainer: Any = DistillationTrainer(
        model=load(pair["student"]),
        teacher_model=load(pair["teacher"]),
        args=DistillationConfig(
            **shared_config(tmp_path / "trl"), beta=beta, temperature=tau, max_completion_length=12
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(pair["student"]),
    )
    trainer.model.train()
    torch.manual_seed(0)
    inputs = trainer._prepare_inputs([{"prompt": prompt} for prompt in prompts])
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    own = torch.arange(ids.shape[1]) >= inputs["prompt_ids"].shape[1]
    responses = responses_of(ids, mask, own.expand_as(ids))
    assert len({len(r.response_ids) for r in responses}) > 1
    grads, line = ours(pair, responses, beta, tau, tmp_path)
    assert_same(grads, line, gradients(trainer.model), loss.item())
