"""Training and sampling beside busy processes, as shares of the speed that the same process has alone.

    python -m benchmarks.contention --run runs/quickstart

Four processes are started once and take turns: limbeck's training step and sampler, TRL's GKDTrainer and
``model.generate``. In each round each of them works alone, beside one and beside two single-threaded processes that
compute without end; the other three wait. Shares are of medians over the rounds. What else runs on the
machine spoils a turn: one in which it took more than `--others` of a core is done again, some times, and what it
took in the turn that counts is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import psutil

from limbeck.runtime.spin_waits import short_spins_when_busy

METHODS = ("limbeck, training", "TRL GKDTrainer", "limbeck, sampling", "model.generate")
BUSY = (0, 1, 2)
PROMPTS, NEW_TOKENS = 8, 16
# Answers of nearly one length, so that all steps are alike.
ALIKE = 32
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description="Training and sampling beside busy processes.")
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="a run with responses and signal")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps, or batches of the sampler, in a turn")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--others", type=float, default=0.1, help="cores that other processes may take in a turn")
    parser.add_argument("--tries", type=int, default=2, help="turns at most, until others took less")
    parser.add_argument("--methods", default=";".join(METHODS), help="some of them, with ; between")
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    methods = arguments.methods.split(";")
    workers = {method: Worker(arguments, method) for method in methods}
    found: dict[str, dict[int, list[float]]] = {method: {busy: [] for busy in BUSY} for method in methods}
    for turn in range(arguments.rounds):
        for busy in BUSY:
            for method, worker in workers.items():
                rate, others = undisturbed(worker, busy, arguments)
                found[method][busy].append(rate)
                said = (
                    f"round {turn + 1}, {busy} busy, {method}: {60 * rate:.1f} per min, others took {others:.2f} cores"
                )
                print(said, file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.close()
    text = table(found)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, "utf-8")


def table(found: dict[str, dict[int, list[float]]]) -> str:
    lines = [
        "| | alone, per min (min to max) | beside one | share | beside two | share |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for method, by_busy in found.items():
        alone = statistics.median(by_busy[0])
        cells = [f"{60 * alone:.1f} ({60 * min(by_busy[0]):.1f} to {60 * max(by_busy[0]):.1f})"]
        for busy in BUSY[1:]:
            rates = by_busy[busy]
            share = [f"{rate / alone:.0%}" for rate in (statistics.median(rates), min(rates), max(rates))]
            cells += [f"{60 * statistics.median(rates):.1f}", f"{share[0]} ({share[1]} to {share[2]})"]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def undisturbed(worker: Worker, busy: int, arguments: argparse.Namespace) -> tuple[float, float]:
    """Steps per second beside so many busy processes, and the cores that others took: of the least disturbed turn."""
    turns = []
    for _ in range(arguments.tries):
        with busy_processes(busy) as mine:
            mine = [psutil.Process(), psutil.Process(worker.process.pid), *(psutil.Process(one.pid) for one in mine)]
            # A loop that adapts to its neighbours is given the time to notice them.
            worker.rate(1)
            before, used = taken(), sum(used_by(one) for one in mine)
            started = time.perf_counter()
            rate = worker.rate(arguments.steps)
            seconds = time.perf_counter() - started
            others = taken() - before - (sum(used_by(one) for one in mine) - used)
        turns.append((others / seconds, rate))
        if others / seconds <= arguments.others:
            break
    others, rate = min(turns)
    return rate, others


def taken() -> float:
    """CPU seconds of all processes since the machine started."""
    times = psutil.cpu_times()
    return times.user + getattr(times, "nice", 0.0) + times.system


def used_by(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


@contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many processes that compute without end, one thread each."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.3)
        yield others
    finally:
        for other in others:
            other.kill()
            other.wait()


class Worker:
    """A process that does one of the four things on request."""

    def __init__(self, arguments: argparse.Namespace, method: str):
        command = [sys.executable, "-m", "benchmarks.contention", "--worker", method]
        command += ["--run", str(arguments.run), "--batch", str(arguments.batch)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.rate(WARM_UP)

    def rate(self, count: int) -> float:
        """Steps per second over so many steps."""
        print(count, file=self._pipe(self.process.stdin), flush=True)
        answer = self._pipe(self.process.stdout).readline()
        if not answer:
            raise SystemExit(f"{' '.join(map(str, self.process.args))} has ended")  # type: ignore[arg-type]
        return count / json.loads(answer)

    def close(self) -> None:
        self._pipe(self.process.stdin).close()
        self.process.wait()

    def _pipe(self, pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def steps_on_request() -> Callable[[], bool]:
    """What a loop calls once a step: waits until the parent wants steps, tells it their seconds, True at the end."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    left, started = 0, 0.0

    def asked_to_stop() -> bool:
        nonlocal left, started
        if left:
            left -= 1
            if left:
                return False
            print(time.perf_counter() - started, file=answers, flush=True)
        wanted = sys.stdin.readline()
        if not wanted:
            return True
        left, started = int(wanted), time.perf_counter()
        return False

    return asked_to_stop


def work(arguments: argparse.Namespace) -> None:
    asked_to_stop = steps_on_request()
    # As every run of limbeck has it.
    with short_spins_when_busy() if arguments.worker.startswith("limbeck") else nullcontext():
        repeat(arguments, asked_to_stop)


def repeat(arguments: argparse.Namespace, asked_to_stop: Callable[[], bool]) -> None:
    """Train or sample until asked to stop."""
    if arguments.worker in METHODS[:2]:
        from benchmarks import train_step
        from limbeck.types import Interrupted

        settings = argparse.Namespace(
            run=arguments.run, batch=arguments.batch, steps=10**6, alike=ALIKE, method="limbeck, stored signal"
        )
        side = train_step.limbeck if arguments.worker == METHODS[0] else train_step.trl
        try:
            side(settings, asked_to_stop)
        except Interrupted:
            return
    else:
        sample(arguments, asked_to_stop)


def sample(arguments: argparse.Namespace, asked_to_stop: Callable[[], bool]) -> None:
    """Answers to the same prompts again and again, by the run's teacher."""
    from benchmarks.sampling import ours, theirs
    from limbeck.api import load
    from limbeck.models.loading import load_model
    from limbeck.models.vocabulary import real_vocab_size
    from limbeck.prompts.sources import load_prompts
    from limbeck.prompts.templates import encode_prompts
    from limbeck.sampling.local import LocalSampler
    from limbeck.types import Sampling

    teacher: Any = load_model(load(str(arguments.run)).teacher.model, dtype="float32")
    tokenizer = teacher.tokenizer
    prompts = encode_prompts(load_prompts("builtin", heldout_fraction=0.1).prompts[:PROMPTS], tokenizer)
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.8, top_p=0.95)
    eos = tokenizer.eos_token_id
    sampler = LocalSampler(
        model=teacher.model,
        eos_token_ids=(eos,),
        pad_token_id=eos,
        vocab_size=real_vocab_size(tokenizer),
        author="teacher",
    )
    while not asked_to_stop():
        if arguments.worker == METHODS[2]:
            ours(sampler, prompts, sampling)
        else:
            theirs(teacher.model, eos, prompts, sampling, PROMPTS)


if __name__ == "__main__":
    main()
