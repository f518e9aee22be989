"""The example of a Trainer's `compute_loss`: it learns, and its loss is the naive one over the whole step."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from limbeck.objectives import token_values
from tests.tiny_pair import questions, write_model, write_tokenizer


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "trainer_compute_loss.py"
    spec = importlib.util.spec_from_file_location("trainer_compute_loss", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["trainer_compute_loss"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_the_trainer_distils(example: ModuleType, tmp_path: Path) -> None:
    for seed, name in ((0, "teacher"), (1, "student")):
        write_model(tmp_path / name, seed=seed)
    conversations = tmp_path / "conversations.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"It is {i} of them."}]}
        for i, q in enumerate(questions(16))
    ]
    conversations.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    trainer = example.distil(
        str(tmp_path / "student"),
        str(tmp_path / "teacher"),
        conversations,
        tmp_path / "out",
        max_steps=8,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < 0.8 * losses[0]
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_loss_is_the_naive_one(example: ModuleType, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for seed, name in ((0, "teacher"), (1, "student")):
        ids = write_tokenizer(tmp_path / name)
        write_model(tmp_path / name, seed=seed)
    student, teacher = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("student", "teacher"))
    trainer = example.DistillationTrainer(
        model=student,
        args=example.TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True),
        teacher=teacher,
        vocab_size=ids,
    )
    batch = {"input_ids": torch.randint(ids, (3, 12)), "attention_mask": torch.ones(3, 12, dtype=torch.int64)}
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :5] = -100
    loss = trainer.compute_loss(student, batch, num_items_in_batch=torch.tensor(50))
    asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        student_NV, teacher_NV = (m(**asked).logits[:, :-1, :ids].flatten(0, 1) for m in (student, teacher))
    kept = (batch["labels"][:, 1:] != -100).flatten()
    label_N = batch["labels"][:, 1:].flatten()[kept]
    value_N = token_values(
        example.OBJECTIVE, student_NV[kept], teacher_NV[kept], temperature=example.TEMPERATURE, label_N=label_N
    )
    torch.testing.assert_close(loss.detach(), value_N.sum() / 50, rtol=1e-5, atol=1e-6)
