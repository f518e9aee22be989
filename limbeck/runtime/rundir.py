"""The run directory: its files, the lock, and one manifest per finished stage.

    recipe.resolved.yaml  provenance.json  prompts.jsonl  images/  responses/  signal/  checkpoints/  rounds/
    signal-windows/  metrics.jsonl  student/  preferences/  preferred/  scores/  scores.json  samples.jsonl
    report.html  report.svg  stages/NAME.json

A stage is done when its manifest says so; the manifest holds the fingerprint of everything the stage read and the hash
of every file it wrote (`outputs`). A file appears under its final name only when it is whole, so a kill at any time
leaves finished things finished.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from limbeck.runtime.files import write_json
from limbeck.runtime.folders import partial_in, remove
from limbeck.runtime.locks import exclusive
from limbeck.runtime.records import read_fields, read_sealed, sealed
from limbeck.types import Json


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The folder of a run and the paths of its files."""

    root: Path

    @property
    def prompts(self) -> Path:
        return self.root / "prompts.jsonl"

    @property
    def problems(self) -> Path:
        """How the answer to each prompt is checked, where the prompts are problems (prompts.task)."""
        return self.root / "problems.jsonl"

    @property
    def images(self) -> Path:
        """The images of prompts, a file each under the hash of its bytes."""
        return self.root / "images"

    @property
    def responses(self) -> Path:
        return self.root / "responses"

    @property
    def signal(self) -> Path:
        return self.root / "signal"

    @property
    def signal_windows(self) -> Path:
        """The teacher's signals of the steps that come next, where the whole signal is not kept."""
        return self.root / "signal-windows"

    @property
    def blocks_before(self) -> Path:
        """The choice of the student's blocks, where the stage teach needed the student."""
        return self.root / "blocks.teach.json"

    @property
    def asked(self) -> Path:
        """Answers of a served teacher that are on their way into the signal."""
        return self.root / "asked"

    def paid(self, teacher: str = "") -> Path:
        """What a hosted teacher was paid, and for what; of one of several teachers by its name. It outlives the run's
        stages."""
        return self.root / (f"paid-{teacher}.jsonl" if teacher else "paid.jsonl")

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def start(self) -> Path:
        """The student before training, where ranks read their parts of it and no other files hold it."""
        return self.checkpoints / "start"

    @property
    def rounds(self) -> Path:
        return self.root / "rounds"

    @property
    def engine(self) -> Path:
        """The student's weights for the servers that write its responses, while it trains."""
        return self.root / "engine"

    @property
    def examples(self) -> Path:
        return self.rounds / "examples.jsonl"

    @property
    def sft_metrics(self) -> Path:
        return self.root / "metrics.sft.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def corpus(self) -> Path:
        """The text of train.lm as blocks of token ids."""
        return self.root / "lm.safetensors"

    @property
    def learning_rate(self) -> Path:
        """Searches for the learning rate, one file per training without a rate of its own."""
        return self.root / "learning_rate"

    @property
    def student(self) -> Path:
        return self.root / "student"

    @property
    def preferences(self) -> Path:
        """Preference pairs, and what they and the tuning on them were made from."""
        return self.root / "preferences"

    @property
    def preferred(self) -> Path:
        """The student after preference tuning."""
        return self.root / "preferred"

    @property
    def finished_student(self) -> Path:
        """The student that the run hands on: the one after preference tuning, where there was one."""
        return self.preferred if self.done("prefer") else self.student

    @property
    def scores(self) -> Path:
        return self.root / "scores"

    @property
    def samples(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def picture(self) -> Path:
        return self.root / "report.svg"

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.resolved.yaml"

    @property
    def lock(self) -> Path:
        """Locked by the run; the first rank of a launch also touches it, to show that it is alive."""
        return self.root / ".lock"

    def sign_of(self, rank: int) -> Path:
        """Touched by another rank of a launch while it is alive."""
        return self.root / ".ranks" / str(rank)

    @property
    def last_word(self) -> Path:
        """What the first rank of a launch ended with, where that was an error."""
        return self.root / ".ranks" / "ended"

    def manifest_path(self, stage: str) -> Path:
        return self.root / "stages" / f"{stage}.json"

    def manifest(self, stage: str) -> Json | None:
        """The record of a stage that is finished, or begun (see `finished`); None where there is none."""
        path = self.manifest_path(stage)
        if not path.exists():
            return None
        read_fields(path, {"fingerprint": str, "done": bool, "seconds": (int, float)})
        return read_sealed(path)

    def write_manifest(self, stage: str, record: Json) -> None:
        """Write the record of a stage."""
        write_json(self.manifest_path(stage), sealed(record))

    def done(self, stage: str) -> bool:
        """Whether the stage is done, for any inputs."""
        record = self.manifest(stage)
        return record is not None and record["done"]

    def finished(self, stage: str, fingerprint_: str) -> bool:
        """Whether the stage is done for exactly these inputs."""
        record = self.manifest(stage)
        return record is not None and record["done"] and record["fingerprint"] == fingerprint_

    def begun(self, stage: str, fingerprint_: str) -> bool:
        """Whether the stage is being made from exactly these inputs."""
        record = self.manifest(stage)
        return record is not None and not record["done"] and record["fingerprint"] == fingerprint_

    @contextmanager
    def locked(self, warn: Callable[[str], None]) -> Iterator[None]:
        """Keep a second run out of the directory. The lock dies with the process, so a kill never leaves it behind.

        Args:
            warn: called where the file system has no locks.
        """
        remedy = "wait for it, or give this one its own output_dir=..."
        with exclusive(self.root, remedy=remedy, warn=warn, who="run"):
            yield

    def remove_partial_files(self) -> None:
        """Remove what a killed run left half written. Only under the lock: a living run's files look the same."""
        for left in partial_in(self.root):
            remove(left)

    def set_aside(self, stage: str, outputs: tuple[Path, ...]) -> Path | None:
        """Move the outputs of a superseded stage to superseded/, so that nothing finished is lost.

        Safe to kill: the manifest is marked as not done before the first move and goes last, so that what remains is
        never taken for a finished stage, nor for the beginning of another one.

        Returns:
            where they are now; None where there was nothing.
        """
        present = [path for path in outputs if path.exists()]
        record = self.manifest(stage)
        if not present and record is None:
            return None
        target = self._superseded(f"{stage}-{record['fingerprint'][:8] if record else 'unknown'}")
        if record is not None:
            write_json(target / f"{stage}.json", sealed(record))
            self.write_manifest(stage, record | {"done": False})
        target.mkdir(parents=True, exist_ok=True)
        for path in present:
            path.replace(target / path.name)
        self.manifest_path(stage).unlink(missing_ok=True)
        return target

    def set_files_aside(self, stage: str, names: Iterable[str]) -> Path | None:
        """Move damaged files of a stage to superseded/, by their names below the run directory.

        Returns:
            where they are now; None where none was there.
        """
        present = [name for name in names if os.path.lexists(self.root / name)]
        if not present:
            return None
        target = self._superseded(f"{stage}-damaged")
        for name in present:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).replace(target / name)
        return target

    def _superseded(self, what: str) -> Path:
        """The path of a new folder for files that are set aside."""
        name = f"{what}-{time.strftime('%Y%m%dT%H%M%S')}"
        folder, number = self.root / "superseded", 1
        while (folder / name).exists():
            number += 1
            name = f"{name.partition('_')[0]}_{number}"
        return folder / name
