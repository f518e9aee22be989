"""The stages of a run, done in order in one run directory, each addressed by a fingerprint of its inputs.

A stage that is done for these inputs is not done again. A directory made from other inputs is refused, or brought up
to date on request; what is superseded is moved aside, never deleted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from limbeck.pipeline.context import RunContext, Stage
from limbeck.pipeline.elastic import naming_lost_ranks
from limbeck.pipeline.integrity import closeness, differs, intact, reopen_damaged, sources_of
from limbeck.pipeline.provenance import code_revision, provenance, step_batch
from limbeck.pipeline.publishing import check_publishing, publish
from limbeck.pipeline.same_inputs import check_directory, is_stale, require_same_inputs
from limbeck.recipe import load
from limbeck.recipe.load import Recipe
from limbeck.runtime.artifact_cache import ArtifactCache
from limbeck.runtime.console import Console, QuietConsole, default_console, format_seconds
from limbeck.runtime.errors import in_one_line
from limbeck.runtime.files import read_json, write_json, write_text
from limbeck.runtime.heartbeat import beating, leaving_word, said_by_the_first_rank, wait_for_signs
from limbeck.runtime.launcher import require_meeting_place, said_once_a_machine
from limbeck.runtime.memory import give_back_freed, peak_device_memory_mib, peak_memory_mib, reset_peak_memory
from limbeck.runtime.outputs import written_below
from limbeck.runtime.rundir import RunDirectory
from limbeck.runtime.shared_work import Job, SharedWork
from limbeck.runtime.spin_waits import short_spins_when_busy
from limbeck.types import Json, LimbeckError


def run_pipeline(
    recipe: Recipe,
    *,
    stages: Sequence[Stage],
    until: str | None = None,
    console: Console | None = None,
    update: bool = False,
    artifacts: ArtifactCache | None = None,
    pause_at: float | None = None,
) -> RunDirectory:
    """Run a recipe; stages that are already done are skipped.

    Args:
        stages: all stages, in order.
        until: name of the last stage to run; None runs them all.
        update: in a directory made from other inputs, set aside and redo what differs instead of refusing.
        artifacts: results that other runs have made from the same inputs, which this run takes over.
        pause_at: pause training after this share of the optimizer steps, with a checkpoint. The same call without
            it continues and gives the same result as a run without a pause.

    Raises:
        Interrupted: training has paused.
        LimbeckError: an error that the caller can correct, in one line.
        KeyboardInterrupt: stopped by a signal; everything finished is on disk.
    """
    console = console or default_console()
    wanted = _wanted(recipe, stages, until or stages[-1].name)
    with in_one_line(), short_spins_when_busy():
        names = frozenset(stage.name for stage in wanted)
        context = RunContext(recipe, console, artifacts=artifacts, pause_at=pause_at, wanted=names)
        # Reading it refuses a launch that cannot train, before anything else.
        with said_once_a_machine():
            launch = context.launch
        if launch.ranks > 1:
            root = context.run.sign_of(context.rank).parent
            context = replace(context, work=SharedWork(root=root, rank=context.rank, signs=context.signs))
        if isinstance(work := context.work, SharedWork) and context.rank:
            context = replace(context, console=QuietConsole())
            sign = context.run.sign_of(context.rank)
            with (
                beating(sign, below=context.run.root, text=work.name),
                said_by_the_first_rank(context.last_word),
            ):
                require_meeting_place()
                return _follow(context, work, wanted)
        run = context.run
        check_directory(run)
        # Before anything that may take long, so that the other ranks see this one live.
        with _seen_by_other_ranks(run) if launch.ranks > 1 else nullcontext():
            if update or any(not run.done(stage.name) for stage in wanted):
                for stage in stages:
                    stage.check(context)
                _require_room(context, reading=False)
            whole = wanted[-1] is stages[-1]
            if whole:
                check_publishing(context)
            with context.stop.installed(), run.locked(console.warn):
                _run_all(context, stages, wanted, update)
                if whole:
                    publish(context)
        _warn_of_harm(run, console)
    return run


@contextmanager
def _seen_by_other_ranks(run: RunDirectory) -> Iterator[None]:
    """Show the other ranks of a launch, from the first one, that it is alive, or what it ends with."""
    with beating(run.lock), leaving_word(run.last_word):
        require_meeting_place()
        yield


def _wanted(recipe: Recipe, stages: Sequence[Stage], until: str) -> Sequence[Stage]:
    """The stages of a recipe up to one of them.

    Raises:
        LimbeckError: the recipe has no such stage.
    """
    last = [stage.name for stage in stages].index(until)
    if not stages[last].included(recipe):
        raise LimbeckError(
            f"the recipe has no stage {until}, which comes of a section preference; add one, such as "
            "preference.pairs=teacher, or run it with another command"
        )
    return tuple(stage for stage in stages[: last + 1] if stage.included(recipe))


def _run_all(context: RunContext, stages: Sequence[Stage], wanted: Sequence[Stage], update: bool) -> None:
    run, recipe = context.run, context.recipe
    prints = context.fingerprints(stages)
    stale = [stage for stage in stages if is_stale(run, stage, prints)]
    if not update:
        require_same_inputs(context, stages, prints)
    todo = not all(run.finished(stage.name, prints[stage.name]) for stage in wanted)
    launch, batch = context.launch, step_batch(recipe, [stage.name for stage in wanted])
    if todo and (batch or launch.ranks > 1):
        context.console.say(launch.line(*batch))
    run.remove_partial_files()
    for stage in stale:
        target = run.set_aside(stage.name, stage.outputs(run))
        context.console.say(f"{stage.name}: made from other inputs; moved to {target}")
    write_text(run.recipe, load.to_yaml(recipe))
    if todo:
        write_json(run.root / "provenance.json", provenance(context, prints))
    looks = closeness(run, wanted, prints)
    for stage in wanted:
        if differs(run, stages, stage):
            _set_aside_other(context, stage, update=update)
        elif run.finished(stage.name, prints[stage.name]):
            reopen_damaged(run, stage, looks[stage.name], context.console)
        _run_stage(context, stages, stage, prints[stage.name])
    # At the very end, where it will be read: settings that had no effect.
    for sentence in (run.manifest("train") or {}).get("never_acted", ()):
        context.console.warn(sentence)


def _set_aside_other(context: RunContext, stage: Stage, *, update: bool) -> None:
    """Move the outputs of a stage aside whose input files were made again since, and differ.

    Raises:
        LimbeckError: the stage takes long to redo, and `update` is not set.
    """
    run = context.run
    if not update and not stage.cheap:
        raise LimbeckError(
            f"{run.root}: files that its {stage.name} was made from were damaged, and those made again differ from "
            "them; add --update to redo what depends on them (the old results move to superseded/)"
        )
    target = run.set_aside(stage.name, stage.outputs(run))
    context.console.say(f"{stage.name}: made from other files; moved to {target}")


def _run_stage(context: RunContext, stages: Sequence[Stage], stage: Stage, fingerprint_: str) -> None:
    run, console = context.run, context.console
    # A paused training must be its own: another run's is a finished one.
    artifacts = context.artifacts if stage.shared and (stage.name != "train" or context.pause_at is None) else None
    if run.finished(stage.name, fingerprint_):
        console.say(f"{stage.name}: done earlier")
        if artifacts is not None:
            artifacts.publish(stage.name, fingerprint_, run)
        return
    orphans = run.set_aside(stage.name, stage.outputs(run)) if run.manifest(stage.name) is None else None
    if orphans is not None:
        console.warn(f"{stage.name}: files without a record of what they were made from; moved to {orphans}")
    if artifacts is None:
        _make_stage(context, stages, stage, fingerprint_)
    else:
        with artifacts.lock(fingerprint_):
            sources = sources_of(run, stages, stage)
            donor = artifacts.link_stage(
                stage.name, fingerprint_, run, stage.outputs, sources=sources, working=stage.working
            )
            if donor is None:
                _make_stage(context, stages, stage, fingerprint_)
                # Before the lock goes, so that a waiting run finds it.
                artifacts.publish(stage.name, fingerprint_, run)
            else:
                console.say(f"{stage.name}: the same as that of {donor}")
    context.stop.raise_if_requested()


def _make_stage(context: RunContext, stages: Sequence[Stage], stage: Stage, fingerprint_: str) -> None:
    run, console = context.run, context.console
    begun = run.manifest(stage.name)
    earlier_s = begun["seconds"] if begun else 0.0
    # Not the time of day, which may be set back meanwhile.
    started = time.monotonic()
    record: Json = {"stage": stage.name, "fingerprint": fingerprint_, "done": False, "seconds": earlier_s}
    record["code_revision"] = code_revision()
    record["started"] = (begun or {}).get("started") or time.strftime("%Y-%m-%dT%H:%M:%S%z")
    record["made_from"] = sources_of(run, stages, stage)
    record["ranks"] = context.launch.ranks
    _require_room(context, reading=True)
    run.write_manifest(stage.name, record)
    give_back_freed()
    reset_peak_memory()
    try:
        if stage.name == "train":
            wait_for_signs(context.signs)
        with naming_lost_ranks(context):
            record |= stage.run(context)
        record["outputs"] = written_below(run.root, stage.outputs(run))
        record["done"] = True
    finally:
        if not stage.hands_on_teacher:
            context.teacher.release()
        # Also after an interruption: the time it took so far is part of the cost of the run.
        record["seconds"] = round(earlier_s + time.monotonic() - started, 2)
        record["peak_memory_mib"] = peak_memory_mib()
        if device := peak_device_memory_mib():
            record["peak_device_memory_mib"] = device
        if record.get("tokens"):
            record["tokens_per_s"] = round(record["tokens"] / max(record["seconds"], 1e-9), 1)
        run.write_manifest(stage.name, record)
    detail = f", {record['tokens']:,} tokens" if record.get("tokens") else ""
    console.say(f"{stage.name}: done in {format_seconds(record['seconds'])}{detail}")


def _require_room(context: RunContext, *, reading: bool) -> None:
    """Refuse what the disk or the memory cannot hold, as far as it is known before the next stage."""
    from limbeck.pipeline.plan.room import require_room

    require_room(context, reading=reading)


def _follow(context: RunContext, work: SharedWork, stages: Sequence[Stage]) -> RunDirectory:
    """The work of a rank other than the first: train with it, and do its share of what that posts in other stages."""
    run = context.run
    prints = context.fingerprints(stages)
    looks = closeness(run, stages, prints)
    for stage in stages:
        if stage.name == "train" and not intact(run, stage, prints[stage.name], looks[stage.name]):
            # Not before the first rank has set aside what is damaged or other inputs made: blocks and checkpoints are
            # read there.
            context.wait_until(partial(run.begun, stage.name, prints[stage.name]))
            with context.stop.installed(), naming_lost_ranks(context):
                stage.run(context)
        _help(context, work, stage, partial(run.finished, stage.name, prints[stage.name]))
        if not stage.hands_on_teacher:
            context.teacher.release()
        context.kept.clear()
    return run


def _help(context: RunContext, work: SharedWork, stage: Stage, finished: Callable[[], bool]) -> None:
    """Do this rank's share of the jobs that the first one posts, until the stage is finished."""
    job: Job | None = None

    def ready() -> bool:
        nonlocal job
        job = work.next(stage.helped)
        return job is not None or finished()

    while True:
        context.wait_until(ready)
        if job is None:
            return
        with context.stop.installed():
            try:
                stage.helped[job.kind](context, job)
            except FileNotFoundError:
                # All of it was done before this rank had read what it is.
                if job.folder.exists():
                    raise


def _warn_of_harm(run: RunDirectory, console: Console) -> None:
    """Warn, as the last line of a run, where the student got worse."""
    from limbeck.report.outcome import harm
    from limbeck.report.read_run import read_scores

    if (run.root / "scores.json").exists() and (sentence := harm(read_scores(run.root))) is not None:
        console.warn(sentence)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, as the Python API returns it."""

    directory: Path

    @property
    def student(self) -> Path:
        """Folder of the student, for `AutoModelForCausalLM.from_pretrained`; after preference tuning, where it was."""
        return RunDirectory(self.directory).finished_student

    @property
    def report(self) -> Path:
        return self.directory / "report.html"

    @property
    def scores(self) -> Any:
        """The content of scores.json: {"before": ..., "after": ...}."""
        return read_json(self.directory / "scores.json")
