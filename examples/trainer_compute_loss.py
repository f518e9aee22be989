"""Distillation inside a transformers Trainer (or a TRL trainer built on it): only `compute_loss` changes.

    python examples/trainer_compute_loss.py STUDENT_DIRECTORY TEACHER_DIRECTORY CONVERSATIONS.jsonl OUTPUT_DIRECTORY

The rows carry `labels` with -100 on everything that is no answer, as every supervised fine-tuning collator makes them.
The loss is half cross-entropy, half Jensen-Shannon divergence at temperature 2, over the answer tokens alone, and the
logits of a batch never exist. For one process: a Trainer under DDP averages gradients over the ranks, so there the loss
must be multiplied by their number.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from limbeck.models.heads import decoder_of, head_of
from limbeck.objectives import Temperature, build_objective, fused_distillation_loss
from limbeck.types import DenseSignal

OBJECTIVE = build_objective("sum", parts=[{"name": "ce", "weight": 0.5}, {"name": "js", "weight": 0.5}])
TEMPERATURE = Temperature(loss=2.0)


class DistillationTrainer(Trainer):
    """A Trainer whose loss compares the student with a teacher."""

    def __init__(self, *args: Any, teacher: nn.Module, vocab_size: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.teacher, self.vocab_size = teacher.eval().requires_grad_(False), vocab_size
        # Once with a look at whether it gives the model's own logits; each step then takes it as it is.
        self.teacher_head = head_of(self.teacher, vocab_size)
        assert isinstance(self.model, nn.Module)
        head_of(self.model, vocab_size)
        # The loss is a mean over the answer tokens of the whole step, which compute_loss divides by itself.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch=None
    ):
        label_BT = inputs["labels"][:, 1:]
        answer_BT = label_BT != -100
        asked = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        student_BTD = decoder_of(model)(**asked, use_cache=False).last_hidden_state
        with torch.no_grad():
            teacher_BTD = decoder_of(self.teacher)(**asked, use_cache=False).last_hidden_state
        tokens = int(answer_BT.sum())
        counted = tokens if num_items_in_batch is None else float(num_items_in_batch)
        loss = fused_distillation_loss(
            student_BTD[:, :-1][answer_BT],
            head_of(model, self.vocab_size, verify=False),
            DenseSignal(hidden_ND=teacher_BTD[:, :-1][answer_BT], head=self.teacher_head),
            OBJECTIVE,
            temperature=TEMPERATURE,
            weight_N=torch.full((tokens,), 1.0 / max(counted, 1.0), device=student_BTD.device),
            label_N=label_BT[answer_BT],
        ).loss
        return (loss, {}) if return_outputs else loss


def rows_of(path: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Input ids and labels of conversations: one JSON object a line, with `messages` that end with the answer."""
    rows = []
    for line in path.read_text("utf-8").splitlines():
        messages = json.loads(line)["messages"]
        asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        answer = tokenizer(messages[-1]["content"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": [*asked, *answer], "labels": [-100] * len(asked) + answer})
    return rows


def distil(
    student_dir: str, teacher_dir: str, conversations: Path, output: Path, **arguments: Any
) -> DistillationTrainer:
    """Train the student of one directory on the teacher of another; save it; give the trainer back."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(student_dir),
        args=TrainingArguments(str(output), remove_unused_columns=False, report_to=[], save_strategy="no", **arguments),
        train_dataset=rows_of(conversations, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        teacher=AutoModelForCausalLM.from_pretrained(teacher_dir),
        vocab_size=len(tokenizer),
    )
    trainer.train()
    trainer.save_model(str(output))
    return trainer


if __name__ == "__main__":
    distil(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), num_train_epochs=1, learning_rate=3e-4)
