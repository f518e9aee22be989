"""A summary of an on-policy training: tokens by author, and mechanisms that never acted.

Everything said here is a function of the last line of metrics.jsonl, whose `so_far/...` numbers are counted since the
first step and are in the checkpoint: a resumed run says the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from limbeck.types import Response

SO_FAR = "so_far/"


def count_phrase(
    before: Mapping[str, float], responses: Iterable[Response], means: Mapping[str, float]
) -> dict[str, float]:
    """The counts after one more step.

    Args:
        before: those of the steps before; empty at the first.
        responses: of the step.
        means: what is logged of the step; of an adaptive alpha its lowest and highest mean is remembered.
    """
    counts = {"responses": 0.0, "student": 0.0, **before}
    for response in responses:
        counts["responses"] += 1
        counts["student"] += response.author == "student"
        if response.replaced is not None:
            counts["replaced"] = counts.get("replaced", 0.0) + response.replaced
            counts["replaceable"] = counts.get("replaceable", 0.0) + response.tokens
    alphas = [means[key] for key in ("alpha/teacher", "alpha/student") if key in means]
    if alphas:
        counts["alpha_low"] = min(counts.get("alpha_low", alphas[0]), *alphas)
        counts["alpha_high"] = max(counts.get("alpha_high", alphas[0]), *alphas)
    return counts


def summary(line: Mapping[str, Any]) -> str:
    """One sentence on how much each author wrote, from the last line of the metrics; empty without counts."""
    so_far = _so_far(line)
    if not so_far.get("responses"):
        return ""
    parts = [f"the student wrote {_of(so_far, 'student', 'responses')} responses that were trained on"]
    if "replayed" in so_far:
        parts[0] += f", {so_far['replayed']:,.0f} of them out of the buffer"
        parts.append(
            f"its share grew {_times(so_far['growths'])} in {so_far['validations']:,.0f} comparisons of the held-out "
            f"loss, to {line['share']:g}"
        )
    if "replaced" in so_far:
        parts.append(f"the teacher replaced {_of(so_far, 'replaced', 'replaceable')} tokens")
    if "rounds" in so_far:
        parts.append(f"they were written {_times(so_far['rounds'])}")
    if "alpha_low" in so_far:
        parts.append(f"alpha moved between {so_far['alpha_low']:.3g} and {so_far['alpha_high']:.3g}, means of a step")
    return "; ".join(parts)


def never_acted(line: Mapping[str, Any]) -> list[str]:
    """A sentence for each mechanism of the training that did nothing, with the reason and a remedy."""
    so_far = _so_far(line)
    if not so_far.get("responses"):
        return []
    found = [*_unwritten(so_far, line), *_unreplayed(so_far, line), *_ungrown(so_far, line)]
    if so_far.get("replaced") == 0 and so_far["replaceable"]:
        found.append(
            f"the teacher replaced 0 of the student's {so_far['replaceable']:,.0f} tokens; "
            "lower responses.source.teacher_top_k, or raise responses.source.teacher_share"
        )
    if so_far.get("alpha_low", 0.0) == so_far.get("alpha_high", 1.0):
        found.append(
            f"the adaptive alpha was {so_far['alpha_low']:.3g} in every step; train for more epochs than its "
            "warmup_epochs, or lower its `low`"
        )
    if so_far.get("rounds") == 1 and line["step"] > 1:
        found.append(
            f"the student's responses were written once, before step 1 of {line['step']:,}, and never again; "
            "lower responses.source.refresh, or raise train.num_train_epochs"
        )
    return found


def _unwritten(so_far: Mapping[str, float], line: Mapping[str, Any]) -> list[str]:
    if so_far["student"]:
        return []
    share = f": its share of the steps is {line['share']:g}" if "share" in line else ""
    return [f"the student wrote 0 of {so_far['responses']:,.0f} responses{share}; raise responses.source.share"]


def _unreplayed(so_far: Mapping[str, float], line: Mapping[str, Any]) -> list[str]:
    if so_far.get("replayed") != 0:
        return []
    held = line["buffer"]
    return [
        f"the buffer replayed 0 responses: it is drawn from once it is full and held {held:,.0f} at the end; "
        "lower responses.source.capacity, or raise responses.source.share"
    ]


def _ungrown(so_far: Mapping[str, float], line: Mapping[str, Any]) -> list[str]:
    if so_far.get("growths") != 0 or line["share"] >= 1:
        return []
    validations, rises = so_far["validations"], so_far["rises"]
    if not validations:
        why = "the held-out loss was not measured again after the first step; lower responses.source.validate_steps"
    elif not rises:
        why = f"the held-out loss fell in each of {validations:,.0f} validations"
    else:
        why = (
            f"the held-out loss rose in {rises:,.0f} of {validations:,.0f} validations, but never as far as "
            "responses.source.tolerance asks"
        )
    return [f"the share never grew from {line['share']:g}: {why}"]


def _so_far(line: Mapping[str, Any]) -> dict[str, float]:
    return {key.removeprefix(SO_FAR): value for key, value in line.items() if key.startswith(SO_FAR)}


def _of(so_far: Mapping[str, float], some: str, all_: str) -> str:
    return f"{so_far[some]:,.0f} of {so_far[all_]:,.0f}"


def _times(count: float) -> str:
    return "once" if count == 1 else f"{count:,.0f} times"
