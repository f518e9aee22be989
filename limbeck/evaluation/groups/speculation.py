"""The group `speculation`: the student drafts for the teacher, one prompt at a time.

The teacher alone and with the draft answer in turns, with the same seeds and through the same sampler. A first answer
of each is not counted: it lays out weights. Seconds differ from run to run in their last digits, and with them the
speed-up; everything else is reproducible.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from pydantic.dataclasses import dataclass

from limbeck.evaluation.context import EvaluationContext
from limbeck.evaluation.group import EvaluationGroup, GroupResult, Need
from limbeck.evaluation.groups.diversity import condition as temperature_condition
from limbeck.evaluation.scores.bootstrap import summarise
from limbeck.evaluation.scores.files import read_rows
from limbeck.evaluation.speculation import (
    Drafted,
    PassCosts,
    acceptance_rows,
    break_even,
    expected_speedup,
    expected_tokens_per_pass,
    position_rows,
)
from limbeck.fields import STRICT, Count, NonNegative, Seed
from limbeck.runtime.records import read_fields
from limbeck.types import Json, LimbeckError, Prompt, Sampling, ScoredRow, TokenPrompt

_ACCEPTANCE = "draft_acceptance"


@dataclass(config=STRICT, kw_only=True)
class SpeculationGroup(EvaluationGroup):
    """The student as the draft of its teacher: acceptance, tokens per pass and speed-up."""

    draft_tokens: tuple[Count, ...] = (4,)
    """Tokens that the student drafts for each of the teacher's passes."""
    prompts: Count = 16
    """At most so many, of all categories of the prompts in turns."""
    temperature: NonNegative = 1.0
    temperatures: tuple[NonNegative, ...] = ()
    """Further temperatures, at which the first of draft_tokens is measured too."""
    seed: Seed = 0

    parts = ("after",)

    def needs(self) -> frozenset[Need]:
        return frozenset({"teacher", "teacher_weights", "tokens", "prompts"})

    @property
    def takes_both(self) -> bool:
        # One drafts for the other.
        return True

    def check(self, evaluation: EvaluationContext) -> None:
        del evaluation
        if not self.draft_tokens:
            raise LimbeckError(
                "evaluate.groups.speculation.draft_tokens is empty; expected one or more numbers of tokens, such as [4]"
            )
        every = [temperature_condition(temperature) for temperature in (self.temperature, *self.temperatures)]
        if len(set(every)) < len(every):
            raise LimbeckError(
                f"evaluate.groups.speculation.temperatures is {list(self.temperatures)} beside temperature "
                f"{self.temperature:g}; expected ones that differ from it and from each other in their first six digits"
            )

    def measure(self, evaluation: EvaluationContext) -> GroupResult:
        from limbeck.evaluation.drafting import in_turns, pass_costs

        sampling = Sampling(
            max_new_tokens=evaluation.settings.max_new_tokens, temperature=self.temperature, seed=self.seed
        )
        asked = self._asked(evaluation, sampling)
        costs = pass_costs(evaluation, asked, max(self.draft_tokens))
        ratio = costs.ratio
        tables: dict[str, list[ScoredRow]] = {}
        detail: Json = {"cost_ratio": ratio, "prompts": len(asked), "costs": _record(costs)}
        first = self.draft_tokens[0]
        for draft_tokens in dict.fromkeys(self.draft_tokens):
            name = f"draft={draft_tokens}"
            drafted = in_turns(evaluation, asked, sampling, draft_tokens)
            tables[name] = acceptance_rows(drafted, draft_tokens=draft_tokens, costs=costs)
            tables |= {f"{name},position={place}": rows for place, rows in position_rows(drafted).items()}
            measured = summarise(tables[name])["draft_acceptance"].mean
            if draft_tokens == first:
                tables |= _by_category(evaluation, drafted, name)
                tables[""] = [_of_the_pair(costs, measured, first)]
            expected = {"measured": _expected(measured, draft_tokens, ratio)}
            if (share := _expected_acceptance(evaluation, sampling)) is not None:
                expected["fidelity"] = _expected(share, draft_tokens, ratio)
            detail[name] = {
                "break_even_acceptance": break_even(draft_tokens, ratio),
                "expected_from_acceptance": expected,
                "by_measured_passes": _by_measured_passes(costs, measured),
            }
        for temperature in self.temperatures:
            drafted = in_turns(evaluation, asked, replace(sampling, temperature=temperature), first)
            name = f"draft={first},{temperature_condition(temperature)}"
            tables[name] = acceptance_rows(drafted, draft_tokens=first, costs=costs)
        return GroupResult(tables=tables, detail=detail)

    def _asked(self, evaluation: EvaluationContext, sampling: Sampling) -> list[TokenPrompt]:
        """The prompts as the teacher reads them, those that fit both models."""
        prompts, most = in_turns_of_category(evaluation.prompts, self.prompts), sampling.max_new_tokens
        fits = {p.id for p in evaluation.encode("student", prompts, max_new_tokens=most)}
        asked = [p for p in evaluation.encode("teacher", prompts, max_new_tokens=most) if p.id in fits]
        if not asked:
            raise LimbeckError(
                "no held-out prompt fits both models with its answer, expected at least one to draft for; "
                "lower evaluate.max_new_tokens, or raise prompts.eval_fraction"
            )
        return asked


def in_turns_of_category(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """So many prompts, one of each category and then the next of each, in the order they came in.

    Without categories they are the first ones.
    """
    seen = Counter[str | None]()
    turns = []
    for place, prompt in enumerate(prompts):
        turns.append((seen[prompt.category], place))
        seen[prompt.category] += 1
    return [prompts[place] for place in sorted(place for _, place in sorted(turns)[:most])]


def _by_category(evaluation: EvaluationContext, drafted: Sequence[Drafted], name: str) -> dict[str, list[ScoredRow]]:
    """The acceptance in each category of the prompts, where they have any."""
    of_prompt = {prompt.id: prompt.category for prompt in evaluation.prompts if prompt.category}
    by_category: dict[str, list[Drafted]] = {}
    for one in drafted:
        if one.id in of_prompt:
            by_category.setdefault(spelled(of_prompt[one.id]), []).append(one)
    rows = {category: acceptance_rows(some) for category, some in sorted(by_category.items())}
    return {
        f"{name},category={category}": [replace(r, sums={_ACCEPTANCE: r.sums[_ACCEPTANCE]}) for r in some]
        for category, some in rows.items()
    }


def spelled(category: str) -> str:
    """A category as part of a file's name: letters, digits and dashes; two that differ in nothing else are one."""
    return re.sub(r"\W+", "-", category.lower()).strip("-")[:40] or "other"


def _of_the_pair(costs: PassCosts, acceptance: float, draft_tokens: int) -> ScoredRow:
    """What is one number for both models on this machine."""
    values = {"draft_cost": costs.ratio, "best_draft_tokens": float(costs.best(acceptance))}
    least = costs.break_even(draft_tokens)
    return ScoredRow(id="pair", weight=1.0, values=values | ({} if least is None else {"break_even_acceptance": least}))


def _by_measured_passes(costs: PassCosts, acceptance: float) -> Json:
    """Expected speed-up and break-even by the number of drafts, with the best number."""
    widths = [width - 1 for width in costs.pass_s if width > 1]
    return {
        "best_draft_tokens": costs.best(acceptance),
        "speedup": {str(drafts): costs.speedup(acceptance, drafts) for drafts in widths},
        "break_even_acceptance": {str(drafts): costs.break_even(drafts) for drafts in widths},
    }


def _record(costs: PassCosts) -> Json:
    return {"draft_step_s": costs.draft_s, "teacher_pass_s": {str(w): s for w, s in costs.pass_s.items()}}


def _expected(acceptance: float, draft_tokens: int, ratio: float) -> Json:
    return {
        "acceptance": acceptance,
        "tokens_per_pass": expected_tokens_per_pass(acceptance, draft_tokens),
        "speedup": expected_speedup(acceptance, draft_tokens, ratio),
    }


def _expected_acceptance(evaluation: EvaluationContext, sampling: Sampling) -> float | None:
    """1 - total variation on the teacher's answers (Leviathan et al., corollary 3.6), where fidelity measured it.

    It is of temperature 1, and of contexts that the teacher wrote: what a draft meets.
    """
    record = evaluation.folder / f"{evaluation.part}.fidelity.json"
    if sampling.temperature != 1 or not record.exists():
        return None
    conditions = read_fields(record, {"conditions": list})["conditions"]
    by_teacher = evaluation.responses_author == "teacher"
    name = "fidelity@teacher" if "teacher" in conditions else "fidelity" if "" in conditions and by_teacher else None
    if name is None:
        return None
    return summarise(read_rows(evaluation.folder / f"{evaluation.part}.{name}.jsonl"))["acceptance"].mean
