"""Repair of finished stages whose files are missing or were changed.

Such a stage is run again from its undamaged files, so that nothing is lost but time; damaged ones move to superseded/.
The result is the same as before. Should it differ, later stages are refused like those of any other inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from limbeck.runtime.console import Console
from limbeck.runtime.outputs import Written, content_of, faults, is_log, made_from, matching, with_companions
from limbeck.runtime.rundir import RunDirectory
from limbeck.types import Json, LimbeckError

if TYPE_CHECKING:
    from limbeck.pipeline.context import Stage


@dataclass(frozen=True)
class Look:
    """How closely the files of a finished stage are compared.

    Attributes:
        results: by content, where a stage that will run reads them; else by size and time of last change; not at all
            where no stage will read them.
        handed_on: whether the next stage will run, so that files for it alone are compared too, by content.
    """

    results: Literal["content", "time"] | None
    handed_on: bool


def closeness(run: RunDirectory, wanted: Sequence[Stage], prints: Mapping[str, str]) -> dict[str, Look]:
    """How closely the files of each stage are compared, if it is finished."""
    looks: dict[str, Look] = {}
    read = following = False
    for stage in reversed(wanted):
        unread = stage.intermediate and stage is not wanted[-1]
        look = looks[stage.name] = Look("content" if read else None if unread else "time", following)
        following = not intact(run, stage, prints[stage.name], look)
        read = read or following
    return looks


def intact(run: RunDirectory, stage: Stage, fingerprint_: str, look: Look) -> bool:
    """Whether a stage is done for these inputs and its files are as it wrote them, by `closeness`."""
    return run.finished(stage.name, fingerprint_) and not _damage(run, stage, look)


def _damage(run: RunDirectory, stage: Stage, look: Look) -> dict[str, str]:
    written, found = _written(run, stage), {}
    if look.results is not None:
        results = matching(written, stage.working, wanted=False)
        found |= faults(run.root, results, content=look.results == "content")
    if look.handed_on:
        found |= faults(run.root, matching(written, stage.handed_on), content=True)
    return found


def _written(run: RunDirectory, stage: Stage) -> Written:
    return (run.manifest(stage.name) or {}).get("outputs", {})


def reopen_damaged(run: RunDirectory, stage: Stage, look: Look, console: Console) -> None:
    """Mark a finished stage with damaged files as not done, so that it runs again from its undamaged ones.

    Safe to kill: the stage counts as done, with files missing, until the last damaged one is out of the way.

    Raises:
        LimbeckError: a log that the stage goes on with is damaged, and what it holds could not be written again.
    """
    found = _damage(run, stage, look)
    if not found:
        return
    written = _written(run, stage)
    more = faults(run.root, matching(written, stage.working), content=True)
    for name, fault in more.items():
        if is_log(name) and fault != "is missing":
            raise LimbeckError(
                f"{run.root / name} is not what {stage.name} wrote, which has to run again because "
                f"{next(iter(found))} {next(iter(found.values()))}; bring it back from a copy, or delete it and run "
                "the same command again to do without what it holds"
            )
    lost = [name for name in (*found, *more) if not is_log(name)]
    target = run.set_files_aside(stage.name, with_companions(lost, written))
    run.write_manifest(stage.name, (run.manifest(stage.name) or {}) | {"done": False})
    name, fault = next(iter(found.items()))
    others = f" and {len(found) - 1} more of its files are damaged" if len(found) > 1 else ""
    console.warn(
        f"{stage.name}: {name} {fault} since it was written{others}; what is missing is made again"
        + (f", the rest moved to {target}" if target else "")
    )


def sources_of(run: RunDirectory, stages: Sequence[Stage], stage: Stage) -> Json:
    """Fingerprints of the files of earlier stages that a stage reads."""
    earlier = stages[: [each.name for each in stages].index(stage.name)]
    return {
        each.name: content_of(matching(_written(run, each), each.working, wanted=False))
        for each in earlier
        if "outputs" in (run.manifest(each.name) or {})
    }


def differs(run: RunDirectory, stages: Sequence[Stage], stage: Stage) -> bool:
    """Whether a begun or finished stage was made from files that have been made again since, and differ."""
    record = run.manifest(stage.name)
    return record is not None and not made_from(record, sources_of(run, stages, stage))
