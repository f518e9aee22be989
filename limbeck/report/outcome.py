"""The warning about a student that became worse in training, one sentence with the remedy."""

from __future__ import annotations

from limbeck.report.before_after import evidence
from limbeck.report.format import figure, setting
from limbeck.report.read_run import Run, score, value_at

# The first of these that was measured decides; the others are named where they got worse too.
DECIDING = ("forward_kl", "rouge_l_references", "rouge_l")
NAMED = ("forward_kl", "reverse_kl", "top1_agreement", "rouge_l_references", "rouge_l")
# A student that seeks the teacher's modes may lose forward KL and gain by this.
EXCUSED_BY = "reverse_kl"


def harm(run: Run) -> str | None:
    """The sentence; None where the student did not get worse, or it is within noise."""
    lines = {line.name: line for line in evidence(run)}
    deciding = next((name for name in DECIDING if name in lines and lines[name].verdict), None)
    if deciding is None or lines[deciding].verdict != "worse":
        return None
    excuse = lines.get(EXCUSED_BY)
    if deciding == "forward_kl" and excuse is not None and excuse.verdict == "better":
        return None
    worse = [lines[name] for name in NAMED if name in lines and lines[name].verdict == "worse"]
    moves = []
    for line in worse:
        before, after = score(run, "before", line.name), score(run, "after", line.name)
        assert before is not None and after is not None, "a verdict compares the two"
        unit = f" {line.unit}" if line.unit and line.unit != "F1" else ""
        moves.append(f"{line.label} {figure(before['mean'])} \N{RIGHTWARDS ARROW} {figure(after['mean'])}{unit}")
    return f"the student ends worse than it began: {', '.join(moves)}; {_remedy(run)}"


def _remedy(run: Run) -> str:
    if value_at(run.recipe, "preference") is not None:
        return (
            "set evaluate.groups.likelihood.against=distilled to see which half did it; lower "
            "preference.learning_rate, or raise preference.beta, and add --update"
        )
    rate = value_at(run.recipe, "train.learning_rate")
    if isinstance(rate, int | float):
        return f"set train.learning_rate=auto (it is {setting(float(rate))}) and add --update"
    if value_at(run.recipe, "train.eval_steps") is None:
        return "set train.eval_steps=50, which hands on the best student on the way, and add --update"
    return "train on more prompts, or lower train.learning_rate, and add --update"
