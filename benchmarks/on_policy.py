"""A training step on the student's own responses, beside TRL's DistillationTrainer.

    python -m benchmarks.on_policy
    python -m benchmarks.on_policy --rounds 3       limbeck alone: responses written for each step, or for 3 epochs

SmolLM2-135M-Instruct teaches its own first and last nine blocks: reverse KL at temperature 1, batch 8, 64 new tokens,
sampled from the whole distribution, AdamW in float32, the same prompts. An untrained student never ends an answer, so
every step writes and trains on 512 tokens on both sides. Each measurement is a process of its own; the sides take
turns, and medians over the repeats are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from limbeck.runtime.memory import peak_device_memory_mib, peak_memory_mib, reset_peak_memory
from limbeck.runtime.spin_waits import short_spins_when_busy

METHODS = ("limbeck", "trl DistillationTrainer")
# Prompts of a round; with a batch of 8 an epoch of them is 4 steps.
ROUND_PROMPTS = 32
WARM_UP_STEPS = 2
KEEP = (*range(9), *range(21, 30))
NEW_TOKENS = 64
# Of both sides: a search of it would take many times as long as what is measured.
LEARNING_RATE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="measured optimizer steps")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, help="compare with responses that are used for so many epochs")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda trains in bfloat16")
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds:
        print(json.dumps(in_rounds(arguments.batch, arguments.rounds)))
        return
    if arguments.method:
        print(json.dumps(measure(arguments)))
        return
    found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for repeat in range(arguments.repeats):
        for method in METHODS:
            found[method].append(in_process(arguments, method))
            print(f"repeat {repeat + 1}, {method}: {found[method][-1]}", file=sys.stderr, flush=True)
    text = table(found)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, "utf-8")


def in_process(arguments: argparse.Namespace, method: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.on_policy", "--method", method]
    command += ["--steps", str(arguments.steps), "--batch", str(arguments.batch), "--device", arguments.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    method = trl if arguments.method.startswith("trl") else limbeck
    # As every run of limbeck has it.
    with nullcontext() if method is trl else short_spins_when_busy():
        seconds, tokens = method(arguments.batch, arguments.steps + WARM_UP_STEPS, device=arguments.device)
    kept = seconds[WARM_UP_STEPS:]
    return {
        "step_s": statistics.median(kept),
        "tokens_per_s": sum(tokens[WARM_UP_STEPS:]) / sum(kept),
        "peak_mib": peak_device_memory_mib() or peak_memory_mib(),
    }


def table(found: dict[str, list[dict[str, float]]]) -> str:
    medians = {m: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for m, runs in found.items()}
    theirs = medians[METHODS[1]]
    lines = [
        "| method | tokens/s, median (min to max) | of TRL | step, s | peak memory, MiB | of TRL |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for method, median in medians.items():
        rates = [run["tokens_per_s"] for run in found[method]]
        lines.append(
            f"| {method} | {median['tokens_per_s']:.0f} ({min(rates):.0f} to {max(rates):.0f}) "
            f"| {median['tokens_per_s'] / theirs['tokens_per_s']:.2f} | {median['step_s']:.2f} "
            f"| {median['peak_mib']:.0f} | {median['peak_mib'] / theirs['peak_mib']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def pair(device: str) -> tuple[Any, Any, list[Any]]:
    """The teacher, the student, and the prompts."""
    import copy

    import torch

    from limbeck.prompts.sources import load_prompts
    from limbeck.student.blocks import depth_prune
    from limbeck.teachers.base import TeacherModel
    from limbeck.teachers.in_process import InProcess

    teacher = InProcess().open(TeacherModel(model="smollm2-135m-instruct"), device=torch.device(device), progress=None)
    copied: Any = copy.deepcopy(teacher.weights().model)
    student: Any = depth_prune(copied, KEEP)
    student.to(device)
    prompts = load_prompts("builtin", heldout_fraction=0.1, split_seed=0).of("train")
    return teacher, student, list(prompts)


def in_rounds(batch: int, epochs: int) -> dict[str, float]:
    """Seconds of a step, all that was written for it included: by step, and in the second of two rounds."""
    refresh = epochs * -(-ROUND_PROMPTS // batch)
    fresh, _ = limbeck(batch, WARM_UP_STEPS + 6)
    rounds, _ = limbeck(batch, 2 * refresh, refresh=refresh)
    per_step, per_round = statistics.mean(fresh[WARM_UP_STEPS:]), statistics.mean(rounds[refresh:])
    return {"by step, s": per_step, "in rounds, s": per_round, "ratio": per_step / per_round}


def limbeck(batch: int, steps: int, *, refresh: int = 1, device: str = "cpu") -> tuple[list[float], list[int]]:
    from itertools import pairwise

    from limbeck.models.vocabulary import real_vocab_size
    from limbeck.objectives import Temperature, build_objective
    from limbeck.pipeline.cached_teacher import CachedTeacher
    from limbeck.prompts.templates import encode_prompts, end_token_ids
    from limbeck.recipe.sections import TrainSection
    from limbeck.rollouts.rounds import Rounds
    from limbeck.rollouts.student import RolloutConfig, StudentSource
    from limbeck.sampling.local import LocalSampler
    from limbeck.teachers.store.base import Frame
    from limbeck.teachers.store.dense import Hidden
    from limbeck.training.loop import train
    from limbeck.training.loss import LossPlan
    from limbeck.training.metrics import LoopContext
    from limbeck.types import Sampling

    teacher, student, prompts = pair(device)
    vocab_size = real_vocab_size(teacher.tokenizer)
    sampler = LocalSampler(
        model=student,
        eos_token_ids=end_token_ids(teacher.tokenizer, "chat"),
        pad_token_id=teacher.tokenizer.pad_token_id,
        vocab_size=vocab_size,
        author="student",
    )
    asked = encode_prompts(prompts, teacher.tokenizer, "chat")
    if refresh > 1:
        asked = asked[:ROUND_PROMPTS]
    frame = Frame(vocab_size=vocab_size, width=teacher.state_width, temperatures=(1.0,))
    teacher_signals = CachedTeacher(teacher=teacher, codec=Hidden(), frame=frame)
    reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        rollout = RolloutConfig(
            sampler=sampler,
            sampling=Sampling(max_new_tokens=NEW_TOKENS),
            rounds=Rounds(folder=Path(folder) / "rounds", signal_cache=teacher_signals),
            refresh=refresh,
        )
        metrics = Path(folder) / "metrics.jsonl"
        train(
            student,
            lambda source_context: StudentSource(asked, rollout, source_context),
            teacher_signals,
            LossPlan(objective=build_objective("rkl"), authored=True),
            temperature=Temperature(),
            settings=TrainSection(
                per_device_train_batch_size=batch,
                max_steps=steps,
                save_steps=10**9,
                learning_rate=LEARNING_RATE,
                bf16=device == "cuda",
            ),
            vocab_size=vocab_size,
            pad_id=0,
            context=LoopContext(
                learning_rate=Path(folder) / "learning_rate.json",
                checkpoints=Path(folder) / "checkpoints",
                metrics=metrics,
            ),
        )
        lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    print("writing", [line["writing_seconds"] for line in lines], file=sys.stderr)
    seconds = [b - a for a, b in pairwise([0.0, *(line["seconds"] for line in lines)])]
    return seconds, [b - a for a, b in pairwise([0, *(line["tokens"] for line in lines)])]


def trl(batch: int, steps: int, *, device: str = "cpu") -> tuple[list[float], list[int]]:
    import warnings

    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    warnings.simplefilter("ignore")
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    teacher, student, prompts = pair(device)
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *unused: Any, **also: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *unused: Any, **also: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder,
            use_cpu=device == "cpu",
            bf16=device == "cuda",
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            per_device_train_batch_size=batch,
            max_steps=steps,
            max_completion_length=NEW_TOKENS,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=1.0,
            learning_rate=LEARNING_RATE,
            logging_steps=1,
            seed=0,
            disable_tqdm=True,
        )
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher.weights().model,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": p.text}] for p in prompts]}),
            processing_class=teacher.tokenizer,
            callbacks=[Clock()],
        )
        reset_peak_memory()
        torch.manual_seed(0)
        trainer.train()
    lengths = [log["completions/mean_length"] for log in trainer.state.log_history if "completions/mean_length" in log]
    return seconds, [round(batch * length) for length in lengths]


if __name__ == "__main__":
    main()
