"""Training speed and memory on the quickstart's pair, beside TRL's GKDTrainer with lmbda=0.

    python -m benchmarks.train_step --run runs/quickstart

Both sides train the same student from the same answers of the same teacher, with the same batch size, length, optimizer
and precision (float32), the teacher beside the student. Each measurement is a process of its own; the sides take turns,
and medians over the repeats are compared. Counted are the tokens that enter the loss. `limbeck, stored signal` is
what a recipe does by default: the teacher's hidden states come from disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from limbeck.runtime.memory import peak_device_memory_mib, peak_memory_mib, reset_peak_memory

METHODS = ("limbeck", "limbeck, stored signal", "trl GKDTrainer")
WARM_UP_STEPS = 2
# Of both sides; the recipe has its own searched for.
LEARNING_RATE = 3e-4


def main() -> None:
    parser = argparse.ArgumentParser(description="Training speed and memory beside TRL's GKDTrainer.")
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="a run with responses and signal")
    parser.add_argument("--steps", type=int, default=8, help="measured optimizer steps")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--alike", type=int, default=0, help="so many answers of nearly one length; 0 for all")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda trains in bfloat16")
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.method:
        print(json.dumps(_measure(arguments)))
        return
    found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for repeat in range(arguments.repeats):
        for method in METHODS:
            found[method].append(_in_process(arguments, method))
            print(f"repeat {repeat + 1}, {method}: {found[method][-1]}", file=sys.stderr, flush=True)
    table = _table(found)
    print(table)
    if arguments.out:
        arguments.out.write_text(table, "utf-8")


def _in_process(arguments: argparse.Namespace, method: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.train_step", "--method", method, "--run", str(arguments.run)]
    command += ["--steps", str(arguments.steps), "--batch", str(arguments.batch), "--device", arguments.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _table(found: dict[str, list[dict[str, float]]]) -> str:
    medians = {
        method: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for method, runs in found.items()
    }
    theirs = medians["trl GKDTrainer"]
    lines = [
        "| method | tokens/s, median (min to max) | of TRL | peak memory, MiB | of TRL |",
        "|---|---:|---:|---:|---:|",
    ]
    for method, median in medians.items():
        rates = [run["tokens_per_s"] for run in found[method]]
        lines.append(
            f"| {method} | {median['tokens_per_s']:.0f} ({min(rates):.0f} to {max(rates):.0f}) "
            f"| {median['tokens_per_s'] / theirs['tokens_per_s']:.2f} | {median['peak_mib']:.0f} "
            f"| {median['peak_mib'] / theirs['peak_mib']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    method = trl if arguments.method == "trl GKDTrainer" else limbeck
    seconds, tokens = method(arguments)
    seconds, tokens = seconds[WARM_UP_STEPS:], tokens[WARM_UP_STEPS : len(seconds)]
    return {"tokens_per_s": sum(tokens) / sum(seconds), "peak_mib": peak_device_memory_mib() or peak_memory_mib()}


def pair(arguments: argparse.Namespace) -> tuple[Any, Any, list[Any]]:
    """The run's context, its initial student and its training answers."""
    from limbeck.api import load
    from limbeck.pipeline.context import RunContext
    from limbeck.pipeline.initial_student import build_initial_student
    from limbeck.pipeline.stages.respond import load_responses

    context = RunContext(load(str(arguments.run)))
    rows = list(load_responses(context, "train").items())
    if arguments.alike:
        middle = statistics.median(response.length for _, response in rows)
        rows = sorted(rows, key=lambda row: abs(row[1].length - middle))[: arguments.alike]
    return context, build_initial_student(context), rows


def limbeck(
    arguments: argparse.Namespace, asked_to_stop: Callable[[], bool] = lambda: False
) -> tuple[list[float], list[int]]:
    """Seconds and tokens of each step. `asked_to_stop` is called once in every step."""
    import tempfile

    from limbeck.models.vocabulary import real_vocab_size
    from limbeck.objectives import Temperature
    from limbeck.pipeline.stages.teach import open_teacher
    from limbeck.recipe.load import objective_of
    from limbeck.rollouts.sources import offline
    from limbeck.training.loop import train
    from limbeck.training.loss import LossPlan
    from limbeck.training.metrics import LoopContext

    context, student, rows = pair(arguments)
    stored = arguments.method.endswith("stored signal")
    context.recipe = replace(context.recipe, teacher=replace(context.recipe.teacher, cache=stored))
    settings = replace(
        context.recipe.train,
        per_device_train_batch_size=arguments.batch,
        max_steps=arguments.steps + WARM_UP_STEPS,
        learning_rate=LEARNING_RATE,
        save_steps=10**9,
        logging_steps=1,
        bf16=arguments.device == "cuda",
    )
    teacher = open_teacher(context)
    reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        train(
            student.model,
            offline([response for _, response in rows]),
            teacher,
            LossPlan(objective=objective_of(context.recipe)),
            temperature=Temperature(),
            settings=settings,
            vocab_size=real_vocab_size(student.tokenizer),
            pad_id=0,
            context=LoopContext(
                learning_rate=Path(folder) / "learning_rate.json",
                checkpoints=Path(folder) / "checkpoints",
                metrics=metrics,
                should_stop=asked_to_stop,
            ),
        )
        lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    ends = [0.0, *(line["seconds"] for line in lines)]
    counts = [0, *(line["tokens"] for line in lines)]
    return [b - a for a, b in pairwise(ends)], [b - a for a, b in pairwise(counts)]


def trl(
    arguments: argparse.Namespace, asked_to_stop: Callable[[], bool] = lambda: False
) -> tuple[list[float], list[int]]:
    """The same of TRL; `asked_to_stop` is called after every step."""
    import tempfile
    import warnings

    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    warnings.simplefilter("ignore")
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    context, student, rows = pair(arguments)
    teacher = context.teacher.weights()
    tokenizer = student.tokenizer
    prompts = {line["id"]: line for line in map(json.loads, (arguments.run / "prompts.jsonl").open(encoding="utf-8"))}
    messages = [
        [
            {"role": "user", "content": prompts[response.prompt_id]["text"]},
            {"role": "assistant", "content": tokenizer.decode(response.response_ids, skip_special_tokens=True)},
        ]
        for _, response in rows
    ]
    ends: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *unused: Any, **also: Any) -> None:
            ends.append(-time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **also: Any) -> None:
            ends[-1] += time.perf_counter()
            if asked_to_stop():
                control.should_training_stop = True

    with tempfile.TemporaryDirectory() as folder:
        config = GKDConfig(
            output_dir=folder,
            use_cpu=arguments.device == "cpu",
            bf16=arguments.device == "cuda",
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            per_device_train_batch_size=arguments.batch,
            max_steps=arguments.steps + WARM_UP_STEPS,
            lmbda=0.0,
            beta=0.0,
            learning_rate=LEARNING_RATE,
            logging_steps=1,
            max_length=512,
            seed=0,
            disable_tqdm=True,
        )
        trainer = GKDTrainer(
            model=student.model,
            teacher_model=teacher.model,
            args=config,
            train_dataset=Dataset.from_dict({"messages": messages}),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        collate = trainer.data_collator

        def counting(examples: list[Any]) -> Any:
            batch = collate(examples)
            tokens.append(int((batch["labels"][:, 1:] != -100).sum()))
            return batch

        trainer.data_collator = counting
        reset_peak_memory()
        torch.manual_seed(0)
        trainer.train()
    return ends, tokens


if __name__ == "__main__":
    main()
