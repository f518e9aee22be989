"""The settings of a sweep: one YAML file around a recipe, as strict as a recipe; see docs/sweeping.md."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from limbeck.evaluation.scores.metrics import describe_metric, known_metrics
from limbeck.fields import STRICT, Count, Fraction, Seed
from limbeck.recipe.files import read_yaml, shipped_recipes
from limbeck.recipe.load import apply_override, known_keys, optional_sections, recipe_tree
from limbeck.recipe.messages import explain_mistake, suggestion
from limbeck.recipe.yaml_text import dump, plain_tree
from limbeck.sweep.template import check_template
from limbeck.types import LimbeckError

Tree = dict[str, Any]
AxisValues = Annotated[tuple[Any, ...], Field(min_length=1)]
RESOLVED = "sweep.resolved.yaml"
# Each is checked before the first one runs; checking more would take too long.
MOST_RUNS = 5_000


@dataclass(config=STRICT, kw_only=True)
class HalvingSection:
    at: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.25, 0.5)
    """Shares of the optimizer steps after which arms are compared."""
    keep: Fraction = 0.5
    """Share of the arms that goes on each time, rounded up."""
    metric: str = "forward_kl"
    """Of the evaluation, on held-out prompts; the mean over an arm's seeds counts."""


@dataclass(config=STRICT, kw_only=True)
class Sweep:
    """Arms around one recipe."""

    name: str = "sweep"
    """The directory is runs/sweeps/NAME unless output_dir says otherwise."""
    output_dir: str | None = None
    recipe: str | Tree
    """A shipped name, a file or the sections themselves."""
    first: dict[str, str | Tree] = field(default_factory=dict)
    """Recipes that run first, by the key that takes their student, such as {teacher.model: lab/teacher}."""
    teacher_run: str | Tree | None = None
    """Short for first: {teacher.model: ...}."""
    set: Tree = field(default_factory=dict)
    """Changes of the recipe for all arms."""
    grid: dict[str, AxisValues] = field(default_factory=dict)
    """Dotted keys and their values; every combination is an arm."""
    arms: dict[str, Tree] = field(default_factory=dict)
    """Arms by name, each with its changes of the recipe; with a grid, each arm times the grid."""
    tune: dict[str, AxisValues] = field(default_factory=dict)
    """Dotted keys of which each arm takes the values that are best with its first seed."""
    tune_metric: str = "forward_kl"
    """What is best: a metric of the evaluation after training."""
    tune_extend: Annotated[int, Field(ge=0)] = 0
    """Further values that an arm may try beyond an end of a list of positive numbers, each by the ratio of the last
    two, for as long as its best is the end."""
    tune_on: Tree = field(default_factory=dict)
    """Changes of the recipe for the runs that tune, such as {prompts.heldout: dev.jsonl}: values are then chosen on
    other prompts than the arms are compared on."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """train.seed of the runs of every arm; the responses are the same for all."""
    command: str | None = None
    """Template of the command that starts each run, with {command} and, where wanted, {run} and {arm}, such as
    'srun --gres=gpu:1 {command}'; without it runs are made on this machine."""
    parallel: Count = 1
    """Number of arms that run side by side; on this machine, each has its share of the processors."""
    halving: HalvingSection | None = None

    @property
    def directory(self) -> Path:
        return Path(self.output_dir) if self.output_dir else Path("runs") / "sweeps" / self.name

    @property
    def swept(self) -> dict[str, str]:
        """Every dotted key that differs between arms, or between the runs of one, and where it stands."""
        of_arms = {key: "arms" for changes in self.arms.values() for key in flat(changes)}
        fixed = {"train.seed": "seeds"} | dict.fromkeys(self.first, "first")
        return fixed | of_arms | dict.fromkeys(self.tune, "tune") | dict.fromkeys(self.grid, "grid")

    @property
    def size(self) -> int:
        """Number of runs, those that tune included; counted without making them."""
        arms = max(1, len(self.arms)) * math.prod(map(len, self.grid.values()))
        tuning = math.prod(map(len, self.tune.values())) if self.tune else 0
        return arms * (len(self.seeds) + tuning)


_ADAPTER = TypeAdapter(Sweep)
KEYS = tuple(f.name for f in fields(Sweep))
_KNOWN = (*KEYS, *(f"halving.{f.name}" for f in fields(HalvingSection)))


def load_sweep(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Sweep:
    """A validated sweep from a shipped name, a YAML file, a sweep's directory or a mapping.

    Args:
        overrides: `section.key=value` changes the recipe of every arm (`prompts.*` those that run first, too);
            `sweep.key=value` and `output_dir=` change the sweep itself.

    Raises:
        LimbeckError: unknown sweep or key (with the suggestion known one), a wrong value, an override of what is swept.
    """
    tree, beside = _read(source)
    own = [o.removeprefix("sweep.") for o in overrides if _is_of_the_sweep(o)]
    of_recipe = [o for o in overrides if not _is_of_the_sweep(o)]
    for override in own:
        apply_override(tree, override)
    sweep = _validate(tree)
    if sweep.teacher_run is not None:
        if "teacher.model" in sweep.first:
            raise LimbeckError("teacher_run is short for first.teacher.model, which is there too; remove one of them")
        sweep = replace(sweep, first={"teacher.model": sweep.teacher_run, **sweep.first}, teacher_run=None)
    _check(sweep)
    _refuse_swept(sweep, of_recipe)
    about_prompts = [o for o in of_recipe if o.startswith(("prompts.", "prompts="))]
    # From here on the sweep says all of itself: no file that might change is read again.
    return replace(
        sweep,
        recipe=recipe_tree(_beside(sweep.recipe, beside), [*as_overrides(sweep.set), *of_recipe]),
        first={key: recipe_tree(_beside(r, beside), about_prompts) for key, r in sweep.first.items()},
        set={},
    )


def settings_to_yaml(sweep: Sweep) -> str:
    """The sweep with everything spelled out; `load_sweep` of it gives the same sweep."""
    return dump(plain_tree(asdict(sweep)))


def as_overrides(changes: Mapping[str, Any]) -> list[str]:
    """Changes of a recipe, with dotted or nested keys, as overrides; a value that is no section is set as a whole."""
    return [f"{key}={json.dumps(value)}" for key, value in flat(changes).items()]


def flat(changes: Mapping[str, Any], prefix: str = "") -> Tree:
    """Changes of a recipe with dotted keys alone."""
    sections = {key.rpartition(".")[0] for key in known_keys()}
    found: Tree = {}
    for name, value in changes.items():
        key = f"{prefix}{name}"
        # A group without options is a group more, and a section that was left out is there with its defaults; any
        # other empty section changes nothing.
        whole = not value and (prefix == "evaluate.groups." or key in optional_sections())
        inner = isinstance(value, Mapping) and key in sections and not whole
        found |= flat(value, f"{key}.") if inner else {key: value}
    return found


def _read(source: str | Path | Mapping[str, Any]) -> tuple[Tree, Path | None]:
    """The tree of a sweep, and the folder that its relative paths are tried in first."""
    if isinstance(source, Mapping):
        return dict(source), None
    resolved = Path(source) / RESOLVED
    if resolved.is_file():
        # A sweep that was started elsewhere, or moved: it continues where it lies now.
        return read_yaml(resolved, "sweep") | {"output_dir": str(source)}, None
    return read_yaml(source, "sweep"), Path(source).parent if Path(source).is_file() else None


def _is_of_the_sweep(override: str) -> bool:
    return override.startswith(("sweep.", "output_dir="))


def _beside(recipe: str | Tree, folder: Path | None) -> str | Tree:
    if folder is None or not isinstance(recipe, str) or recipe in shipped_recipes():
        return recipe
    return str(folder / recipe) if (folder / recipe).is_file() else recipe


def _validate(tree: Tree) -> Sweep:
    tree = plain_tree(tree)
    try:
        return _ADAPTER.validate_json(json.dumps(tree))
    except ValidationError as error:
        raise LimbeckError(explain_mistake(error, _KNOWN)) from None


def _check(sweep: Sweep) -> None:
    if sweep.command is not None:
        check_template(sweep.command)
    parts = Path(sweep.name).parts
    if not parts or ".." in parts or Path(sweep.name).is_absolute() or not sweep.name.isprintable():
        raise LimbeckError(f"name: got {sweep.name!r}; expected a plain name, a path belongs in output_dir")
    if sweep.size > MOST_RUNS:
        raise LimbeckError(
            f"the sweep has {sweep.size:,} runs; expected at most {MOST_RUNS:,}: give grid, tune, arms or seeds fewer "
            "values, or make several sweeps of it"
        )
    for key in sweep.first:
        if key.rpartition(".")[2] != "model" or key not in known_keys():
            near = suggestion(key, [known for known in known_keys() if known.endswith(".model")])
            raise LimbeckError(f"first: got {key!r}; expected the key of a model, such as teacher.model{near}")
    for key in ("tune_on", "tune_extend"):
        if getattr(sweep, key) and not sweep.tune:
            raise LimbeckError(f"{key} is about the runs that tune, but nothing is tuned; add tune, or remove {key}")
    of_arms = [key for changes in sweep.arms.values() for key in flat(changes)]
    for key in flat(sweep.tune_on):
        if key in ("train.seed", "output_dir", "name", *sweep.grid, *sweep.tune, *of_arms, *sweep.first):
            raise LimbeckError(f"tune_on: {key} is what the arms differ in; expected a key that they have in common")
    for key in (*sweep.grid, *sweep.tune, *of_arms):
        if key in ("train.seed", "output_dir", "name"):
            remedy = "list the seeds in seeds" if key == "train.seed" else "the sweep names its runs itself"
            raise LimbeckError(f"{key} cannot be swept; {remedy}")
        if sum(key in there for there in (sweep.grid, sweep.tune, of_arms, sweep.first)) > 1:
            raise LimbeckError(f"{key} stands in two of grid, arms, tune and first; expected it in one")
    for key, values in {**sweep.grid, **sweep.tune}.items():
        if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
            raise LimbeckError(f"{key}: got {list(values)}, a value twice; expected each once")
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise LimbeckError(f"seeds: got {list(sweep.seeds)}, a seed twice; expected each once")
    for key, metric in _chosen_by(sweep):
        if metric.partition("@")[0] not in known_metrics():
            raise LimbeckError(f"{key}: no metric {metric!r}{suggestion(metric, tuple(known_metrics()))}")
        if describe_metric(metric).better == "context":
            raise LimbeckError(f"{key}: {metric} is the teacher's own; expected a metric of the student")
    if sweep.halving and list(sweep.halving.at) != sorted(set(sweep.halving.at)):
        raise LimbeckError(f"halving.at: got {list(sweep.halving.at)}; expected ascending shares, such as [0.25, 0.5]")


def _chosen_by(sweep: Sweep) -> list[tuple[str, str]]:
    by_tuning = [("tune_metric", sweep.tune_metric)] if sweep.tune else []
    return by_tuning + ([("halving.metric", sweep.halving.metric)] if sweep.halving else [])


def _refuse_swept(sweep: Sweep, overrides: Sequence[str]) -> None:
    """An override of what the arms differ in would be lost, or make them all the same."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        for swept, where in sweep.swept.items():
            if f"{swept}.".startswith(f"{key}.") or f"{key}.".startswith(f"{swept}."):
                raise LimbeckError(
                    f"{override!r} would change what is swept ({swept} in {where}); write sweep.{where}=... instead"
                )
