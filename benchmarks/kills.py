"""Trainings of a sharded student that are killed at random moments: 2 ranks, then 1, then 2, beside a straight run.

    python -m benchmarks.kills --times 30            # prints the rows of docs/results/sharded.md

Each time all processes of a launch are killed (-9) at a moment drawn over the time that a straight training takes,
twice, and the third launch ends the training. The tiny pair, 24 steps of four responses, a checkpoint every second
step. The gap is the largest difference of any weight to the training that nothing stopped. Beside it the same with 2
ranks each time, whose students are compared byte by byte with that of a straight training of 2 ranks.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from safetensors.torch import load_file

from tests.limbeck_command import Command, CommandServer, all_end
from tests.tiny_pair import TinyPair

STEPS = 24
# Rounding must not be divided by rounding: AdamW divides a gradient near zero by its own size.
TRAIN = {"max_steps": STEPS, "save_steps": 2, "logging_steps": 1, "adam_epsilon": 1e-4, "learning_rate": 1e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.of(Path(folder))
        for sequence in ((2, 1, 2), (2, 2, 2)):
            print(bench.row(sequence, options.times, random.Random(options.seed)), flush=True)
        bench.limbeck.close()


class Bench:
    """The recipe, the run up to its training, and the straight trainings by number of ranks."""

    def __init__(self, folder: Path, limbeck: CommandServer, recipe: Path):
        self.folder, self.limbeck, self.recipe = folder, limbeck, recipe
        self.taught = folder / "taught"
        require(limbeck.run("teach", recipe, f"output_dir={self.taught}").code == 0, "the run up to its training ends")
        self.straight: dict[int, Path] = {}
        self.seconds: dict[int, float] = {}
        for ranks in (1, 2):
            self.straight[ranks] = self.begun(f"straight-{ranks}")
            began = time.monotonic()
            all_end(self.launched(self.straight[ranks], ranks))
            self.seconds[ranks] = time.monotonic() - began

    @classmethod
    def of(cls, folder: Path) -> Bench:
        pair = TinyPair.write(folder)
        recipe = pair.recipe(folder / "run", train=TRAIN)
        return cls(folder, CommandServer(folder / "commands"), recipe)

    def begun(self, name: str) -> Path:
        """A run directory whose training is to begin."""
        return Path(shutil.copytree(self.taught, self.folder / name))

    def launched(self, run: Path, ranks: int) -> list[Command]:
        """The processes of a launch."""
        rows = f"train.per_device_train_batch_size={4 // ranks}"
        changes = (f"output_dir={run}", rows, *(("train.sharding=full",) if ranks > 1 else ()))
        return self.limbeck.launch("train", self.recipe, *changes, ranks=ranks)

    def row(self, sequence: Sequence[int], times: int, dice: random.Random) -> str:
        """What came of so many trainings with kills between launches of these numbers of ranks."""
        gaps, steps, same = [], [], 0
        for number in range(times):
            run = self.begun(f"killed-{'-'.join(map(str, sequence))}-{number}")
            for ranks in sequence[:-1]:
                steps.append(self.killed(run, ranks, dice))
            all_end(self.launched(run, sequence[-1]))
            logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
            require(logged == list(range(1, STEPS + 1)), f"{run} has each step once")
            one, two = self.student(self.straight[sequence[-1] if len(set(sequence)) == 1 else 1]), self.student(run)
            same += one.read_bytes() == two.read_bytes()
            first, second = load_file(one), load_file(two)
            gaps.append(max((first[key] - second[key]).abs().max().item() for key in first))
            shutil.rmtree(run)
        cells = (" → ".join(map(str, sequence)), f"{times}", f"{median(steps):.0f} ({min(steps)} to {max(steps)})")
        return "| " + " | ".join((*cells, f"{max(gaps):.1e}", f"{same} of {times}")) + " |"

    def killed(self, run: Path, ranks: int, dice: random.Random) -> int:
        """Kill a launch at a random moment; the step of the newest checkpoint that it left."""
        processes = self.launched(run, ranks)
        time.sleep(dice.uniform(0.0, self.seconds[ranks]))
        for process in processes:
            process.send(signal.SIGKILL)
        for process in processes:
            process.wait()
        return max((int(p.name.removeprefix("step-")) for p in run.glob("checkpoints/step-*")), default=0)

    @staticmethod
    def student(run: Path) -> Path:
        return run / "student" / "model.safetensors"


def require(met: bool, what: str) -> None:
    if not met:
        raise SystemExit(f"expected that {what}")


if __name__ == "__main__":
    main()
