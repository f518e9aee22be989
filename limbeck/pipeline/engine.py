"""The story: six stages played in order into one run directory, each addressed by a fingerprint of its inputs.

A stage that is done for these inputs is not done again. A directory made from other inputs is refused, or brought up
to date on request; what is superseded is moved aside, never deleted.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.pipeline.integrity import closeness, differs, intact, reopen_damaged, sources_of
from limbeck.pipeline.publishing import check_publishing, publish
from limbeck.recipe import load, yaml_text
from limbeck.recipe.keys import neutral_keys
from limbeck.recipe.load import Recipe
from limbeck.runtime.artifact_cache import ArtifactCache
from limbeck.runtime.console import Console, QuietConsole, default_console, format_seconds
from limbeck.runtime.errors import in_one_line
from limbeck.runtime.heartbeat import beating, wait_until
from limbeck.runtime.launcher import Launch, launched
from limbeck.runtime.outputs import written_below
from limbeck.runtime.rundir import RunDirectory, fingerprint, flatten, read_json, write_json, write_text
from limbeck.runtime.spin_waits import short_spins_when_busy
from limbeck.types import Json, LimbeckError

if TYPE_CHECKING:
    import torch

    from limbeck.models.vocabulary import VocabularyCard
    from limbeck.teachers.base import Teacher


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One arrow of the story.

    Attributes:
        check: refuses what can be known to fail before any stage has worked: no models are loaded, nothing is written.
        inputs: what the stage reads of recipe and world, JSON-able; with the stages before it makes the fingerprint.
        play: does the work and returns what its manifest records beside time and memory.
        outputs: what is moved aside when the stage is superseded, and shared with a run that has the same inputs.
        shared: whether another run with the same inputs would write the same.
        working: patterns of outputs that only the stage itself reads, to go on where it was stopped; they may be gone
            once it is done, and so may all outputs of an `intermediate` stage once those that read them are done.
        handed_on: patterns of those working files that the next stage reads.
        cheap: played again without being asked for where what it reads was made again and differs.
        hands_on_teacher: the next stage finds the weights of the teacher in memory, where this one has loaded them.
    """

    name: str
    inputs: Callable[[RunContext], Json]
    play: Callable[[RunContext], Json]
    outputs: Callable[[RunDirectory], tuple[Path, ...]]
    check: Callable[[RunContext], None] = lambda context: None
    shared: bool = True
    working: tuple[str, ...] = ()
    handed_on: tuple[str, ...] = ()
    intermediate: bool = False
    cheap: bool = False
    hands_on_teacher: bool = False


# Ctrl-C, a terminal that closes, and what schedulers send before they kill (SIGTERM; SLURM's --signal=USR1).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass
class GracefulStop:
    """A signal's wish that a run end. While `deferred`, the first one is only remembered, so that a step can finish."""

    number: int = 0
    _depth: int = 0

    @property
    def requested(self) -> bool:
        return self.number != 0

    @contextmanager
    def deferred(self) -> Iterator[Callable[[], bool]]:
        """Yields the question whether to stop; whoever asks it ends in order. See `raise_if_requested`."""
        self._depth += 1
        try:
            yield lambda: self.requested
        finally:
            self._depth -= 1

    def raise_if_requested(self) -> None:
        """Stop here if that was wished meanwhile.

        Raises:
            KeyboardInterrupt: with the signal's number.
        """
        if self.requested:
            raise KeyboardInterrupt(self.number)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside the block; only possible in the main thread."""
        import threading

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # What `nohup` has made deaf to a closing terminal stays so.
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._on_signal) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        del frame
        again, self.number = self.requested, number
        if again or not self._depth:
            raise KeyboardInterrupt(number)
        # The terminal may be what has gone.
        with suppress(OSError):
            print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)


@dataclass
class RunContext:
    """A recipe being played. Models are loaded when a stage first needs them.

    Attributes:
        shelf: what it shares with other runs; None for a run of its own.
        pause_at: share of the optimizer steps after which training pauses with a checkpoint.
        wanted: names of the stages that are to be played; None for all.
    """

    recipe: Recipe
    console: Console = field(default_factory=QuietConsole)
    stop: GracefulStop = field(default_factory=GracefulStop)
    artifacts: ArtifactCache | None = None
    pause_at: float | None = None
    wanted: frozenset[str] | None = None

    @cached_property
    def run(self) -> RunDirectory:
        return RunDirectory(self.recipe.directory)

    @cached_property
    def launch(self) -> Launch:
        """How this process was started.

        Raises:
            LimbeckError: in a way that limbeck cannot train with.
        """
        return launched()

    @property
    def rank(self) -> int:
        """This process's number under a launcher; the first, 0, does everything but train on its own."""
        return int(os.environ.get("RANK", "0"))

    @cached_property
    def device(self) -> torch.device:
        import torch

        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher of the run, one for all stages; its weights load when a stage first needs them."""
        from limbeck.teachers.base import TeacherModel
        from limbeck.teachers.registry import TEACHERS

        section = self.recipe.teacher
        model = TeacherModel(
            model=section.model,
            revision=section.revision,
            dtype=section.dtype,
            attn_implementation=section.attn_implementation,
            trust_remote_code=section.trust_remote_code,
        )
        where = {"name": section.where} if isinstance(section.where, str) else dict(section.where)
        name = where.pop("name", "in_process")
        return TEACHERS.build(str(name), **where).open(model, device=self.device, progress=self.console.say)

    @cached_property
    def teacher_card(self) -> VocabularyCard:
        """What the teacher says about its tokens, without its weights."""
        return self.teacher.vocabulary

    @cached_property
    def student_card(self) -> VocabularyCard | None:
        """The same of the model the student begins as; None where that is the teacher."""
        from limbeck.models.vocabulary import describe_vocabulary

        section = self.recipe.student
        if section.model is None:
            return None
        return describe_vocabulary(
            section.model, revision=section.revision, trust_remote_code=section.trust_remote_code
        )

    @property
    def student_trusted(self) -> bool:
        """Whether Python files that came with the student may run: those of the model it begins as."""
        section = self.recipe.student if self.recipe.student.model is not None else self.recipe.teacher
        return section.trust_remote_code

    @property
    def window(self) -> int | None:
        """Tokens that fit both models, prompt and answer together; None where neither states a limit."""
        student = self.student_card.context_length if self.student_card else self.teacher_card.context_length
        student = self.recipe.student.config.get("max_position_embeddings", student)
        limits = [limit for limit in (self.teacher_card.context_length, student) if limit is not None]
        return min(limits, default=None)

    @cached_property
    def teacher_fingerprint(self) -> str:
        return self.teacher.fingerprint

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """On a rank other than the first: wait for what that one writes, as long as it shows that it lives.

        Raises:
            LimbeckError: it does not, or not where this rank looks.
        """
        wait_until(ready, sign=self.run.lock, rank=self.rank)

    def fingerprints(self, stages: Sequence[Stage]) -> dict[str, str]:
        """The fingerprint of every stage: its own inputs and, through the chain, those of all stages before it."""
        prints: dict[str, str] = {}
        before = ""
        for stage in stages:
            before = prints[stage.name] = fingerprint(
                {"stage": stage.name, "inputs": stage.inputs(self), "after": before}
            )
        return prints


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
    """Play a recipe; stages that are done are passed over.

    Args:
        stages: the whole story, in order.
        until: name of the last stage to play; None plays them all.
        update: in a directory made from other inputs, set aside and redo what differs instead of refusing.
        shelf: take over what another run has made from the same inputs.
        pause_at: stop in order after this share of the optimizer steps; nothing else changes, so that the same call
            without it goes on as if there had been no pause.

    Raises:
        Interrupted: training has paused.
        LimbeckError: anything a person can mend, in one line.
        KeyboardInterrupt: stopped by a signal; everything finished is on disk.
    """
    console = console or default_console()
    wanted = stages[: 1 + [stage.name for stage in stages].index(until or stages[-1].name)]
    with in_one_line(), short_spins_when_busy():
        names = frozenset(stage.name for stage in wanted)
        context = RunContext(recipe, console, artifacts=artifacts, pause_at=pause_at, wanted=names)
        # A launch that cannot train is refused before anything else.
        launch = context.launch
        if context.rank:
            return _follow(replace(context, console=QuietConsole()), wanted)
        run = context.run
        _check_directory(run)
        # Before anything that may take long, so that the other ranks see this one live.
        with beating(run.lock) if launch.ranks > 1 else nullcontext():
            if update or any(not run.done(stage.name) for stage in wanted):
                for stage in stages:
                    stage.check(context)
            whole = wanted[-1] is stages[-1]
            if whole:
                check_publishing(context)
            with context.stop.installed(), run.locked(console.warn):
                _play_all(context, stages, wanted, update)
                if whole:
                    publish(context)
        _say_harm(run, console)
    return run


def _step_batch(recipe: Recipe, stages: Container[str]) -> tuple[int, ...]:
    """Responses per device and accumulated micro-batches of a step; nothing where none of the stages trains."""
    train = recipe.train
    return (train.per_device_train_batch_size, train.gradient_accumulation_steps) if "train" in stages else ()


def _say_harm(run: RunDirectory, console: Console) -> None:
    """Last of all, whether the student got worse."""
    from limbeck.report.outcome import harm
    from limbeck.report.read_run import read_scores

    if (run.root / "scores.json").exists() and (sentence := harm(read_scores(run.root))) is not None:
        console.warn(sentence)


def _play_all(context: RunContext, stages: Sequence[Stage], wanted: Sequence[Stage], update: bool) -> None:
    run, recipe = context.run, context.recipe
    prints = context.fingerprints(stages)
    stale = [stage for stage in stages if _is_stale(run, stage, prints)]
    if not update:
        require_same_inputs(context, stages, prints)
    todo = not all(run.finished(stage.name, prints[stage.name]) for stage in wanted)
    launch, batch = context.launch, _step_batch(recipe, [stage.name for stage in wanted])
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
        _play_stage(context, stages, stage, prints[stage.name])
    # At the very end, where a person looks: what was asked for and did not happen.
    for sentence in (run.manifest("train") or {}).get("never_acted", ()):
        context.console.warn(sentence)


def _set_aside_other(context: RunContext, stage: Stage, *, update: bool) -> None:
    """Make room for a stage that was made from files that have been made again since, and differ.

    Raises:
        LimbeckError: nobody has asked for that.
    """
    run = context.run
    if not update and not stage.cheap:
        raise LimbeckError(
            f"{run.root}: files that its {stage.name} was made from were damaged, and those made again differ from "
            "them; add --update to redo what depends on them (the old results move to superseded/)"
        )
    target = run.set_aside(stage.name, stage.outputs(run))
    context.console.say(f"{stage.name}: made from other files; moved to {target}")


def require_same_inputs(context: RunContext, stages: Sequence[Stage], prints: dict[str, str]) -> None:
    """The directory, where it holds a run, holds this one.

    Raises:
        LimbeckError: it was made from other inputs.
    """
    stale = next((stage for stage in stages if _is_stale(context.run, stage, prints)), None)
    if stale is not None:
        raise LimbeckError(_refusal(context, stale))


def _play_stage(context: RunContext, stages: Sequence[Stage], stage: Stage, fingerprint_: str) -> None:
    run, console = context.run, context.console
    # Whoever pauses wants to see how the training stands there, not how it ended elsewhere.
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
                # Before anybody else may ask for it.
                artifacts.publish(stage.name, fingerprint_, run)
            else:
                console.say(f"{stage.name}: the same as that of {donor}")
    context.stop.raise_if_requested()


def _make_stage(context: RunContext, stages: Sequence[Stage], stage: Stage, fingerprint_: str) -> None:
    run, console = context.run, context.console
    begun = run.manifest(stage.name)
    earlier_s = begun["seconds"] if begun else 0.0
    # Not the time of day, which somebody may set back meanwhile.
    started = time.monotonic()
    record: Json = {"stage": stage.name, "fingerprint": fingerprint_, "done": False, "seconds": earlier_s}
    record["code_revision"] = code_revision()
    record["started"] = (begun or {}).get("started") or time.strftime("%Y-%m-%dT%H:%M:%S%z")
    record["made_from"] = sources_of(run, stages, stage)
    run.write_manifest(stage.name, record)
    reset_peak_memory()
    try:
        record |= stage.play(context)
        record["outputs"] = written_below(run.root, stage.outputs(run))
        record["done"] = True
    finally:
        if not stage.hands_on_teacher:
            context.teacher.release()
        # Also after an interruption: the time it took so far is part of the cost of the run.
        record["seconds"] = round(earlier_s + time.monotonic() - started, 2)
        record["peak_memory_mib"] = peak_memory_mib()
        if record.get("tokens"):
            record["tokens_per_s"] = round(record["tokens"] / max(record["seconds"], 1e-9), 1)
        run.write_manifest(stage.name, record)
    detail = f", {record['tokens']:,} tokens" if record.get("tokens") else ""
    console.say(f"{stage.name}: done in {format_seconds(record['seconds'])}{detail}")


def _follow(context: RunContext, stages: Sequence[Stage]) -> RunDirectory:
    """What ranks other than the first do: train beside it, and wait while it does the rest."""
    run = context.run
    prints = context.fingerprints(stages)
    looks = closeness(run, stages, prints)
    for stage in stages:
        if stage.name == "train" and not intact(run, stage, prints[stage.name], looks[stage.name]):
            # Not before the first rank has set aside what is damaged or other inputs made: blocks and checkpoints are
            # read there.
            context.wait_until(partial(run.begun, stage.name, prints[stage.name]))
            with context.stop.installed():
                stage.play(context)
        context.wait_until(partial(run.finished, stage.name, prints[stage.name]))
    return run


def _is_stale(run: RunDirectory, stage: Stage, prints: dict[str, str]) -> bool:
    record = run.manifest(stage.name)
    return record is not None and record["fingerprint"] != prints[stage.name]


# What stages were called before they had the names of their commands.
_EARLIER_STAGES = ("responses", "signal", "student", "evaluation")


def _check_directory(run: RunDirectory) -> None:
    root = run.root
    if root.exists() and not root.is_dir():
        raise LimbeckError(f"{root} is a file; name a directory with output_dir=...")
    known = run.recipe.exists() or (root / ".lock").exists()
    if root.is_dir() and not known and any(root.iterdir()):
        raise LimbeckError(f"{root} holds files that are no run of limbeck; name another directory with output_dir=...")
    earlier = [name for name in _EARLIER_STAGES if run.manifest_path(name).exists()]
    if earlier:
        raise LimbeckError(
            f"{root} was written by an earlier version of limbeck (stages/{earlier[0]}.json); "
            "name another directory with output_dir=..., or delete it"
        )


def _refusal(context: RunContext, stage: Stage) -> str:
    run = context.run
    remedy = (
        "name another directory with output_dir=..., or add --update to redo what depends on it "
        "(the old results move to superseded/)"
    )
    if run.recipe.exists():
        # As it stands, not as this version of limbeck would read it.
        there = _read_recipe(run.recipe)
        if there is None:
            return f"{run.root} was made by a recipe that cannot be read, {run.recipe}; {remedy}"
        here = flatten(load.as_tree(context.recipe))
        keys = [k for k in {**there, **here} if there.get(k) != here.get(k) and k not in neutral_keys()]
        if keys:
            listed = "; ".join(f"{k} is {there.get(k)!r} there and {here.get(k)!r} here" for k in keys[:3])
            more = f" and {len(keys) - 3} more keys differ" if len(keys) > 3 else ""
            return f"{run.root} was made by another recipe: {listed}{more}; {remedy}"
    return (
        f"{run.root}: the inputs of its stage {stage.name} have changed since (a data file, or a model with its "
        f"tokenizer and chat template); {remedy}"
    )


def _read_recipe(path: Path) -> dict[str, Any] | None:
    """The keys of a resolved recipe; None where the file holds none."""
    try:
        tree = yaml_text.parse(path.read_text("utf-8"), str(path))
    except (LimbeckError, UnicodeDecodeError):
        return None
    return flatten(tree) if isinstance(tree, dict) else None


def provenance(context: RunContext, prints: dict[str, str]) -> Json:
    """What made this run: versions, code revision, machine, fingerprints, seeds. No names of people or hosts."""
    import platform
    from importlib import metadata

    import torch

    recipe = context.recipe
    packages = ("limbeck", "torch", "transformers", "accelerate", "datasets", "peft", "safetensors", "rouge-score")
    return {
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "code_revision": code_revision(),
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "device": str(context.device),
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
        },
        "launch": context.launch.record(*_step_batch(recipe, prints)),
        "fingerprints": {"teacher": context.teacher_fingerprint} | {f"stage {name}": p for name, p in prints.items()},
        "seeds": {"responses": recipe.responses.seed, "train": recipe.train.seed, "split": recipe.prompts.split_seed},
    }


def code_revision() -> str | None:
    """The git commit of limbeck's own source, where it runs from a checkout."""
    import subprocess

    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def reset_peak_memory() -> None:
    """Start a new high-water mark, so that each stage has its own (Linux; elsewhere the process's mark is kept)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_mib() -> int:
    """High-water mark of this process's resident memory."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024) if sys.platform == "darwin" else peak // 1024


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, as the Python API returns it."""

    directory: Path

    @property
    def student(self) -> Path:
        """Folder of the student, for `AutoModelForCausalLM.from_pretrained`."""
        return self.directory / "student"

    @property
    def report(self) -> Path:
        return self.directory / "report.html"

    @property
    def scores(self) -> Any:
        """The content of scores.json: {"before": ..., "after": ...}."""
        return read_json(self.directory / "scores.json")
