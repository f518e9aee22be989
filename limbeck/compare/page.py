"""The comparison as a page, as Markdown and as CSV, the same numbers three times; and as a svg."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from limbeck.compare import svg
from limbeck.compare.charts import COLOR_COUNT, Figure
from limbeck.compare.comparability import ExcludedRun
from limbeck.compare.costs import CostSummary, bill
from limbeck.compare.csv_table import tidy
from limbeck.compare.files import page_of, require_free
from limbeck.compare.frontier import frontier
from limbeck.compare.labels import extra, short_value, value_of
from limbeck.compare.learning_curves import learning
from limbeck.compare.ranked_chart import ranked_chart
from limbeck.compare.ranking import Ranking, interval, main_columns, rank
from limbeck.compare.runs import ComparedArm, ComparedRun, Comparison, gather
from limbeck.compare.samples import Sample, samples
from limbeck.compare.sweep_curves import Panel, panels, tuned_keys
from limbeck.compare.tables import Column, MetricTables
from limbeck.evaluation.scores.bootstrap import CONFIDENCE
from limbeck.report import format
from limbeck.report.charts import HEIGHT, WIDTH
from limbeck.report.environment import environment
from limbeck.report.read_run import value_at
from limbeck.runtime.files import write_text

# Longer tables go on folded, or in the CSV alone.
OPEN_ROWS, EVERYTHING_ROWS = 25, 30


def write_comparison(
    folders: Sequence[Path],
    out: Path,
    *,
    title: str,
    arms: Sequence[Mapping[str, Any]] | None = None,
    metric: str | None = None,
    replacing: bool = False,
) -> Path:
    """Write the page `out`, and beside it the same numbers as .md and .csv, and its first charts as .svg.

    Args:
        folders: run directories, or sweep directories, which stand for all their runs.
        arms: a sweep's lines (arm, seed, keys, tuning, state, error, directory); without them arms are worked out from
            the resolved recipes: runs that differ in train.seed alone are one arm.
        metric: the one to rank by (METRIC or METRIC@CONDITION); None takes the first of the usual ones.
        replacing: write over whatever has these names: the folder is limbeck's own.

    Returns:
        The path of the page.

    Raises:
        LimbeckError: fewer than two runs, a folder that is no run directory, an empty sweep, a metric that was not
            measured, or a file that no comparison wrote where one is to be written.
    """
    page = page_of(out)
    if not replacing:
        require_free(page)
    comparison = gather(folders, arms, page.parent)
    seen = View(title=title, comparison=comparison, tables=MetricTables(comparison), metric=metric)
    texts = {".html": _render("compare.html.j2", seen), ".md": _render("compare.md.j2", seen), ".csv": tidy(comparison)}
    if plates := seen.pictured:
        texts[".svg"] = svg.svg_figure(title, seen.headline, plates)
    for suffix, text in texts.items():
        write_text(page.with_suffix(suffix), text)
    return page


@dataclass(kw_only=True)
class View:
    """Everything that the templates show."""

    title: str
    comparison: Comparison
    tables: MetricTables
    metric: str | None

    confidence = CONFIDENCE

    @cached_property
    def main(self) -> list[Column]:
        return main_columns(self.tables.columns, self.metric)

    @cached_property
    def rankings(self) -> list[Ranking]:
        """By the main metrics, the leading one first."""
        return [rank(column) for column in self.main]

    @property
    def lead(self) -> Ranking | None:
        return self.rankings[0] if self.rankings else None

    @cached_property
    def ordered(self) -> list[ComparedArm]:
        """Arms as the leading metric ranks them, then those that it does not."""
        first = [line.arm for line in self.lead.lines] if self.lead else []
        return first + [arm for arm in self.comparison.arms if arm not in first]

    @cached_property
    def tones(self) -> dict[str, int]:
        """Arm's name to its colour, for the first few."""
        return {arm.name: tone for tone, arm in enumerate(self.ordered[:COLOR_COUNT])}

    @property
    def headline(self) -> str:
        return self.lead.verdict if self.lead else "No run has been evaluated yet, so nothing can be ranked"

    @property
    def facts(self) -> list[tuple[str, str]]:
        done = sum(member.state == "done" for member in self.comparison.members)
        every = len(self.comparison.members)
        seeds = sorted({len(arm.done) for arm in self.comparison.arms if arm.done})
        facts = [
            ("arms", str(len(self.comparison.arms))),
            ("runs", str(done) if done == every else f"{done} of {every}"),
        ]
        if seeds:
            facts.append(("seeds an arm", str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"))
        if self.lead:
            facts.append(("examples", str(self.lead.n)))
        for name, key in (("teacher", "teacher.model"), ("prompts", "prompts.source")):
            said = [value_at(m.run.recipe, key) for m in self.comparison.members if m.run]
            values = {value for value in said if isinstance(value, str)}
            if len(values) == 1:
                facts.append((name, short_value(Path(values.pop()).name, 40)))
        return facts

    def extra(self, arm: ComparedArm) -> str:
        """The keys that set an arm apart beside its name."""
        return extra(arm.name, arm.keys, self.comparison.varied)

    @property
    def notes(self) -> list[str]:
        return [*self.comparison.notes, *self.tables.notes]

    @property
    def apart(self) -> list[ExcludedRun]:
        return self.tables.apart

    @property
    def unfinished(self) -> list[ComparedRun]:
        return [member for member in self.comparison.members if member.state != "done"]

    @cached_property
    def frontier(self) -> Figure | None:
        return frontier(self.tables.columns, self.tones)

    @cached_property
    def panels(self) -> list[Panel]:
        return panels(self.comparison, self.main)

    @cached_property
    def learning(self) -> list[Figure]:
        return learning(self.comparison, self.tones)

    @property
    def pictured(self) -> list[Figure]:
        """The charts of the picture: curves over the first swept setting, the frontier, the ranking where there is
        neither, or how the arms learned."""
        swept = list(self.panels[0].plates) if self.panels else []
        frontier = [self.frontier] if self.frontier else []
        ranked = [ranked_chart(self.lead, self.tones)] if self.lead and not swept and not frontier else []
        return [*swept[:1], *frontier, *swept[1:], *ranked, *self.learning][:2]

    @cached_property
    def samples(self) -> list[Sample]:
        return samples(self.ordered, self.tones)

    @cached_property
    def bill(self) -> CostSummary:
        return bill(self.comparison)

    @cached_property
    def tuning(self) -> list[tuple[ComparedRun, str, str]]:
        """Runs that served to choose a setting: what they tried, and the leading metric they reached."""
        keys = sorted(tuned_keys(self.comparison))
        found = []
        for member in self.comparison.tuning:
            tried = ", ".join(f"{key}={value_of(member.keys, key)}" for key in keys if key in member.keys)
            score = value_at(member.run.scores, "after") if member.run and self.lead else None
            score = score.get(self.lead.name) if isinstance(score, Mapping) and self.lead else None
            mean = score.get("mean") if isinstance(score, Mapping) else None
            found.append((member, tried, format.figure(mean) if isinstance(mean, float) else ""))
        return found

    @cached_property
    def everything(self) -> list[tuple[Column, list[tuple[str, str]]]]:
        """Every metric with mean and interval of each arm, in the order of `ordered`; empty with very many arms."""
        if len(self.ordered) > EVERYTHING_ROWS:
            return []
        found = []
        for column in self.tables.columns.values():
            cells = []
            for arm in self.ordered:
                if arm in column.arms:
                    one = column.resampled.estimate(column.arms.index(arm))
                    cells.append((format.figure(one.mean), interval(one.low, one.high)))
                else:
                    cells.append(("", ""))
            found.append((column, cells))
        return found


def _render(template: str, view: View) -> str:
    """A template with everything from the runs escaped: as HTML, or in Markdown as a cell of a table."""
    templates = files("limbeck.report") / "templates"
    style = "".join((templates / name).read_text(encoding="utf-8") for name in ("style.css", "compare.css"))
    page = environment(escaped=template.endswith(".html.j2")).get_template(template)
    return page.render(view=view, style=style, drawing=(WIDTH, HEIGHT), open_rows=OPEN_ROWS)
