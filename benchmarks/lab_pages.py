"""The pages about the benches with a teacher that is right, built from their sweeps: the same bytes for the same runs.

    limbeck sweep lab/task-temperature           # and the other sweeps named lab/task-*, or lab/smol-*
    python -m benchmarks.lab_pages task          # writes docs/results/lab-task.md and its pictures from runs/sweeps
    python -m benchmarks.lab_pages smol          # the same of the bench on text

A sweep that is not there leaves its part of the page as it was.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from limbeck.compare.page import write_comparison
from limbeck.compare.ranking import rank
from limbeck.compare.runs import ARMS, ComparedArm, Comparison, gather
from limbeck.compare.student_t import quantile
from limbeck.compare.tables import Column, MetricTables
from limbeck.compare.uncertainty import Resampled, ResampledMetric
from limbeck.evaluation.scores.bootstrap import CONFIDENCE
from limbeck.report.read_run import score, value_at

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of the laboratory, a sweep of each bench.

    Attributes:
        asks: the heading of its section.
        would_change: what would change the answer that is found.
    """

    asks: str
    would_change: str


QUESTIONS = {
    "temperature": Question(
        asks="Does forward KL overtake reverse KL once the temperature of the loss is tuned?",
        would_change="a teacher that is unsure, so that its distribution says more than its answer does; a larger gap "
        "between the models, so that the two directions want different students",
    ),
    "temperature-family": Question(
        asks="Does a temperature help Jensen-Shannon, skew KL, skew reverse KL and CSD?",
        would_change="what would change the answer for forward and reverse KL; other skews, and other weights of CSD",
    ),
    "temperature-onpolicy": Question(
        asks="Does forward KL overtake reverse KL on what the student writes?",
        would_change="a student that strays further from the teacher's answers; answers that are sampled at another "
        "temperature than 1",
    ),
    "direction": Question(
        asks="The direction of KL beside who wrote the prefix: which of the four?",
        would_change="answers so long that errors add up; a teacher whose answers do not cover what is asked",
    ),
    "refresh": Question(
        asks="The student's answers anew at each step, in rounds, or never: what does it matter?",
        would_change="more steps, after which the answers of the start are those of another student; longer answers",
    ),
    "distillm": Question(
        asks="From skew KL to DistiLLM-2, one part at a time: which part helps?",
        would_change="longer answers and more epochs, over which beta grows and the student changes; equal time "
        "in the place of equal steps, as writing costs",
    ),
    "preference": Question(
        asks="Preference tuning from a distilled start, and from one of SFT: which student is better?",
        would_change="pairs that a program judges, in the place of the teacher's likelihood; more pairs and steps, at "
        "a rate that is tuned for each start",
    ),
    "objectives": Question(
        asks="CSD's pairs of weights beside the KL family: which are separated?",
        would_change="a task with many right answers, on which diversity counts; a temperature for each objective",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One of the laboratory's benches with a sharp teacher.

    Attributes:
        lead: the metric that arms are ranked by, and what its column is called.
        beside: further metrics of the table, by what their columns are called.
        measured: what the page says of the measure.
    """

    title: str
    lead: tuple[str, str]
    beside: Mapping[str, str]
    measured: str


DISTANCE = {"forward_kl": "forward KL", "forward_kl@student": "on its own answers"}
BENCHES = {
    "task": Bench(
        title="A task with a teacher that is right: what the sweeps show",
        lead=("accuracy@heldout", "accuracy"),
        # By length: a longer chain is judged on more of the student's own tokens.
        beside={
            "accuracy@heldout,3 steps": "of 3 steps",
            "accuracy@heldout,4 steps": "of 4",
            "accuracy@heldout,5 steps": "of 5",
            **DISTANCE,
            "student_ece": "calibration error",
        },
        measured="An arm's accuracy is that of greedy answers to held-out chains",
    ),
    "smol": Bench(
        title="Instructions under a taught SmolLM2: what the sweeps show",
        lead=("rouge_l_references", "ROUGE-L"),
        beside={
            **DISTANCE,
            "forward_kl@references": "on the references",
            "answer_logp": "likelihood of its answers",
            "self_bleu": "self-BLEU",
            "student_ece": "calibration error",
        },
        measured="An arm's ROUGE-L is that of two sampled answers to each of 822 test prompts, beside the references",
    ),
}
# As many as most papers have.
FEW = 3
RESOLVED = (
    "with an interval over seeds and prompts together; arms that share a letter are not separated, corrected for the "
    "number of pairs. What the bench can resolve is the interval of the difference of two arms."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--sweeps", type=Path, default=Path("runs/sweeps"))
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    name: str = arguments.bench
    page: Path = arguments.page or ROOT / "docs" / "results" / f"lab-{name}.md"
    folders = {question: arguments.sweeps / f"lab-{name}-{question}" for question in QUESTIONS}
    found = {question: folder for question, folder in folders.items() if (folder / ARMS).is_file()}
    if not found:
        raise SystemExit(f"{arguments.sweeps} holds no lab-{name}-*; run `limbeck sweep lab/{name}-temperature`")
    parts = sections_of(page) | {question: section(name, question, folder, page) for question, folder in found.items()}
    bench = BENCHES[name]
    said = wrapped(f"`python -m benchmarks.lab_pages {name}`. Each question is one sweep. {bench.measured}, {RESOLVED}")
    body = [parts[question] for question in QUESTIONS if question in parts]
    page.write_text("\n".join([f"# {bench.title}\n\n{said}\n", *body]).rstrip() + "\n", "utf-8")
    print(page)


def sections_of(page: Path) -> dict[str, str]:
    """The sections that a page has already, by question: those of sweeps that were run elsewhere."""
    text = page.read_text("utf-8") if page.is_file() else ""
    parts = {part.partition("\n")[0]: part.rstrip() + "\n" for part in text.split("\n## ")[1:]}
    return {name: f"## {parts[question.asks]}" for name, question in QUESTIONS.items() if question.asks in parts}


def section(bench: str, question: str, folder: Path, page: Path) -> str:
    """One question: its state, table, what can be resolved, what would change the answer, and picture."""
    asked = QUESTIONS[question]
    (lead, label), wanted, sweep = BENCHES[bench].lead, BENCHES[bench].beside, f"lab-{bench}-{question}"
    comparison = gather([folder], None, folder)
    columns = MetricTables(comparison).columns
    if lead not in columns:
        return f"## {asked.asks}\n\n{wrapped(_state(comparison))} Nothing has been measured yet.\n"
    ranking = rank(columns[lead])
    wanted = {key: name for key, name in wanted.items() if key in columns}
    head = ["arm", label, "group", *wanted.values(), "learning rate", "training, s"]
    lines = [_row(head), "|---|---:|---|" + "---:|" * (len(wanted) + 2)]
    rates, seconds = chosen_rates(comparison), training_seconds(comparison)
    for line in ranking.lines:
        name, beside = line.arm.name, [_value(columns[key], line.arm) for key in wanted]
        cost = [rates.get(name, ""), seconds.get(name, "")]
        lines.append(_row([name, f"{line.mean} ({line.interval})", line.letters, *beside, *cost]))
    picture = page.with_name(f"{sweep}.svg")
    drawn = write_comparison([folder], folder / "compare.html", title=sweep, metric=lead, replacing=True)
    shutil.copyfile(drawn.with_suffix(".svg"), picture)
    said = f"{_state(comparison)} {began(comparison, lead)} {ranking.verdict}."
    return (
        f"## {asked.asks}\n\n"
        + wrapped(f"`limbeck sweep lab/{bench}-{question}`. {said}")
        + "\n\n"
        + "\n".join(lines)
        + f"\n\n{wrapped(resolved(columns[lead].resampled.sheet))}"
        + f"\n\n{wrapped(f'What would change it: {asked.would_change}.')}\n\n![{asked.asks}]({picture.name})\n"
    )


def resolved(whole: ResampledMetric) -> str:
    """The smallest difference of two arms that few seeds and all of them separate, from the intervals of all pairs."""
    # Of a sweep that is not finished arms may have just begun.
    arms = [arm for arm, runs in enumerate(whole.runs) if len(runs) > 1]
    shared = sorted(set.intersection(*(set(whole.runs[arm]) for arm in arms))) if arms else []
    counts = sorted({count for count in (FEW, len(shared)) if 2 <= count <= len(shared)})
    if len(arms) < 2 or not counts:
        return "Too few arms or seeds to say what can be resolved."
    widths = {count: half_widths(whole, arms, shared[:count]) for count in counts}
    said = " and ".join(
        f"{statistics.median(found):.3f} to each side with {count} seeds ({min(found):.3f} to {max(found):.3f})"
        for count, found in widths.items()
    )
    return (
        f"The difference of two arms has an interval of {said}: the median of all pairs and their range, before they "
        "are widened for the number of pairs. Smaller differences are not separated."
    )


def half_widths(whole: ResampledMetric, arms: Sequence[int], seeds: Sequence[int]) -> list[float]:
    """Half the width of the interval of the difference of each two arms by some of their seeds, each on its own."""
    rows = [(number, seed, whole.runs[arm][seed]) for number, arm in enumerate(arms) for seed in seeds]
    chosen = [run for _, _, run in rows]
    sheet = replace(
        whole,
        arm_R=tuple(arm for arm, _, _ in rows),
        seed_R=tuple(seed for _, seed, _ in rows),
        value_R=whole.value_R[chosen],
        drawn_BR=whole.drawn_BR[:, chosen],
    )
    return [quantile(1 - CONFIDENCE, pair.dof) * pair.error for pair in Resampled(sheet=sheet).pairs.values()]


def began(comparison: Comparison, lead: str) -> str:
    """Where the students of a sweep begin, which a training of the start on another machine may move."""
    runs = [member.run for arm in comparison.arms for member in arm.done if member.run]
    means = sorted({found["mean"] for run in runs if (found := score(run, "before", lead))})
    return f"All begin at {' or '.join(f'{mean:.3f}' for mean in means)}." if means else ""


def chosen_rates(comparison: Comparison) -> dict[str, str]:
    """The learning rate of each arm, by the arm's name."""
    found = {}
    for arm in comparison.arms:
        for member in arm.done:
            rate = value_at(member.run.recipe, "train.learning_rate") if member.run else None
            found[arm.name] = f"{rate:g}" if isinstance(rate, float) else str(rate)
    return found


def training_seconds(comparison: Comparison) -> dict[str, str]:
    """The median time of an arm's trainings, student's and teacher's writing included, by the arm's name."""
    found = {}
    for arm in comparison.arms:
        stages = [stage for member in arm.done if member.run for stage in member.run.stages]
        spent = [stage["seconds"] for stage in stages if stage["stage"] == "train"]
        if spent:
            found[arm.name] = f"{statistics.median(spent):.0f}"
    return found


def wrapped(text: str) -> str:
    """A paragraph in lines of 120 characters, as the other pages have them."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def _state(comparison: Comparison) -> str:
    done = [len(arm.done) for arm in comparison.arms]
    planned = [len(arm.members) for arm in comparison.arms]
    broken = [member.arm for member in comparison.members if member.state == "failed"]
    text = f"{len(done)} arms, {min(done)} to {max(done)} seeds each." if min(done) < max(done) else ""
    text = text or f"{len(done)} arms, {max(done)} seeds each."
    if sum(done) < sum(planned):
        text += f" **Unfinished: {sum(done)} of {sum(planned)} runs.**"
    if broken:
        text += f" Failed: {', '.join(sorted(set(broken)))}."
    return text


def _value(column: Column, arm: ComparedArm) -> str:
    where = {one.name: n for n, one in enumerate(column.arms)}
    return f"{column.resampled.mean(where[arm.name]):.3f}" if arm.name in where else ""


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
