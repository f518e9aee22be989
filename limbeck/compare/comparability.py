"""Comparability of runs: those that measured the same examples in the same way may be ranked together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from limbeck.compare.labels import plain_value, short_value
from limbeck.compare.runs import ComparedRun
from limbeck.evaluation.groups import EVALUATION_GROUPS
from limbeck.evaluation.scores.metrics import split_stand_in
from limbeck.recipe.keys import same_arm_keys
from limbeck.recipe.response_source import initial_author_of
from limbeck.report.read_run import value_at
from limbeck.runtime.records import flatten
from limbeck.types import ScoredRow

# What changes what is measured, beside the section of the group itself.
_ALWAYS = (
    *("prompts.template", "prompts.chat_options", "prompts.control_tokens"),
    *("evaluate.max_new_tokens", "evaluate.prompts"),
)
_RESPONSES = tuple(f"responses.{key}" for key in ("max_new_tokens", "temperature", "top_p", "top_k", "stop", "seed"))
# The teacher's own surprise at the responses: the same for all that looked at the same responses with the same teacher.
_IDENTITY_METRIC = "teacher_nll"


@dataclass(frozen=True, kw_only=True)
class ExcludedRun:
    """A run that is not ranked with the others in some tables."""

    place: str
    tables: tuple[str, ...]
    why: str


def settings_of(member: ComparedRun, table: str) -> dict[str, str]:
    """Settings of a measurement, as text by key."""
    assert member.run is not None
    flat = flatten(member.run.recipe)
    # A stand-in is measured as a student is.
    table, _ = split_stand_in(table)
    group, _, condition = table.partition("@")
    same_arm, prefix = same_arm_keys(), f"evaluate.groups.{group}."
    keys = [*_ALWAYS, *(key for key in flat if key.startswith(prefix) and key not in same_arm)]
    found = {}
    options = {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}
    if (kind := EVALUATION_GROUPS.get(group)) is not None and kind.on_responses(condition, options):
        keys += _RESPONSES
        source, otherwise = flat.get("responses.source.name"), flat.get("responses.initial_author")
        found["responses.initial_author"] = plain_value(initial_author_of(source, otherwise))
    found |= {key: plain_value(flat[key]) if key in flat else "not set" for key in keys}
    teacher = value_at(member.run.provenance, "fingerprints.teacher") or flat.get("teacher.model")
    return found | {"the teacher": plain_value(teacher)}


def rows_may_lack(table: str) -> bool:
    """Whether an example may have no row in a table for a reason of its own."""
    kind = EVALUATION_GROUPS.get(split_stand_in(table)[0].partition("@")[0])
    return kind is not None and kind.rows_may_lack


def difference(
    ours: Sequence[ScoredRow],
    theirs: Sequence[ScoredRow],
    settings: Mapping[str, str],
    usual: Mapping[str, str],
    table: str,
) -> str:
    """The reason why two runs cannot be ranked together, or nothing."""
    shared, most = len({row.id for row in ours} & {row.id for row in theirs}), max(len(ours), len(theirs))
    if shared < (most / 2 if rows_may_lack(table) else most):
        return f"it was measured on other examples: {shared} of {most} are the same"
    other = [key for key in dict.fromkeys([*usual, *settings]) if settings.get(key) != usual.get(key)]
    if other:
        differing = [
            f"{key} is {short_value(settings.get(key, 'not set'))} there, "
            f"{short_value(usual.get(key, 'not set'))} elsewhere"
            for key in other
        ]
        return "; ".join(differing[:3]) + (f"; {len(differing) - 3} more settings differ" if len(differing) > 3 else "")
    if not split_stand_in(table)[0].endswith("@student") and all(
        _IDENTITY_METRIC in rows[0].values for rows in (ours, theirs)
    ):
        one, two = _witness(ours), _witness(theirs)
        if abs(one - two) > 0.01 * max(abs(one), abs(two)):
            return (
                f"the teacher or the responses differ: its negative log-likelihood of them is {one:.3f} nats/token "
                f"there, {two:.3f} elsewhere"
            )
    return ""


def _witness(rows: Sequence[ScoredRow]) -> float:
    return sum(row.weight * row.values[_IDENTITY_METRIC] for row in rows) / sum(row.weight for row in rows)
