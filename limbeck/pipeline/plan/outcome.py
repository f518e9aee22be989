"""The plan of a run: everything that is known before it begins, in one place."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from limbeck.models.devices import Fleet
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.made_first import require_made
from limbeck.pipeline.plan.budget import Now
from limbeck.pipeline.plan.case import Case, case_of
from limbeck.pipeline.plan.disk import Part, disk_of, tokenizer_bytes
from limbeck.pipeline.plan.fits import Change, Way, change_of, fits, server_devices, ways_of
from limbeck.pipeline.plan.memory import StageMemory, memory_of
from limbeck.pipeline.plan.probe import ProbeResult, probe
from limbeck.pipeline.plan.probed_time import probed_times
from limbeck.pipeline.plan.rates import Rates, estimated
from limbeck.pipeline.plan.time import StageTime, times_of
from limbeck.pipeline.plan.workload import workload_of
from limbeck.recipe.load import Recipe
from limbeck.runtime.console import QuietConsole
from limbeck.teachers.hosted_account import NOTHING, price_of
from limbeck.teachers.hosted_options import OnApi


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will take.

    Attributes:
        rates: None where no speed is known.
        probe: what was timed here; None where nothing was.
        server: devices of a server of the teacher beside the ranks; 0 where there is none.
        hosted_usd: the most that a hosted teacher can cost; None where there is none, or where no price is known.
    """

    case: Case
    memory: Sequence[StageMemory]
    disk: Sequence[Part]
    rates: Rates | None
    probe: ProbeResult | None
    times: Sequence[StageTime]
    ways: Sequence[Way]
    change: Change | None
    server: int
    hosted_usd: Decimal | None

    @property
    def fits(self) -> bool:
        return fits(self.case)

    @property
    def hours(self) -> float | None:
        return sum(stage.seconds for stage in self.times) / 3600 if self.times else None

    @property
    def usd(self) -> float | None:
        """Dollars for all devices over all stages, and for a hosted teacher."""
        if self.hours is None:
            return None
        fleet = self.case.fleet
        server = self.server * self.hours * fleet.device.usd_per_hour
        return fleet.usd(self.hours) + server + float(self.hosted_usd or NOTHING)


def plan(
    recipe: Recipe,
    fleet: Fleet,
    *,
    answer: float | None = None,
    probe_s: float | None = None,
    clock: Now = time.perf_counter,
) -> Plan:
    """The plan of a recipe; of its models no weights are read, unless they are timed.

    Args:
        answer: mean length of an answer that is not written yet.
        probe_s: seconds for timing the pieces of the recipe on this machine; None times nothing.
        clock: that it is timed by.

    Raises:
        LimbeckError: a model's configuration or the prompts are not here and cannot be fetched, or there is no time for
            a probe.
    """
    require_made(recipe)
    context = RunContext(recipe, QuietConsole())
    case = case_of(context, workload_of(context, answer=answer), fleet)
    probed = None if probe_s is None else probe(context, case, probe_s, clock)
    return plan_of(case, probed=probed, tokenizer=_tokenizer_bytes(context))


def plan_of(case: Case, *, probed: ProbeResult | None = None, tokenizer: int = 0) -> Plan:
    """The plan of a case."""
    rates = estimated(case)
    server = server_devices(case) if case.where == "server" else 0
    estimates = times_of(case, rates, server_devices=server) if rates else ()
    return Plan(
        case=case,
        memory=memory_of(case),
        disk=disk_of(case, tokenizer_bytes=tokenizer),
        rates=rates,
        probe=probed,
        times=estimates if probed is None else probed_times(case, probed),
        ways=ways_of(case),
        change=None if fits(case) else change_of(case),
        server=server,
        hosted_usd=hosted_usd(case),
    )


def hosted_usd(case: Case) -> Decimal | None:
    """The most that hosted teachers can cost: all prompts read once, all answers as long as they may become."""
    if case.work.hosted_usd is not None:
        return case.work.hosted_usd
    hosted = [one.where for one in case.recipe.every_teacher.values() if isinstance(one.where, OnApi)]
    if not hosted or case.recipe.base_author != "teacher":
        return None
    count = case.answered + case.work.heldout.count
    written = count * case.recipe.responses.max_new_tokens
    prices = []
    for where in hosted:
        if where.price_per_million is None:
            return None
        read = (case.work.asked_bytes or case.work.ids) + where.added_tokens * count
        prices.append(price_of(where.price_per_million, read, written))
    return max(prices) if case.recipe.mixing is None else sum(prices, NOTHING)


def _tokenizer_bytes(context: RunContext) -> int:
    from limbeck.models.sources import resolve

    section: Any = context.recipe.student if context.recipe.student.model is not None else context.recipe.teacher
    source = resolve(section.model, revision=section.revision, weights=False)
    return 0 if source.gguf is not None else tokenizer_bytes(source.directory)
