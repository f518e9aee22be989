"""Plans of well-known pairs on 8 to 512 devices, as a section of docs/planning.md, and plans beside finished runs.

    python -m benchmarks.plan                  # writes the table of docs/planning.md
    python -m benchmarks.plan RUN...           # compares each finished run with its plan

The configurations are written here, so that no hub is needed. The pairs have 50,000 prompts of 200 tokens that the data
answers in 512: full distributions, float32 weights and moments, bfloat16 products, activations computed again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from limbeck.models.devices import fleet_of
from limbeck.pipeline.plan.disk import end_bytes, measured_bytes, most_bytes
from limbeck.pipeline.plan.fits import server_devices, ways_of
from limbeck.pipeline.plan.memory import peak
from limbeck.pipeline.plan.outcome import Plan, plan, plan_of
from limbeck.pipeline.plan.page import size
from limbeck.pipeline.plan.sizes import ModelSize
from limbeck.recipe.load import load_recipe_or_run
from limbeck.runtime.console import format_seconds
from limbeck.runtime.files import read_json, write_text
from tests.pipeline.plan.pairs import CONFIGS, case_of_sizes, model_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "planning.md"
BEGIN, END = "<!-- pairs: begin -->", "<!-- pairs: end -->"
PAIRS = (("7B", "1.5B"), ("32B", "8B"), ("70B", "8B"))
DEVICES = ("8xH100", "64xH100", "512xH100")
SECTIONS: Mapping[str, dict[str, Any]] = {"train": {"gradient_checkpointing": True}}


def sizes_of_pairs() -> dict[str, ModelSize]:
    """The sizes of all models, by the names of their configurations."""
    return {name: model_of(config) for name, config in CONFIGS.items()}


def pair_plans() -> Iterator[tuple[str, str, Plan, str]]:
    """Each pair on each number of devices: the plan of the first way that fits, and the name of that way."""
    sizes = sizes_of_pairs()
    for teacher, student in PAIRS:
        for devices in DEVICES:
            case = case_of_sizes(sizes[teacher], sizes[student], devices, **SECTIONS)
            way = next(way for way in ways_of(case) if way.fits)
            yield teacher, student, plan_of(way.case), way.name


def table() -> str:
    """The plans as a table of Markdown."""
    lines = [
        "| pair | devices | first way that fits | memory per rank | disk at most | teach | train | cost | bound by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for teacher, student, made, way in pair_plans():
        case, times = made.case, {stage.stage: stage for stage in made.times}
        beside = f" beside a server of {server_devices(case)}" if case.where == "server" else ""
        spent = [format_seconds(times[name].seconds) for name in ("teach", "train")]
        longest = max(times.values(), key=lambda stage: stage.seconds)
        lines.append(
            f"| {teacher} to {student} | {case.fleet} | {way}{beside} | {size(peak(case).bytes)} | "
            f"{size(most_bytes(made.disk))} | {spent[0]} | {spent[1]} | ${made.usd:,.0f} | "
            f"{longest.stage}: {longest.bound} |"
        )
    return "\n".join(lines) + "\n"


def compare(run: Path) -> Iterator[str]:
    """A finished run beside its plan: disk, and the peak of memory of each stage."""
    made = plan(load_recipe_or_run(str(run)), fleet_of("cpu"))
    yield f"{run.name}: disk {end_bytes(made.disk):,} planned, {measured_bytes(run):,} there"
    for stage in made.memory:
        record = run / "stages" / f"{stage.stage}.json"
        if record.exists() and (found := read_json(record).get("peak_memory_mib")):
            planned = stage.bytes >> 20
            yield f"  {stage.stage}: {planned:,} MiB planned, {found:,} measured ({planned / found - 1:+.1%})"


def main() -> None:
    if runs := sys.argv[1:]:
        for run in runs:
            print("\n".join(compare(Path(run))))
        return
    text = PAGE.read_text("utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text(PAGE, f"{before}{BEGIN}\n\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
