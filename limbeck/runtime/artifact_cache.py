"""Results that runs of a sweep share: made by the first that needs them, linked into the directories of the others.

    shared/KEY.json  which run has the stage with this fingerprint        shared/KEY.lock  held by the run that makes it
    shared/KEY/      files smaller than a stage            shared/KEY.files.json  their hashes

A key is the fingerprint of all inputs of the shared result, so no run ever gets what it would not have
made itself, bit for bit on the same machine with the same number of threads. What is damaged is not taken: a file has
one content under all its names, so that the next run makes it anew.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from limbeck.runtime.files import link, whole_folder, write_json
from limbeck.runtime.outputs import faults, made_from, matching, written_below
from limbeck.runtime.records import read_object, read_sealed, sealed
from limbeck.runtime.rundir import RunDirectory
from limbeck.types import Json

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class ArtifactCache:
    """The folder `shared` of a sweep."""

    root: Path

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """A block for a key that one process at a time may enter; the second finds the result of the first.

        Where the file system has no locks, both make it, and the same. The lock dies with its process.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / f"{key}.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            yield

    def publish(self, stage: str, fingerprint_: str, run: RunDirectory) -> None:
        """Record that a run has finished a stage."""
        if self._donor(stage, fingerprint_) is None:
            write_json(self.root / f"{fingerprint_}.json", {"directory": os.path.relpath(run.root, self.root)})

    def _donor(self, stage: str, fingerprint_: str) -> RunDirectory | None:
        """A run that has finished the stage, and still has it."""
        path = self.root / f"{fingerprint_}.json"
        if not path.exists():
            return None
        donor = RunDirectory(Path(os.path.normpath(self.root / str(read_object(path).get("directory")))))
        return donor if donor.finished(stage, fingerprint_) else None

    def link_stage(
        self,
        stage: str,
        fingerprint_: str,
        run: RunDirectory,
        outputs: Callable[[RunDirectory], Sequence[Path]],
        *,
        sources: Json | None = None,
        working: Sequence[str] = (),
    ) -> Path | None:
        """Link the finished stage of another run into this one, its manifest last.

        Safe to kill: the stage counts as begun before the first link, and what is linked by then is part of it.

        Args:
            sources: what this run's own stage would read (`limbeck.pipeline.integrity.sources_of`).
            working: patterns of files that may be missing.

        Returns:
            the directory it came from; None where no run has it whole.
        """
        donor = self._donor(stage, fingerprint_)
        record = {} if donor is None else donor.manifest(stage) or {}
        if donor is None or not made_from(record, sources or {}):
            return None
        found = faults(donor.root, record.get("outputs", {}), content=True)
        may_be_missing = matching(record.get("outputs", {}), working)
        if any(fault != "is missing" or name not in may_be_missing for name, fault in found.items()):
            return None
        record |= {"shared_from": os.path.relpath(donor.root, run.root)}
        run.write_manifest(stage, record | {"done": False})
        # Not what a later stage has written among them, such as a model's card, of which this run has no record yet.
        own = record.get("outputs")
        for there, here in zip(outputs(donor), outputs(run), strict=True):
            for file in [there] if there.is_file() else _files_below(there):
                if own is None or file.relative_to(donor.root).as_posix() in own:
                    link(file, here / file.relative_to(there) if file != there else here)
        run.write_manifest(stage, record)
        return donor.root

    def restore(self, key: str, folder: Path) -> bool:
        """Link the files kept under a key into a folder; whether there were any, all as they were kept."""
        kept, record = self.root / key, self.root / f"{key}.files.json"
        if not record.exists() or faults(kept, read_sealed(record)["files"], content=True):
            return False
        for file in _files_below(kept):
            link(file, folder / file.relative_to(kept))
        return True

    def store(self, key: str, folder: Path, files: Sequence[Path]) -> None:
        """Keep files of a folder under a key, all or none, unless they are kept whole."""
        kept, record = self.root / key, self.root / f"{key}.files.json"
        if record.exists() and not faults(kept, read_sealed(record)["files"], content=True):
            return
        record.unlink(missing_ok=True)
        with whole_folder(kept) as partial:
            for file in files:
                link(file, partial / file.relative_to(folder))
        write_json(record, sealed({"files": written_below(kept, [kept])}))


def _files_below(folder: Path) -> list[Path]:
    """Whole files: what is being written has a hidden name."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [p for p in found if not any(part.endswith(".partial") for part in p.relative_to(folder).parts)]
