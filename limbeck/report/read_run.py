"""Reading a run directory, whole or half finished: its files, and a list of missing or broken ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.report.values import LARGEST, cleaned, of_mappings, parsed, shown
from limbeck.runtime.json_lines import json_lines
from limbeck.types import LimbeckError

SAMPLES = "samples.jsonl"
# In the order of the stages, each with what its absence means to the reader.
FILES = {
    "recipe.resolved.yaml": "the recipe was not written down",
    "provenance.json": "versions, seeds and fingerprints are not recorded",
    "student/student.json": "there is no finished student",
    "metrics.jsonl": "training has not logged a step",
    SAMPLES: "there are no sample answers",
    "scores.json": "the student has not been evaluated",
}
OF_TRAINING = ("student/student.json", "metrics.jsonl", SAMPLES)
# Absent where the student wrote none of what it was trained on, and not missed then.
WRITTEN = "rounds/examples.jsonl"
# Absent without preference tuning.
REWARDS = "preferences/rewards.jsonl"
RECIPE = "recipe.resolved.yaml"
STAGE_ORDER = ("prompts", "respond", "teach", "train", "prefer", "evaluate", "report")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Content of a run directory's files. A missing file is an empty value here and an entry in `missing`.

    Attributes:
        recipe_text: the resolved recipe as written; `recipe` is the same, parsed.
        alone: an evaluation of a student that was not trained here, so that nothing of a training is missed.
        stages: the manifests, in the order in which the stages were started.
        steps: one mapping per logging step of the training.
        rewards: one mapping per step of the preference tuning.
        searches: what was tried to find the learning rate, by the training it was for.
        written: some of the responses that were trained on, of both authors, as token ids.
        drafting: what the group `speculation` found beside its scores; empty where it was not asked.
        missing: file to what its absence means.
        broken: one sentence for each file, or part of one, that could not be read.
    """

    directory: Path
    alone: bool = False
    recipe_text: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    student: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Mapping[str, Any], ...] = ()
    steps: tuple[Mapping[str, Any], ...] = ()
    rewards: tuple[Mapping[str, Any], ...] = ()
    searches: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    written: tuple[Mapping[str, Any], ...] = ()
    samples: tuple[Mapping[str, Any], ...] = ()
    scores: Mapping[str, Any] = field(default_factory=dict)
    drafting: Mapping[str, Any] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    broken: tuple[str, ...] = ()

    def record(self, stage: str) -> Mapping[str, Any]:
        """What a stage has recorded; empty where it has not."""
        return next((record for record in self.stages if record["stage"] == stage), {})


def read_run(run_dir: Path) -> Run:
    """Read the files of a run that exist.

    Raises:
        LimbeckError: `run_dir` is no directory, or holds no file of a run.
    """
    if not run_dir.is_dir():
        raise LimbeckError(f"{run_dir} is no directory; expected a run directory: give the one `limbeck run` wrote")
    broken: list[str] = []
    stages = _stages(run_dir, broken)
    if not stages and not any((run_dir / name).is_file() for name in FILES):
        raise LimbeckError(
            f"{run_dir} holds none of {', '.join(FILES)}; expected a run directory: give the one `limbeck run` wrote"
        )
    recipe_text = text_field(run_dir, RECIPE, broken)
    alone = any(row["stage"] == "evaluate" and row.get("alone") is True for row in stages)
    scores = _scores(run_dir, broken)
    unmissed = set(OF_TRAINING) if alone else set()
    if (after := scores.get("after")) and "rouge_l" not in after:
        # Answers are written to be compared with the teacher's, and shown then.
        unmissed.add(SAMPLES)
    expected = {name: what for name, what in FILES.items() if name not in unmissed}
    return Run(
        directory=run_dir,
        alone=alone,
        recipe_text=shown(recipe_text),
        recipe=_recipe(recipe_text, broken),
        provenance=_object(run_dir, "provenance.json", broken),
        student=_object(run_dir, "student/student.json", broken),
        stages=stages,
        steps=tuple(row for row in lines_of(run_dir, "metrics.jsonl", broken) if number(row, "step") is not None),
        rewards=tuple(row for row in lines_of(run_dir, REWARDS, broken) if number(row, "step") is not None),
        searches={
            path.stem: found
            for path in sorted((run_dir / "learning_rate").glob("*.json"))
            if (found := _object(run_dir, f"learning_rate/{path.name}", broken))
        },
        written=tuple(lines_of(run_dir, WRITTEN, broken)),
        samples=tuple(lines_of(run_dir, SAMPLES, broken)),
        scores=scores,
        drafting=_drafting(run_dir, broken),
        missing={name: what for name, what in expected.items() if not (run_dir / name).is_file()},
        broken=tuple(broken),
    )


def read_scores(run_dir: Path) -> Run:
    """Recipe and scores alone: of a long training the metrics take seconds to read."""
    broken: list[str] = []
    recipe = _recipe(text_field(run_dir, RECIPE, broken), broken)
    return Run(directory=run_dir, recipe=recipe, scores=_scores(run_dir, broken), broken=tuple(broken))


def number(mapping: Mapping[str, Any], key: str) -> float | None:
    """The finite number under a key, or None. A dotted key looks into nested mappings."""
    value = value_at(mapping, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        return None
    return float(value)


def value_at(mapping: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key, or None."""
    value: Any = mapping
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value


def teacher_of(recipe: Mapping[str, Any]) -> str | None:
    """The teacher's model, or each of several with its name, as pages show it; None where the recipe names none."""
    several = value_at(recipe, "teachers")
    if isinstance(several, Mapping) and several:
        return ", ".join(f"{name}: {value_at(own, 'model')}" for name, own in several.items())
    model = value_at(recipe, "teacher.model")
    return ITSELF.get(model, model) if isinstance(model, str) else None


# Teachers that are the student itself, as pages show them.
ITSELF = {
    "base": "the student as it began",
    "live": "the student as it is",
    "ema": "the moving average of the student",
}


def response_id(sample: Mapping[str, Any], side: str) -> str | None:
    """`Response.id` of an answer ("teacher", "before", "after") in a line of samples.jsonl; None where it has none."""
    found = value_at(sample, f"responses.{side}.id")
    return found if isinstance(found, str) else None


def score(run: Run, part: str, metric: str) -> Mapping[str, Any] | None:
    """A score with a finite mean, or None."""
    found = value_at(run.scores, part)
    # Not by a dotted key: a condition such as T=0.7 has a dot of its own.
    found = found.get(metric) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) and number(found, "mean") is not None else None


def text_field(run_dir: Path, name: str, broken: list[str]) -> str:
    """A file's text; empty where there is none, or where it cannot be read, which is said in `broken`."""
    path = run_dir / name
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        broken.append(f"{name} cannot be read: {error}")
        return ""


def lines_of(run_dir: Path, name: str, broken: list[str]) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; what else stands in it is left out, which is said in `broken`."""
    rows, bad = [], []
    for count, line in json_lines(text_field(run_dir, name, broken)):
        try:
            row = parsed(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad.append(count)
    if bad:
        broken.append(
            f"{name}: line {', '.join(map(str, bad[:5]))}{' …' if len(bad) > 5 else ''} left out, not an object"
        )
    return rows


def _object(run_dir: Path, name: str, broken: list[str]) -> dict[str, Any]:
    text = text_field(run_dir, name, broken)
    if not text:
        return {}
    try:
        value = parsed(text)
    except ValueError as error:
        broken.append(f"{name} is not JSON: {error}")
        return {}
    if not isinstance(value, dict):
        broken.append(f"{name} holds a {type(value).__name__} where an object belongs")
        return {}
    return value


def _recipe(text: str, broken: list[str]) -> Mapping[str, Any]:
    from limbeck.recipe.yaml_text import parse

    if not text:
        return {}
    try:
        value = cleaned(parse(text, RECIPE))
    except LimbeckError as error:
        broken.append(f"{RECIPE} is not YAML: {str(error).partition(': ')[2]}")
        return {}
    if not isinstance(value, dict):
        broken.append(f"{RECIPE} holds a {type(value).__name__} where sections belong")
        return {}
    return value


def _scores(run_dir: Path, broken: list[str]) -> dict[str, Any]:
    """The scores, in the shape that everything after this relies on: mappings of mappings, descriptions in words."""
    scores = _object(run_dir, "scores.json", broken)
    for part in ("before", "after", "change", "metrics"):
        if part in scores:
            whole = of_mappings(scores[part])
            if whole != scores[part]:
                broken.append(f"scores.json: {part} holds what is no score and is left out")
            scores[part] = whole
    if "rows" in scores:
        scores["rows"] = of_mappings(scores["rows"])
    for about in scores.get("metrics", {}).values():
        for name in about.keys() - {"teacher_value"}:
            about[name] = about[name] if about[name] is None else str(about[name])
    return scores


def _drafting(run_dir: Path, broken: list[str]) -> dict[str, Any]:
    detail = _object(run_dir, "scores/after.speculation.json", broken).get("detail")
    return detail if isinstance(detail, dict) else {}


def _stages(run_dir: Path, broken: list[str]) -> tuple[Mapping[str, Any], ...]:
    rows = []
    for path in sorted((run_dir / "stages").glob("*.json")):
        name = f"stages/{path.name}"
        row = _object(run_dir, name, broken)
        if row:
            rows.append({"stage": path.stem, **row})

    def order(row: Mapping[str, Any]) -> tuple[int, str]:
        stage = str(row["stage"])
        return (STAGE_ORDER.index(stage) if stage in STAGE_ORDER else len(STAGE_ORDER), str(row.get("started", "")))

    return tuple(sorted(rows, key=order))
