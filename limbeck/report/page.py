"""report.html: one file, no request to anywhere, readable without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from limbeck.report import format
from limbeck.report.before_after import evidence
from limbeck.report.charts import HEIGHT, WIDTH, charts
from limbeck.report.drafting import drafting
from limbeck.report.environment import environment
from limbeck.report.on_policy import account, exchanges, warned
from limbeck.report.outcome import harm
from limbeck.report.preference import preference_account
from limbeck.report.rate_search import search_charts
from limbeck.report.read_run import Run, number, read_run, response_id, score, teacher_of, value_at
from limbeck.report.stand_ins import stand_in_table
from limbeck.runtime.files import write_text


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run directory from those of its files that exist.

    Raises:
        LimbeckError: `run_dir` is not a run directory.
    """
    path = run_dir / "report.html"
    write_text(path, render(read_run(run_dir)))
    return path


# More blocks than this are no model's, and no picture.
MOST_BLOCKS = 4096
# What a page of a student that was not trained here says of its recipe.
OF_AN_EVALUATION = ("teacher", "student", "prompts")


def render(run: Run) -> str:
    """The page of a run. Every text from the run is escaped by the template engine."""
    templates = files("limbeck.report") / "templates"
    style, script = ((templates / name).read_text(encoding="utf-8") for name in ("style.css", "hover.js"))
    curves = charts(run) + search_charts(run)
    template = environment(escaped=True).get_template("report.html.j2")
    return template.render(
        style=style,
        script=script,
        run=run,
        name=format.name_of(run),
        headline=format.headline(run),
        harm=harm(run),
        facts=_facts(run),
        tiles=_tiles(run),
        charts=[(group, list(some)) for group, some in groupby(curves, key=lambda chart: chart.group)],
        warned=warned(run),
        account=account(run),
        exchanges=exchanges(run),
        preference=preference_account(run),
        drawing=(WIDTH, HEIGHT),
        points={chart.name: chart.points for chart in curves},
        evidence=evidence(run),
        stand_ins=stand_in_table(run),
        drafting=drafting(run),
        examples=_examples(run),
        confidence=number(run.scores, "confidence") or 0.95,
        samples=[_sample(row, run.alone) for row in run.samples],
        anatomy=_anatomy(run),
        sizes=_sizes(run),
        stages=_stages(run),
        provenance=_provenance(run),
    )


# Facts that hold unless a recipe says otherwise.
_USUAL = (("the teacher sees", "prompt"),)


def _facts(run: Run) -> list[tuple[str, str]]:
    """Short facts from the recipe."""
    facts = [("teacher", name)] if (name := teacher_of(run.recipe)) is not None else []
    for label, keys in (
        ("the teacher sees", ("teacher.sees.name",)),
        ("several teachers by", ("combine.name",)),
        ("student", ("student.model", "student.init")),
        ("prompts", ("prompts.source", "prompts.path")),
        ("responses by", ("responses.source.name",)),
        ("objective", ("objective.name",)),
        ("temperature", ("objective.temperature",)),
        ("epochs", ("train.num_train_epochs",)),
        ("preferred by", ("preference.pairs.name",)),
        ("seed", ("train.seed", "seed")),
    ):
        if run.alone and label not in OF_AN_EVALUATION:
            continue
        found = next((value for key in keys if (value := value_at(run.recipe, key)) is not None), None)
        if found is not None and not isinstance(found, Mapping | list) and (label, found) not in _USUAL:
            facts.append((label, format.setting(found) if isinstance(found, float) else str(found)))
    return facts + _aligned(run) + _left_out(run) + _verified(run) + _paid(run)


def _aligned(run: Run) -> list[tuple[str, str]]:
    """Share of the student's tokens that were compared with those of a teacher with other tokens."""
    found = number(run.record("train"), "aligned")
    return [] if found is None else [("compared across tokenizers", f"{found:.1%} of the student's tokens")]


# Rows of the data that the run did without: the stage that left them out, its count, and why.
_WITHOUT = (
    ("prompts", "duplicates", "ask what an earlier row asks"),
    ("prompts", "contradicted", "of them with another answer"),
    ("respond", "dropped_too_long", "are too long"),
)


def _left_out(run: Run) -> list[tuple[str, str]]:
    """How many rows of the data were left out, and why."""
    counts = [(number(run.record(stage), name), why) for stage, name, why in _WITHOUT]
    said = ", ".join(f"{count:,.0f} {why}" for count, why in counts if count)
    return [("rows left out", said)] if said else []


def _verified(run: Run) -> list[tuple[str, str]]:
    """How many training prompts got a right answer, where answers were checked, and why answers failed."""
    record = run.record("respond").get("verified")
    if not isinstance(record, Mapping):
        return []
    right, prompts, left_out = (number(record, name) for name in ("right", "prompts", "left_out"))
    if right is None or prompts is None:
        return []
    rest = f", {left_out:.0f} left out" if left_out else ""
    label = "chosen by a judge" if record.get("by") == "judge" else "right answers"
    failures = record.get("failures")
    counts = {why: number(failures, why) for why in failures} if isinstance(failures, Mapping) else {}
    said = ", ".join(f"{count:,.0f} {why}" for why, count in counts.items() if count)
    failed = f"; answers that failed: {said}" if said else ""
    return [(label, f"for {right:.0f} of {prompts:.0f} training prompts{rest}{failed}")]


def _paid(run: Run) -> list[tuple[str, str]]:
    """What the answers of hosted teachers cost."""
    record = run.record("respond").get("paid")
    facts = []
    for model, paid in record.items() if isinstance(record, Mapping) else ():
        usd, replies = (number(paid, name) if isinstance(paid, Mapping) else None for name in ("usd", "replies"))
        if usd is not None and replies is not None:
            facts.append(("paid", f"{usd:,.2f} dollars to {model} for {replies:,.0f} replies"))
    return facts


def _tiles(run: Run) -> list[dict[str, str]]:
    """The main figures: value, label, and a remark."""
    tiles = []
    ratio = format.share_of_teacher(run.student)
    if ratio is not None:
        own = format.count(number(run.student, "parameters"))
        tiles.append({"value": format.share(ratio), "label": "of the teacher's parameters", "remark": f"{own} remain"})
    for metric, label, digits in (
        ("forward_kl", "forward KL, nats/token", 3),
        ("top1_agreement", "top-1 agreement", 3),
        ("rouge_l", "ROUGE-L to the teacher", 3),
    ):
        before, after = score(run, "before", metric), score(run, "after", metric)
        if after:
            remark = f"from {format.figure(before['mean'], digits)}" if before else "not measured before training"
            remark = "" if run.alone else remark
            tiles.append({"value": format.figure(after["mean"], digits), "label": label, "remark": remark})
    seconds = [row["seconds"] for row in _stages(run) if row["seconds"] is not None]
    if seconds:
        remark = f"{len(seconds)} stage{'' if len(seconds) == 1 else 's'}"
        tiles.append({"value": format.duration(sum(seconds)), "label": "in all", "remark": remark})
    peaks = [(p, str(s["stage"])) for s in run.stages if (p := number(s, "peak_memory_mib")) is not None]
    if peaks:
        peak, stage = max(peaks)
        tiles.append({"value": format.memory(peak), "label": "peak memory", "remark": f"in {stage}"})
    return tiles


def _examples(run: Run) -> int | None:
    for part in ("after", "before"):
        for found in (value_at(run.scores, part) or {}).values():
            if isinstance(found, Mapping) and number(found, "n") is not None:
                return int(found["n"])
    return None


def _sample(row: Mapping[str, Any], alone: bool) -> dict[str, Any]:
    own = "Student" if alone else "Student after"
    answers = [
        {
            "who": who,
            "label": label,
            "text": str(row[who]),
            "rouge": number(row, f"rouge_{who}"),
            "id": response_id(row, who),
        }
        for who, label in (
            ("teacher", "Teacher"),
            ("before", "Student before"),
            ("after", own),
        )
        if row.get(who) is not None
    ]
    return {"prompt": str(row.get("prompt", "")), "answers": answers}


def _anatomy(run: Run) -> list[dict[str, Any]]:
    """One cell per block of the teacher: whether it was kept, and its score."""
    kept, total = run.student.get("kept_blocks"), number(run.student, "teacher_layers")
    if not isinstance(kept, list) or total is None or total > MOST_BLOCKS:
        return []
    scores = run.student.get("block_scores")
    scores = scores if isinstance(scores, list) and len(scores) == int(total) else [None] * int(total)
    finite = [s for s in scores if isinstance(s, int | float)]
    top = max([*finite, 0]) or 1.0
    order = run.student.get("removed_blocks")
    order = order if isinstance(order, list) else []
    turns = {block: turn for turn, block in enumerate(order, start=1) if isinstance(block, int)}
    cells = []
    for block, value in enumerate(scores):
        stays = block in kept
        remark = f"block {block}: {'kept' if stays else 'removed'}"
        if block in turns:
            remark += f", taken out as number {turns[block]}"
        if isinstance(value, int | float):
            remark += f", influence {format.figure(value)}"
        height = round(100 * (max(0.0, value) / top) ** 0.5, 1) if isinstance(value, int | float) else None
        cells.append({"block": block, "kept": stays, "height": height, "remark": remark})
    return cells


def _sizes(run: Run) -> list[dict[str, Any]]:
    """Teacher and student side by side: parameters, megabytes, blocks."""
    rows = []
    for label, teacher, own, form in (
        ("Parameters", number(run.student, "teacher_parameters"), number(run.student, "parameters"), format.count),
        ("On disk", number(run.student, "teacher_size_mb"), number(run.student, "size_mb"), format.megabytes),
        ("Blocks", number(run.student, "teacher_layers"), _kept(run), format.count),
    ):
        if own is not None:
            rows.append(
                {
                    "label": label,
                    "teacher": "" if teacher is None else form(teacher),
                    "student": form(own),
                    "share": None if not teacher else round(100 * own / teacher, 1),
                }
            )
    return rows


def _kept(run: Run) -> float | None:
    kept = run.student.get("kept_blocks")
    return float(len(kept)) if isinstance(kept, list) else None


def _stages(run: Run) -> list[dict[str, Any]]:
    # While the report is written its own stage has begun, but there is nothing to say about it.
    rows = [stage for stage in run.stages if stage["stage"] != "report" or stage.get("done") is not False]
    times = [_seconds(stage) for stage in rows]
    seconds = [spent or 0.0 for spent in times]
    longest = max([*seconds, 0.0]) or 1.0
    return [
        {
            "name": str(stage["stage"]),
            "seconds": known,
            "width": round(100 * spent / longest, 2),
            "share": format.share(spent / sum(seconds)) if sum(seconds) else "",
            "tokens": number(stage, "tokens"),
            "tokens_per_s": None if known is None else number(stage, "tokens_per_s"),
            "peak_memory_mib": number(stage, "peak_memory_mib"),
            "started": _moment(stage.get("started")),
            "unfinished": stage.get("done") is False,
            "fingerprint": str(stage.get("fingerprint", ""))[:12],
        }
        for stage, spent, known in zip(rows, seconds, times, strict=True)
    ]


def _seconds(stage: Mapping[str, Any]) -> float | None:
    """Seconds that a stage took; None where they are not known, as when the clock was set back during it."""
    seconds = number(stage, "seconds")
    return None if seconds is None or seconds < 0 else seconds


def _moment(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        # A calendar ends long before numbers do.
        with suppress(OverflowError, ValueError, OSError):
            return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return str(value)[:16].replace("T", " ") if value else ""


def _provenance(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of (dotted key, value); what is not nested comes first, as a group without a name."""
    plain, groups = [], []
    for key, value in run.provenance.items():
        if isinstance(value, Mapping):
            groups.append((str(key), _flat(value)))
        else:
            plain.append((str(key), _plain(value)))
    return ([("", plain)] if plain else []) + groups


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        rows += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, _plain(value))]
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_plain(item) for item in value)
    return "yes" if value is True else "no" if value is False else "none" if value is None else str(value)
