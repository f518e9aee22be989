"""Work that the ranks of a launch share through files of the run directory, without an exchange between processes.

    .ranks/1                    touched by rank 1 while it is alive; holds a random name of its process
    .ranks/work/000001/         a job: what is to be done (job.json), and files that it needs
    .ranks/work/000001/000007   unit 7 of it: made by the rank that takes it, which it names, and touched as it goes on
    .ranks/work/000001/000007.done

Rank 0 posts a job of numbered units. Each rank, rank 0 too, takes the next unit that none has taken, so that a slow one
takes fewer. A unit writes the files that one process would write, under the same names: what is there is never done
again, and who wrote it is not to be seen. A job names the processes that may take part in it, so that one of an earlier
launch, which was killed, is never taken up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from limbeck.runtime import heartbeat
from limbeck.runtime.files import read_json, whole_folder, write_json
from limbeck.runtime.folders import remove
from limbeck.types import Json, LimbeckError

# Without a step of its unit, of a rank that gives signs of life: as long as NCCL waits for an exchange.
STALL_S = 600.0
_POLL_S = 0.05
_TOUCH_S = 1.0


class Share(Protocol):
    """This process's part of a job."""

    @property
    def joins(self) -> bool:
        """Whether this process puts the parts of all together."""
        ...

    def take(self, unit: int) -> bool:
        """Whether this process does a unit; asked just before it, in the order of the units."""
        ...

    def step(self) -> None:
        """Called often while a unit is done."""
        ...

    def finish(self, unit: int) -> None:
        """Called when the files of a unit are whole."""
        ...

    def finished(self, unit: int) -> bool:
        """Whether any rank has finished a unit in this job."""
        ...

    def wait(self) -> None:
        """Wait until the others have finished what they have taken.

        Raises:
            LimbeckError: one of them has ended or hangs; names it.
        """
        ...


@dataclass(frozen=True)
class Everything:
    """All of a job, where there is one process."""

    joins: bool = True

    def take(self, unit: int) -> bool:
        return True

    def step(self) -> None:
        return

    def finish(self, unit: int) -> None:
        return

    def finished(self, unit: int) -> bool:
        return False

    def wait(self) -> None:
        return


EVERYTHING = Everything()


@dataclass(kw_only=True)
class Job:
    """A job that several ranks share, seen from one of them.

    Attributes:
        kind: which of the functions of a stage does it.
        fields: what that needs to know.
        signs: the files that the other ranks touch, by rank.
    """

    folder: Path
    kind: str
    fields: Json
    rank: int
    signs: Mapping[int, Path] = field(default_factory=dict)
    _unit: int | None = None
    _stepped: float = 0.0

    @property
    def joins(self) -> bool:
        return self.rank == 0

    def take(self, unit: int) -> bool:
        try:
            with self._taken(unit).open("x") as file:
                file.write(str(self.rank))
        except (FileExistsError, FileNotFoundError):
            # Another rank's, or the job has ended.
            return False
        self._unit = unit
        return True

    def step(self) -> None:
        now = time.monotonic()
        if self._unit is not None and now - self._stepped > _TOUCH_S:
            self._stepped = now
            with suppress(OSError):
                os.utime(self._taken(self._unit))

    def finish(self, unit: int) -> None:
        # A job that has ended needs no word of it.
        with suppress(FileNotFoundError):
            self._done(unit).touch()
        self._unit = None

    def finished(self, unit: int) -> bool:
        return self._done(unit).exists()

    def wait(self) -> None:
        if not self.joins:
            return
        looks = {unit: _Look(self, unit) for unit in self._open()}
        while looks:
            time.sleep(_POLL_S)
            looks = {unit: look for unit, look in looks.items() if not self.finished(unit)}
            for look in looks.values():
                look.again()

    def _open(self) -> list[int]:
        """The units that are taken and not finished."""
        names = {path.name for path in self.folder.iterdir() if path.name[0].isdigit()}
        return sorted(int(name) for name in names if name.isdigit() and f"{name}.done" not in names)

    def _taken(self, unit: int) -> Path:
        return self.folder / f"{unit:06d}"

    def _done(self, unit: int) -> Path:
        return self.folder / f"{unit:06d}.done"


class _Look:
    """What rank 0 has seen of the rank that does a unit."""

    def __init__(self, job: Job, unit: int):
        self.job, self.unit = job, unit
        text = job._taken(unit).read_text()
        # Empty while its rank is about to write its number.
        self.rank = int(text) if text.isdigit() else None
        self._seen: dict[Path, tuple[int | None, float]] = {}

    def again(self) -> None:
        if self.rank is None:
            self.__init__(self.job, self.unit)
            return
        if self.rank not in self.job.signs:
            raise LimbeckError(f"{self.job.folder} is not this launch's; start the same command again")
        what = f"it has batch {self.unit} of the work {self.job.kind!r}"
        if self._unchanged(self.job.signs[self.rank]) > heartbeat.LIMIT_S:
            raise LimbeckError(
                f"rank 0 has seen no sign of rank {self.rank} for {heartbeat.LIMIT_S:.0f} s ({what}), so that one has "
                "ended; look at what it said, and start the same command again: nothing finished is lost"
            )
        if self._unchanged(self.job._taken(self.unit)) > STALL_S:
            raise LimbeckError(
                f"rank {self.rank} lives and has not gone on for {STALL_S:.0f} s ({what}); look at its device, and "
                "start the same command again: nothing finished is lost"
            )

    def _unchanged(self, path: Path) -> float:
        """Seconds in which a file was not touched, since this look began."""
        now, touched = time.monotonic(), heartbeat.touched(path)
        last, since = self._seen.get(path, (touched, now))
        self._seen[path] = (touched, since if touched == last else now)
        return now - self._seen[path][1]


class Work(Protocol):
    """Where rank 0 posts the jobs of a run."""

    def posted(
        self, kind: str, fields: Json, put: Callable[[Path], object] | None = None
    ) -> AbstractContextManager[Share]:
        """A job that the other ranks share inside of the block."""
        ...


@dataclass(frozen=True)
class OneProcess:
    """The work of a run of one process, which does all of it."""

    def posted(
        self, kind: str, fields: Json, put: Callable[[Path], object] | None = None
    ) -> AbstractContextManager[Share]:
        return nullcontext(EVERYTHING)


@dataclass(kw_only=True)
class SharedWork:
    """The work of a launch, as one of its ranks sees it.

    Attributes:
        root: the folder `.ranks` of the run directory.
        signs: the files that the other ranks touch, by rank.
        name: of this process, the content of its own sign.
    """

    root: Path
    rank: int
    signs: Mapping[int, Path]
    name: str = field(default_factory=lambda: uuid4().hex)
    _posted: int = 0
    _seen: set[str] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        return self.root / "work"

    @cached_property
    def _others(self) -> list[str]:
        """Names of the processes of the other ranks, once each has given a sign."""
        remove(self.folder)
        heartbeat.wait_for_signs(self.signs)
        return [sign.read_text() for sign in self.signs.values()]

    @contextmanager
    def posted(self, kind: str, fields: Json, put: Callable[[Path], object] | None = None) -> Iterator[Share]:
        """A job that the other ranks see inside of the block, on rank 0.

        Args:
            put: writes files that belong to it into a folder.

        Raises:
            LimbeckError: another rank gives no sign of life; names it.
        """
        others, self._posted = self._others, self._posted + 1
        folder = self.folder / f"{self._posted:06d}"
        with whole_folder(folder) as partial:
            if put is not None:
                put(partial)
            write_json(partial / "job.json", {"kind": kind, "fields": fields, "for": others})
        try:
            yield Job(folder=folder, kind=kind, fields=fields, rank=self.rank, signs=self.signs)
        finally:
            # At once, so that none takes a unit of it while it goes.
            gone = folder.replace(folder.with_name(f".{folder.name}.partial"))
            remove(gone)

    def next(self, kinds: Collection[str]) -> Job | None:
        """A job of some kinds that rank 0 has posted for this process and that it has not seen yet."""
        for folder in sorted(self.folder.glob("[0-9]*")):
            # It may end meanwhile.
            with suppress(FileNotFoundError):
                record = read_json(folder / "job.json")
                mine = self.name in record["for"] and record["kind"] in kinds
                if mine and folder.name not in self._seen:
                    self._seen.add(folder.name)
                    return Job(folder=folder, kind=record["kind"], fields=record["fields"], rank=self.rank)
        return None
