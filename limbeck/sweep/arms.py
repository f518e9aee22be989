"""The runs of a sweep: every arm with every seed, and the runs that tune an arm."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.recipe.load import Recipe, at, load_recipe
from limbeck.runtime.records import fingerprint
from limbeck.sweep.settings import Sweep, Tree, as_overrides, flat
from limbeck.types import LimbeckError

# The models that runs of their own make for all arms, by the key that takes them.
Models = Mapping[str, str]
# Longer names than this are cut for directories; what a file system takes is 255 bytes.
LONGEST_NAME = 120


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One variant of the recipe.

    Attributes:
        keys: dotted keys of the recipe that the arm sets.
    """

    name: str
    keys: Tree


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """One run of an arm.

    Attributes:
        keys: what it sets beside the seed, tuned values included.
        tuning: whether it is run to choose those values.
        recipe: complete, with its directory.
    """

    arm: str
    seed: int
    keys: Tree
    tuning: bool
    recipe: Recipe

    @property
    def directory(self) -> Path:
        return self.recipe.directory

    @property
    def label(self) -> str:
        """Name in messages."""
        tuned = f", tuning {self.directory.name}" if self.tuning else ""
        return f"{self.arm}, seed {self.seed}{tuned}"


def arms_of(sweep: Sweep) -> list[Arm]:
    """The arms in order: each named one times the grid.

    Raises:
        LimbeckError: two arms set the same.
    """
    named = {name: flat(changes) for name, changes in sweep.arms.items()} or {"": {}}
    arms: dict[str, Arm] = {}
    for (name, changes), point in itertools.product(named.items(), _points(sweep.grid)):
        title = _plain_name(",".join(part for part in (name, _point_name(point)) if part) or "base")
        if title in arms:
            # Two names that differ only in what no directory can be called.
            title = f"{title[: LONGEST_NAME - 9]}-{fingerprint([name, point])[:8]}"
        arms[title] = Arm(name=title, keys=changes | point)
    seen: dict[str, str] = {}
    for arm in arms.values():
        same = seen.setdefault(json.dumps(arm.keys, sort_keys=True), arm.name)
        if same != arm.name:
            raise LimbeckError(f"the arms {same} and {arm.name} are the same; expected each once")
    return list(arms.values())


def tuning_runs(sweep: Sweep, arm: Arm, models: Models) -> list[ArmRun]:
    """The runs that choose the tuned values of an arm: one per value, with the first seed.

    Args:
        models: what the keys of `first` take.

    Raises:
        LimbeckError: a recipe that is refused, with the arm's name.
    """
    return [tuning_run(sweep, arm, point, models) for point in _points(sweep.tune)] if sweep.tune else []


def tuning_run(sweep: Sweep, arm: Arm, point: Mapping[str, Any], models: Models) -> ArmRun:
    """The run of an arm with some values of the keys that are tuned."""
    place = Path("arms") / arm.name / "tune" / _plain_name(_point_name(point))
    return _run(sweep, arm, point, sweep.seeds[0], place, models, tuning=True)


def final_runs(sweep: Sweep, arm: Arm, tuned: Mapping[str, Any], models: Models) -> list[ArmRun]:
    """The runs of an arm that are compared: one per seed.

    Raises:
        LimbeckError: a recipe that is refused, with the arm's name.
    """
    places = {seed: Path("arms") / arm.name / f"seed={seed}" for seed in sweep.seeds}
    return [_run(sweep, arm, tuned, seed, places[seed], models, tuning=False) for seed in sweep.seeds]


def first_values(sweep: Sweep) -> Tree:
    """The first of the values to be tuned: they stand for the best ones until those are known."""
    return {key: values[0] for key, values in sweep.tune.items()}


def first_recipes(sweep: Sweep) -> dict[str, Recipe]:
    """Recipes that run before all arms, by the key that takes their student: teacher/ for teacher.model, and so on.

    Raises:
        LimbeckError: one is refused.
    """
    recipes = {}
    for key, tree in sweep.first.items():
        assert not isinstance(tree, str), "a sweep that was loaded holds it"
        with at(f"first.{key}"):
            place = str(sweep.directory / key.split(".")[-2])
            recipes[key] = load_recipe(tree, [f"output_dir={json.dumps(place)}"])
    return recipes


def _run(
    sweep: Sweep, arm: Arm, tuned: Mapping[str, Any], seed: int, place: Path, models: Models, *, tuning: bool
) -> ArmRun:
    assert not isinstance(sweep.recipe, str), "a sweep that was loaded holds it"
    own: Tree = {"train.seed": seed, "output_dir": str(sweep.directory / place)}
    # A file's name may hold a tilde or a slash, a run's may not.
    own["name"] = f"{sweep.name}/{arm.name}"
    own |= models
    elsewhere = flat(sweep.tune_on) if tuning else {}
    with at(f"arm {arm.name}"):
        recipe = load_recipe(sweep.recipe, as_overrides({**elsewhere, **arm.keys, **tuned, **own}))
    return ArmRun(arm=arm.name, seed=seed, keys=arm.keys | dict(tuned), tuning=tuning, recipe=recipe)


def _points(axes: Mapping[str, Sequence[Any]]) -> Iterator[Tree]:
    """Every combination of the values."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _point_name(point: Mapping[str, Any]) -> str:
    """name=fkl,temperature=2; the whole key where two end in the same word."""
    leaves = [key.rpartition(".")[2] for key in point]
    names = {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(point, leaves, strict=True)}
    return ",".join(f"{names[key]}={_value_name(value)}" for key, value in point.items())


def _value_name(value: Any) -> str:
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _plain_name(name: str) -> str:
    """Name that any file system takes, and a shell without quotes."""
    plain = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", name).strip("_.") or "_"
    return plain if len(plain) <= LONGEST_NAME else f"{plain[: LONGEST_NAME - 9]}-{fingerprint(name)[:8]}"
