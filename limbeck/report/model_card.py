"""The model card: README.md of the student, with the metadata the hub reads and what was measured.

Like the report it is made from the files of the run directory alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.recipe.response_source import credit_of, sampled_before
from limbeck.report.before_after import evidence
from limbeck.report.environment import environment
from limbeck.report.format import (
    code,
    count,
    duration,
    headline,
    markdown,
    megabytes,
    name_of,
    setting,
    share,
    share_of_teacher,
)
from limbeck.report.preference import preference_account
from limbeck.report.read_run import ITSELF, Run, number, read_run, score, value_at
from limbeck.runtime.console import on_one_line
from limbeck.runtime.files import write_text
from limbeck.runtime.rundir import RunDirectory

# Only these have a meaning of their own on the hub; a path or a file name would be taken for a repository.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
OBJECTIVE_NAMES = {"fkl": "forward KL", "rkl": "reverse KL", "csd": "concrete score distillation"}


def write_card(
    run_dir: Path, *, base_model: str | None = None, license: str | None = None, datasets: Sequence[str] = ()
) -> Path:
    """Write `README.md` of the student that a run hands on from the files of a run directory.

    Args:
        base_model: hub id of the model the student's weights began as; without it, the recipe's name for that model
            where it is a hub id, else none is declared.
        license: of the base model, as a hub license id; left out of the metadata where unknown.
        datasets: hub ids of the data sets the prompts came from; without them, the recipe's source where it is one.

    Raises:
        LimbeckError: `run_dir` is not a run directory.
    """
    run = read_run(run_dir)
    path = RunDirectory(run_dir).finished_student / "README.md"
    write_text(path, card(run, base_model=base_model, license=license, datasets=datasets))
    return path


def card(run: Run, *, base_model: str | None = None, license: str | None = None, datasets: Sequence[str] = ()) -> str:
    """The text of the card; see `write_card`."""
    import yaml

    base = base_model or _hub_id(_origin(run))
    source = _hub_id(value_at(run.recipe, "prompts.source"))
    versions = value_at(run.provenance, "versions")
    front = metadata(run, base_model=base, license=license, datasets=datasets or ([source] if source else ()))
    template = environment(escaped=False).get_template("card.md.j2")
    body = template.render(
        name=name_of(run),
        headline=headline(run),
        base=base,
        teacher=_teacher(run),
        origin=_without_folder(_origin(run)),
        chat=run.student.get("template") in ("chat", "alpaca"),
        answers=_answers(run),
        method=_method(run),
        evidence=evidence(run),
        examples=_examples(run),
        meanings=_meanings(run),
        source=_source(run),
        training=_training(run),
        versions=versions if isinstance(versions, Mapping) else {},
        revision=run.provenance.get("code_revision"),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{body}"


def metadata(run: Run, *, base_model: str | None, license: str | None, datasets: Sequence[str]) -> dict[str, Any]:
    """The front matter, in the hub's terms."""
    front: dict[str, Any] = {}
    if base_model:
        front |= {"base_model": base_model, "base_model_relation": "finetune"}
    front |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if license:
        front["license"] = license
    if datasets:
        front["datasets"] = list(datasets)
    front["tags"] = ["limbeck", "distillation", "knowledge-distillation"]
    if run.student.get("kept_blocks") or run.student.get("width"):
        front["tags"].append("pruned")
    results = _results(run)
    if results:
        front["model-index"] = [{"name": name_of(run), "results": results}]
    return front


def _results(run: Run) -> list[dict[str, Any]]:
    """Every metric of the student after training: one entry per data set, as the hub expects."""
    by_dataset: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in evidence(run):
        found = _after(run).get(line.name, {})
        value, low, high = (number(found, key) for key in ("mean", "low", "high"))
        if value is None:
            continue
        metric = {"type": line.name, "name": f"{line.label} ({line.unit})" if line.unit else line.label, "value": value}
        details: dict[str, Any] = {"examples": found["n"]} if number(found, "n") is not None else {}
        if low is not None and high is not None:
            details["interval_95"] = [low, high]
        by_dataset.setdefault(_dataset(run, line.name), []).append(metric | ({"args": details} if details else {}))
    return [
        {
            "task": {"type": "text-generation", "name": "Evaluation of a distilled student"},
            "dataset": {"type": kind, "name": name},
            "metrics": metrics,
        }
        for (kind, name), metrics in by_dataset.items()
    ]


def _dataset(run: Run, metric: str) -> tuple[str, str]:
    """Identifier and name of what a metric was measured on: the problems of a task, or the held-out prompts."""
    condition = metric.partition("@")[2]
    if condition and f"tasks@{condition}" in (value_at(run.scores, "rows.after") or {}):
        task, _, of_harness = condition.partition(",")
        if task == "lm_eval":
            return of_harness, f"{of_harness} (lm-evaluation-harness)"
        if task != "heldout":
            file = value_at(run.recipe, f"evaluate.groups.tasks.files.{task}")
            return task, f"{task} ({Path(file).name})" if isinstance(file, str) else task
    source = _source(run)
    return source, f"held-out prompts of {source}"


def _source(run: Run) -> str:
    """Where the prompts come from."""
    return _without_folder(value_at(run.recipe, "prompts.source")) or "the run"


def _teacher(run: Run) -> str | None:
    """Name of the teacher's model, or of each of several; that of the student's where it taught itself."""
    several = value_at(run.recipe, "teachers")
    if isinstance(several, Mapping) and several:
        return " and ".join(filter(None, (_without_folder(value_at(own, "model")) for own in several.values())))
    model = value_at(run.recipe, "teacher.model")
    return _without_folder(_origin(run) if model in ITSELF else model)


def _without_folder(name: Any) -> str | None:
    """A hub id or another name as it is; of a path only the last part, since its folder exists on this machine
    alone."""
    return _hub_id(name) or (Path(name).name if isinstance(name, str) else None)


def _examples(run: Run) -> dict[str, str]:
    """How many examples each metric is over."""
    both = [(name, score(run, part, name)) for part in ("before", "after") for name in value_at(run.scores, part) or {}]
    return {name: f"{found['n']:,}" for name, found in both if found and number(found, "n") is not None}


def _meanings(run: Run) -> dict[str, str]:
    """What each metric means, once for all its conditions."""
    said = {}
    for line in evidence(run):
        label = line.label.rpartition(" (")[0] if "@" in line.name else line.label
        if line.meaning:
            said.setdefault(label, line.meaning)
    return said


def _origin(run: Run) -> Any:
    """The model that the student's weights started from; None for fresh weights."""
    if value_at(run.recipe, "student.init") == "scratch":
        return None
    return value_at(run.recipe, "student.model") or value_at(run.recipe, "teacher.model")


def _hub_id(name: Any) -> str | None:
    if not isinstance(name, str):
        return None
    bare = name.removeprefix("hub:")
    return bare if _HUB_ID.fullmatch(bare) and (bare != name or not Path(name).exists()) else None


def _after(run: Run) -> Mapping[str, Mapping[str, Any]]:
    names = value_at(run.scores, "after")
    found = {name: score(run, "after", name) for name in names} if isinstance(names, Mapping) else {}
    return {name: value for name, value in found.items() if value}


def _method(run: Run) -> list[str]:
    """Sentences on how the student was made."""
    said = []
    kept, layers = run.student.get("kept_blocks"), number(run.student, "teacher_layers")
    if isinstance(kept, list) and layers:
        blocks = markdown(", ".join(str(block) for block in kept))
        said.append(f"The student is the starting model with {len(kept)} of its {layers:.0f} blocks kept ({blocks}).")
    width = run.student.get("width")
    if isinstance(width, Mapping) and width:
        sizes = markdown(", ".join(f"{name} {size}" for name, size in width.items()))
        said.append(f"Its blocks are narrowed ({sizes}): what stays has the largest activations on calibration texts.")
    own, ratio = number(run.student, "parameters"), share_of_teacher(run.student)
    if own:
        size = number(run.student, "size_mb")
        said.append(
            f"It has {count(own)} parameters"
            + (f", {share(ratio)} of the teacher's" if ratio else "")
            + (f", {megabytes(size)} on disk." if size else ".")
        )
    said += _few_bits(run)
    source, author = value_at(run.recipe, "prompts.source"), value_at(run.recipe, "responses.source.name")
    if source and author:
        drawn = [
            f"{label} {setting(number(run.recipe, f'responses.{key}'))}"
            for key, label in (("temperature", "sampling temperature"), ("top_p", "top-p"))
            if number(run.recipe, f"responses.{key}") is not None
        ]
        written = markdown(credit_of(author)) + (f" ({', '.join(drawn)})" if sampled_before(author) else "")
        said.append(f"Prompts: {markdown(_source(run))}. Responses: {written}.")
    objective = value_at(run.recipe, "objective.name")
    if objective:
        shown = markdown(OBJECTIVE_NAMES.get(str(objective), str(objective)))
        said.append(
            f"Objective: {shown} (`{code(objective)}`) at temperature "
            f"{setting(number(run.recipe, 'objective.temperature') or 1.0)}, per response token."
        )
    said += [f"{sentence[0].upper()}{markdown(sentence[1:])}." for sentence in preference_account(run)[:2]]
    return said


def _few_bits(run: Run) -> list[str]:
    """A sentence on weights that are in few bits, where they are."""
    found = run.student.get("quantized")
    formats = found.get("formats") if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(formats, Mapping):
        return []
    kinds = ", ".join(f"{number(formats, name) or 0:.0f} in `{code(name)}`" for name in sorted(formats))
    how = (
        "quantised weights stayed, with adapters trained beside"
        if found.get("weights") == "frozen"
        else ("weights were trained on the grid of these formats, so that a GGUF export holds them bit for bit")
    )
    size = number(found, "size_mb")
    return [
        f"Weights in few bits, matrices by format: {kinds}{f', {megabytes(size)} in all' if size else ''}; the {how}."
    ]


_TEMPLATES = {
    "chat": "the teacher's chat template (`tokenizer.apply_chat_template`)",
    "alpaca": "the Alpaca wording, which its chat template writes (`tokenizer.apply_chat_template`)",
    "plain": "prompts as plain text, without a chat template",
}


def _answers(run: Run) -> str:
    """Prompt format that it was trained with and the end of its answers; "" where no record says so."""
    template, ends = run.student.get("template"), run.student.get("ends")
    if template not in _TEMPLATES or not isinstance(ends, list):
        return ""
    options = run.student.get("chat_options")
    given = [f"`{code(f'{key}={value!r}')}`" for key, value in options.items()] if isinstance(options, Mapping) else []
    with_options = f" with {' '.join(given)}" if given else ""
    said = f"The student was trained with {_TEMPLATES[template]}{with_options}"
    stops = " or ".join(f"`{code(on_one_line(str(end)))}`" for end in ends)
    return f"{said}, and {f'ends an answer with {stops}, where `generate` stops' if stops else 'knows no end'}."


def _training(run: Run) -> list[tuple[str, str]]:
    train = value_at(run.recipe, "train")
    settings = train if isinstance(train, Mapping) else {}
    # A bar ends a cell even within code.
    rows = [(f"`{code(k)}`".replace("|", "\\|"), markdown(_plain(v))) for k, v in settings.items()]
    if run.steps:
        last = run.steps[-1]
        rows.append(("steps taken", f"{last['step']:,.0f}"))
        rows += [("tokens in the loss", f"{tokens:,.0f}") for tokens in [number(last, "tokens")] if tokens is not None]
        rows += [("time in the loop", duration(spent)) for spent in [number(last, "seconds")] if spent is not None]
    return rows


def _plain(value: Any) -> str:
    return setting(value) if isinstance(value, float) else "none" if value in (None, [], ()) else str(value)
