"""The quickstart's algorithm in one file, without limbeck's abstractions: the tutorial, and a check on the package.

    python examples/distil_flat.py TEACHER_DIRECTORY PROMPTS.jsonl OUTPUT_DIRECTORY

A teacher answers prompts; a copy of it with fewer blocks is trained to give the teacher's distribution at every token
of those answers (forward KL). The settings are the quickstart's. What limbeck adds: it never holds the logits of a
batch, keeps the teacher's hidden states, measures which blocks to cut, resumes after a kill, evaluates, and reports.

Shapes: B rows, T time, N answer tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 1.0
BATCH = 2
EPOCHS = 2
LEARNING_RATE = 2.2e-4  # what limbeck finds for this pair by short trials
WARMUP = 20
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "max_new_tokens": 96}
WINDOW = 32  # batches whose rows are sorted by length together, so that padding costs little

Row = tuple[list[int], list[int]]  # ids of the prompt, ids of the answer


def answer(teacher: Any, tokenizer: Any, prompts: Sequence[str]) -> list[Row]:
    """Sample an answer to every prompt. The ids that come out are the ids that are trained on."""
    rows = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        sampled = teacher.generate(torch.tensor([ids]), **SAMPLING)
        rows.append((ids, sampled[0, len(ids) :].tolist()))
    return rows


def cut(teacher: Any, keep: Sequence[int]) -> Any:
    """A copy of the teacher with only some of its blocks. Its embeddings stay as they are."""
    student: Any = copy.deepcopy(teacher)
    student.model.layers = nn.ModuleList(student.model.layers[i] for i in keep)
    for i, layer in enumerate(list[Any](student.model.layers)):
        layer.self_attn.layer_idx = i  # where the block's keys and values lie in the cache
    student.config.num_hidden_layers = len(keep)
    student.get_input_embeddings().requires_grad_(False)
    student.get_output_embeddings().requires_grad_(False)
    return student


def batches(rows: Sequence[Row], epoch: int, seed: int = 0) -> Iterator[list[Row]]:
    """Random batches of rows of similar length."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(rows), generator=generator).tolist()
    found: list[list[int]] = []
    for start in range(0, len(order), WINDOW * BATCH):
        block = sorted(order[start : start + WINDOW * BATCH], key=lambda i: -len(rows[i][0] + rows[i][1]))
        found += [block[i : i + BATCH] for i in range(0, len(block), BATCH)]
    for i in torch.randperm(len(found), generator=generator).tolist():
        yield [rows[j] for j in found[i]]


def pad(batch: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Input ids (B, T), padded on the right, and where the next id belongs to the answer (B, T)."""
    width = max(len(prompt) + len(reply) for prompt, reply in batch) - 1
    ids_BT = torch.zeros((len(batch), width), dtype=torch.long)
    mask_BT = torch.zeros((len(batch), width), dtype=torch.bool)
    for i, (prompt, reply) in enumerate(batch):
        ids = (prompt + reply)[:-1]
        ids_BT[i, : len(ids)] = torch.tensor(ids)
        mask_BT[i, len(prompt) - 1 : len(ids)] = True
    return ids_BT, mask_BT


def loss(student: Any, teacher: Any, batch: Sequence[Row]) -> Tensor:
    """Forward KL at the temperature, times its square, averaged over the answer tokens of the batch."""
    ids_BT, mask_BT = pad(batch)
    student_NV = student(ids_BT).logits[mask_BT] / TEMPERATURE
    with torch.no_grad():
        teacher_NV = teacher(ids_BT).logits[mask_BT] / TEMPERATURE
    kl_NV = F.kl_div(student_NV.log_softmax(-1), teacher_NV.log_softmax(-1), log_target=True, reduction="none")
    return TEMPERATURE**2 * kl_NV.sum(-1).mean()


def rate(step: int, total: int) -> float:
    """The share of the learning rate at a step: a line up, then half a cosine down."""
    if step < WARMUP:
        return step / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (total - WARMUP)))


def train(student: Any, teacher: Any, rows: Sequence[Row], steps: int | None = None) -> Iterator[float]:
    """One optimizer step after another; yields their losses."""
    matrices = [p for p in student.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in student.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    total = steps or EPOCHS * math.ceil(len(rows) / BATCH)
    step = 0
    while True:
        for batch in batches(rows, epoch=step // math.ceil(len(rows) / BATCH)):
            if step == total:
                return
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * rate(step + 1, total + 1)
            value = loss(student, teacher, batch)
            value.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            yield value.item()


def main(teacher_directory: str, prompts_file: str, output: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(teacher_directory)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_directory, dtype=torch.float32).eval()
    prompts = [json.loads(line)["prompt"] for line in Path(prompts_file).read_text("utf-8").splitlines()]
    rows = answer(teacher, tokenizer, prompts)
    blocks = teacher.config.num_hidden_layers
    # Blocks in the middle change least: keep the ends, and every other one between.
    keep = sorted({*range(blocks // 3), *range(blocks // 3, 2 * blocks // 3, 3), *range(2 * blocks // 3, blocks)})
    student = cut(teacher, keep)
    for step, value in enumerate(train(student, teacher, rows), start=1):
        print(f"step {step}: {value:.4f}")
    student.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
