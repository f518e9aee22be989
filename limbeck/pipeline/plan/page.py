"""The plan of a run as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from limbeck.models.launchers import LAUNCHERS, Job, vllm_command
from limbeck.pipeline.plan.fits import Way
from limbeck.pipeline.plan.memory import StageMemory
from limbeck.pipeline.plan.outcome import Plan
from limbeck.runtime.console import format_seconds
from limbeck.teachers.hosted_account import dollars


def text_of(plan: Plan) -> str:
    """All of a plan but its commands."""
    return "\n".join([*_head(plan), "", *_stages(plan), "", *_disk(plan), "", *_ways(plan)]) + "\n"


def _head(plan: Plan) -> Iterator[str]:
    case = plan.case
    fleet, steps, work = case.fleet, case.steps, case.work
    price = f", ${fleet.usd(1):,.2f} per hour" if fleet.usd(1) else ""
    yield f"devices   {fleet}: {size(fleet.memory)} for each rank{price}"
    student, teacher = case.student, case.teacher
    theirs = "unknown" if teacher is None else f"{count(teacher.parameters)} in {case.recipe.teacher.dtype}"
    added = f" and {count(student.adapters)} of adapters" if student.adapters else ""
    yield (
        f"models    teacher {theirs} ({case.where}); student {count(student.model.parameters)}{added}, "
        f"{count(student.trained)} trained{', sharded' if case.sharded else ''}"
    )
    most = "" if work.exact else " at most"
    yield (
        f"texts     {work.train.count:,} to train on, {work.heldout.count:,} held out; "
        f"{work.tokens:,} tokens of answers{most}"
    )
    yield (
        f"steps     {steps.main:,} of {steps.rows:,} responses"
        + (f", {steps.first:,} of a first stage" if steps.first else "")
        + (f", {steps.written:,} responses by the student" if steps.written else "")
    )


def _stages(plan: Plan) -> Iterator[str]:
    """Memory, time and money of each stage, and the terms of the memory."""
    fleet = plan.case.fleet
    yield f"{'stage':<10}{'memory per rank':>16}{'tokens':>18}{'time':>12}{'cost':>12}  bound by"
    memory = {stage.stage: stage for stage in plan.memory}
    times = {stage.stage: stage for stage in plan.times}
    for name in ("respond", "teach", "train", "evaluate"):
        if name not in memory and name not in times:
            continue
        held, time = memory.get(name), times.get(name)
        seconds = format_seconds(time.seconds) if time else "-"
        usd = f"${fleet.usd(time.seconds / 3600):,.2f}" if time and fleet.usd(1) else "-"
        tokens = f"{time.tokens:,}" if time else "-"
        bound = time.bound if time else ""
        yield f"{name:<10}{size(held.bytes) if held else '-':>16}{tokens:>18}{seconds:>12}{usd:>12}  {bound}".rstrip()
    if plan.hours is None:
        yield "no speed of this device is known, so that neither hours nor money are; --probe times this machine"
    else:
        total = f"total     {format_seconds(plan.hours * 3600)}"
        yield total + (f", ${plan.usd:,.2f}" if plan.usd else "") + _measured(plan)
        yield from _probed(plan)
    if plan.hosted_usd is not None:
        yield f"the hosted teacher costs {dollars(plan.hosted_usd)} at most"
    yield ""
    for stage in plan.memory:
        yield f"{stage.stage:<10}{terms(stage)}"


def _measured(plan: Plan) -> str:
    return ", by usual shares of the device's speed" if plan.probe is None else ", by what was timed here"


def _probed(plan: Plan) -> Iterator[str]:
    """What of a plan was timed, and how."""
    probe = plan.probe
    if probe is None:
        return
    yield ""
    for stage in plan.times:
        ordered = sorted(stage.terms.items(), key=lambda term: -term[1])
        yield f"{stage.stage:<10}" + " + ".join(f"{name} {format_seconds(seconds)}" for name, seconds in ordered)
    loaded = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in probe.loading.items())
    yield (
        f"probe     {format_seconds(probe.spent)} of timed work after loading ({loaded}), with "
        f"{probe.processor:.2f} s of processor time a second"
    )
    yield f"          {probe.alive_from}"
    if plan.case.ranks > 1:
        share = f"a rank has 1/{plan.case.ranks} of the work"
        yield f"          one process was timed; {share}, and what ranks exchange is not counted"
    for note in probe.notes:
        yield f"          {note}"


def terms(stage: StageMemory) -> str:
    """The terms of a stage's memory, the largest first."""
    ordered = sorted(stage.terms, key=lambda term: -term.bytes)
    return " + ".join(f"{term.name} {size(term.bytes)}" for term in ordered)


def _disk(plan: Plan) -> Iterator[str]:
    end, most = sum(part.end for part in plan.disk), sum(part.most for part in plan.disk)
    parts = ", ".join(f"{part.name} {size(part.most)}" for part in sorted(plan.disk, key=lambda part: -part.most))
    yield f"disk      {size(end)} at the end, {size(most)} at most meanwhile: {parts}"


def _ways(plan: Plan) -> Iterator[str]:
    for way in plan.ways:
        yield f"{way.name:<10}{_verdict(way)}"
    if plan.fits:
        yield f"the recipe fits {plan.case.fleet} as it is"
    elif plan.change is not None:
        yield f"the recipe does not fit {plan.case.fleet}; one change makes it fit: {plan.change.text}"
    else:
        yield (
            f"the recipe does not fit {plan.case.fleet}, and no single change that is known makes it fit; take larger "
            "devices, a smaller student, or student.lora"
        )


def _verdict(way: Way) -> str:
    if way.worst is None:
        return f"no: {way.refused}"
    verdict = "fits" if way.fits else "does not fit"
    return f"{verdict}: {size(way.worst.bytes)} of {size(way.case.usable)} in {way.worst.stage} ({way.keys})"


def commands(plan: Plan, arguments: Sequence[str], launch: str) -> str:
    """The commands that start the run.

    Args:
        arguments: behind `limbeck run`.
        launch: name of a launcher.

    Raises:
        LimbeckError: there is no such launcher.
    """
    case = plan.case
    job = Job(
        name=case.recipe.name, arguments=tuple(arguments), fleet=case.fleet, hours=plan.hours, sharded=case.sharded
    )
    text = LAUNCHERS.build(launch).text(job)
    if plan.case.where == "server" and plan.case.teacher is not None:
        texts = plan.case.work
        server = vllm_command(
            plan.case.recipe.teacher.model,
            devices=plan.server,
            blocks=plan.case.teacher.blocks,
            window=max(texts.train.longest, texts.heldout.longest) + 1,
            hidden=plan.case.recipe.teacher.support in ("full", "sampled"),
        )
        text = f"{text}\n{server}"
    return text


def size(bytes_: float) -> str:
    """A size for people."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if bytes_ >= scale:
            return f"{bytes_ / scale:,.1f} {unit}"
    return f"{bytes_ / 2**10:,.0f} KiB"


def count(number: int) -> str:
    """A number of parameters for people."""
    for unit, scale in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= scale:
            return f"{number / scale:,.1f}{unit}"
    return str(number)
