"""Runs that are compared: directories and sweeps as arms with their runs, failed and unfinished ones included."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Literal

from limbeck.compare.labels import arm_label, differing, titled
from limbeck.compare.left_out import left_out
from limbeck.recipe.keys import same_arm_keys
from limbeck.report.format import name_of
from limbeck.report.read_run import Run, number, read_run, value_at
from limbeck.report.values import parsed
from limbeck.runtime.json_lines import json_lines
from limbeck.runtime.records import flatten
from limbeck.types import LimbeckError

RunState = Literal["waiting", "running", "done", "failed", "dropped"]

ARMS = "arms.jsonl"
# Arms that differ in more keys are named as their recipes are.
LABEL_KEYS = 4


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One run of an arm.

    Attributes:
        place: how the page names its directory.
        run: what its directory holds; None where it has none (yet).
        state: "done" means evaluated after training.
        reason: why it is not done, in one sentence, or empty.
        tuning: whether it only served to choose a setting; it is listed, not ranked.
    """

    arm: str
    seed: int
    place: str
    run: Run | None
    state: RunState
    reason: str = ""
    tuning: bool = False
    keys: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ComparedArm:
    """Runs that differ in the seed alone. `keys` are those in which the arms differ, `number` counts from 1."""

    name: str
    number: int
    keys: Mapping[str, Any]
    members: tuple[ComparedRun, ...]

    @cached_property
    def done(self) -> list[ComparedRun]:
        return [member for member in self.members if member.state == "done"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The runs of a comparison.

    Attributes:
        tuning: runs that served to choose a setting.
        varied: the dotted keys in which the arms differ, in the order of the recipe.
        notes: what was left out and why, one sentence each.
        swept: whether all runs come from one sweep.
    """

    arms: tuple[ComparedArm, ...]
    tuning: tuple[ComparedRun, ...]
    varied: tuple[str, ...]
    notes: tuple[str, ...]
    swept: bool = False

    @property
    def members(self) -> list[ComparedRun]:
        return [member for arm in self.arms for member in arm.members]


def gather(folders: Sequence[Path], lines: Sequence[Mapping[str, Any]] | None, home: Path) -> Comparison:
    """Arms of run directories and sweep directories.

    Args:
        lines: the lines of a sweep's arms.jsonl; None reads them where one of the folders is a sweep.
        home: where relative directories of `lines` begin.

    Raises:
        LimbeckError: nothing to compare, a folder is no run directory, or a sweep's lines are broken.
    """
    if not folders and not lines:
        raise LimbeckError("got no run to compare; expected at least two run directories, or a sweep directory")
    if lines is None and len(folders) == 1 and (folders[0] / ARMS).is_file():
        lines, home = read_arms(folders[0] / ARMS), folders[0]
    if lines is not None:
        if not lines:
            raise LimbeckError(f"{home} is a sweep without runs; expected at least one: start it with `limbeck sweep`")
        found = [_from_line(line, folders, home) for line in lines]
        said = left_out(home, [member.place for member in found])
        return _compared(found, [said] if said else [], swept=True)
    found, notes = [], []
    for folder in folders:
        if (folder / ARMS).is_file():
            members = [_from_line(line, (), folder) for line in read_arms(folder / ARMS)]
            found += members
            if said := left_out(folder, [member.place for member in members]):
                notes.append(f"{folder}: {said}")
        else:
            found.append(_from_folder(folder))
    if len({member.place for member in found}) < 2:
        raise LimbeckError(f"got one run, {folders[0]}; expected at least two, or a sweep directory: add another run")
    return _compared(_derived(found), notes, swept=False)


def read_arms(path: Path) -> list[Mapping[str, Any]]:
    """The lines of a sweep's arms.jsonl.

    Raises:
        LimbeckError: a line is no object with an arm; names file and line.
    """
    lines = []
    for line_number, text in json_lines(_read(path)):
        try:
            line = parsed(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("arm"), str):
            raise LimbeckError(
                f"{path}:{line_number}: got no object with an arm; start the sweep again, it writes the file anew"
            )
        lines.append(line)
    return lines


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise LimbeckError(f"{path} is not UTF-8 text; start the sweep again, it writes the file anew") from None


def _from_line(line: Mapping[str, Any], folders: Sequence[Path], home: Path) -> ComparedRun:
    """A run from its line in the sweep's arms.jsonl."""
    keys = line.get("keys")
    directory = _directory(str(line.get("directory") or ""), folders, home)
    run, reason = None, str(line.get("error") or "")
    if directory is not None and directory.is_dir():
        try:
            run = read_run(directory)
        except LimbeckError as error:
            reason = reason or str(error)
    state: RunState = line["state"] if line.get("state") in ("waiting", "running", "failed", "dropped") else "done"
    member = ComparedRun(
        arm=titled(str(line["arm"])),
        seed=int(number(line, "seed") or 0),
        place=_place(directory, home) if directory is not None else str(line["arm"]),
        run=run,
        state=state,
        reason=reason,
        tuning=line.get("tuning") is True,
        keys=keys if isinstance(keys, dict) else {},
    )
    return member if state != "done" else _with_state(member)


def _directory(named: str, folders: Sequence[Path], home: Path) -> Path | None:
    if not named:
        return None
    # A sweep may name its runs from where it was started or from where it lies; both must go on working when it moves.
    near = [folder for folder in folders if folder.as_posix().endswith(named) or named.endswith(folder.as_posix())]
    for path in (*near, home / named, Path(named)):
        if path.is_dir():
            return path
    return home / named


def _place(directory: Path, home: Path) -> str:
    return directory.relative_to(home).as_posix() if directory.is_relative_to(home) else directory.as_posix()


def _from_folder(folder: Path) -> ComparedRun:
    run = read_run(folder)
    seed = number(run.recipe, "train.seed")
    member = ComparedRun(arm="", seed=int(seed or 0), place=folder.as_posix(), run=run, state="done")
    return _with_state(member)


def _with_state(member: ComparedRun) -> ComparedRun:
    """Done where the student was evaluated after training; else as far as it has come."""
    run = member.run
    if run is not None and value_at(run.scores, "after"):
        return member
    if run is None:
        return replace(member, state="failed", reason=member.reason or "its directory is gone or holds no run")
    begun = [str(stage["stage"]) for stage in run.stages if stage.get("done") is False]
    broken = next((sentence for sentence in run.broken if sentence.startswith("scores.json")), "")
    reason = broken or (f"{begun[-1]} was begun and is not finished" if begun else "the student has not been evaluated")
    return replace(member, state="failed" if broken else "running", reason=member.reason or reason)


def _derived(found: Sequence[ComparedRun]) -> list[ComparedRun]:
    """Members with arms and keys from their resolved recipes: those that differ in the seed alone are one arm."""
    flats = [flatten(member.run.recipe) if member.run else dict(member.keys) for member in found]
    same_arm = same_arm_keys()
    flats = [{key: value for key, value in flat.items() if key not in same_arm} for flat in flats]
    keys = differing(flats)
    members = []
    names: dict[str, str] = {}
    for member, flat in zip(found, flats, strict=True):
        own = {key: flat[key] for key in keys if key in flat}
        if member.run and member.run.recipe:
            # Runs called differently are one arm all the same, and are called as the first of them.
            said = json.dumps(own, sort_keys=True, default=str)
            name = names.get(said) or _free(arm_label(own, keys) or name_of(member.run), names)
            names[said] = name
        else:
            name = member.arm or Path(member.place).name
        members.append(replace(member, arm=name, keys=own))
    return _by_recipe(members) if len(keys) > LABEL_KEYS else members


def _free(name: str, names: Mapping[str, str]) -> str:
    """The name, with a number where another arm has it: 2 and "2" read the same."""
    others = set(names.values())
    return next(free for n in count(1) if (free := f"{name} ({n})" if n > 1 else name) not in others)


def _by_recipe(members: Sequence[ComparedRun]) -> list[ComparedRun]:
    """Arms named by their recipes, where these names differ; a label of many keys would be hard to read."""
    pairs = {(member.arm, name_of(member.run)) for member in members if member.run and member.run.recipe}
    arms, names = {arm for arm, _ in pairs}, {name for _, name in pairs}
    if not len(pairs) == len(arms) == len(names):
        return list(members)
    recipes = dict(pairs)
    return [replace(member, arm=recipes.get(member.arm, member.arm)) for member in members]


def _compared(found: Sequence[ComparedRun], notes: Sequence[str], *, swept: bool) -> Comparison:
    arms: dict[str, list[ComparedRun]] = {}
    notes, chosen = [*notes], dict[tuple[str, int], ComparedRun]()
    ranked = [member for member in found if not member.tuning]
    for member in ranked:
        known = chosen.setdefault((member.arm, member.seed), member)
        if member.state == "done" and known.state != "done":
            chosen[member.arm, member.seed] = member
    for member in ranked:
        members, one = arms.setdefault(member.arm, []), chosen[member.arm, member.seed]
        if member is one:
            members.append(member)
        else:
            # Counting the same run twice would make it look surer than it is.
            notes.append(f"{member.place} has the recipe and the seed of {one.place} and is left out")
    made = [
        ComparedArm(name=name, number=n, keys=members[0].keys, members=tuple(sorted(members, key=lambda m: m.seed)))
        for n, (name, members) in enumerate(arms.items(), start=1)
    ]
    for member in found:
        notes += [f"{member.place}: {sentence}" for sentence in (member.run.broken if member.run else ())]
    return Comparison(
        arms=tuple(made),
        tuning=tuple(member for member in found if member.tuning),
        varied=tuple(differing([arm.keys for arm in made])),
        notes=tuple(notes),
        swept=swept,
    )
