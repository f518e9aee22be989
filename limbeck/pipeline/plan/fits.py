"""Ways to spread a run over devices: which of them fit, and the one change that makes a recipe fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, log2

from limbeck.pipeline.plan.case import Case
from limbeck.pipeline.plan.memory import StageMemory, peak, usable
from limbeck.pipeline.plan.sizes import BYTES
from limbeck.recipe.load import Recipe
from limbeck.student.build import PRUNED

# Of a server's memory, what weights may take; the rest is for keys and values.
SERVER_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to spread a run.

    Attributes:
        keys: of the recipe, that choose it.
        refused: why it is none for this recipe; None where it is one.
        worst: the stage that takes most.
    """

    name: str
    keys: str
    case: Case
    refused: str | None
    worst: StageMemory | None

    @property
    def fits(self) -> bool:
        return self.worst is not None and self.worst.bytes <= usable(self.case)


@dataclass(frozen=True, kw_only=True)
class Change:
    """Keys of a recipe, or other devices, that make a run fit."""

    text: str
    case: Case


def ways_of(case: Case) -> list[Way]:
    """The four ways: all of it on each rank, both models sharded, the teacher behind a server, or in a store."""
    hosted = case.where in ("api", "none")
    in_process = "the teacher has no weights here" if hosted else None
    one = "there is one device" if case.ranks == 1 else None
    apart, teacher = ("sharded", " teacher.where=sharded") if _may_shard_teacher(case.recipe) else ("in_process", "")
    written = "the student writes texts that no store has" if case.recipe.on_policy else None
    server = f"teacher.where={{name: server, base_url: ...}} train.sharding={'full' if case.ranks > 1 else 'none'}"
    ways = [
        ("local", "train.sharding=none", {"where": "in_process", "sharded": False}, in_process),
        ("sharded", f"train.sharding=full{teacher}", {"where": apart, "sharded": True}, in_process or one),
        ("served", server, {"where": "server", "sharded": case.ranks > 1}, in_process),
        (
            "stored",
            f"teacher.where={{name: store, path: ...}} train.sharding={'full' if case.ranks > 1 else 'none'}",
            {"where": "store", "sharded": case.ranks > 1},
            in_process or written,
        ),
    ]
    found = []
    for name, keys, changes, refused in ways:
        changed = case.at(**changes)
        worst = None if refused else peak(changed)
        found.append(Way(name=name, keys=keys, case=changed, refused=refused, worst=worst))
    return found


def _may_shard_teacher(recipe: Recipe) -> bool:
    """Whether a teacher that writes nothing and gives no weights will do."""
    writes = recipe.base_author == "teacher" and recipe.responses.server is None
    cut = recipe.student.model is None and recipe.student.init in PRUNED
    return not (recipe.on_policy or writes or cut)


def fits(case: Case) -> bool:
    """Whether every stage fits a rank's memory."""
    return peak(case).bytes <= usable(case)


def change_of(case: Case) -> Change | None:
    """The first single change that makes a case fit; None where there is none.

    Those come first that leave the update as it is.
    """
    return next((change for change in _changes(case) if fits(change.case)), None)


def _changes(case: Case) -> Iterator[Change]:
    recipe, train = case.recipe, case.recipe.train
    if case.ranks > 1 and not case.sharded:
        yield Change(text="train.sharding=full", case=case.at(sharded=True))
    if not train.gradient_checkpointing:
        changed = case.at(recipe__train__gradient_checkpointing=True)
        yield Change(text="train.gradient_checkpointing=true", case=changed)
    for rows, accumulated in _smaller_batches(train.per_device_train_batch_size, train.gradient_accumulation_steps):
        changed = case.at(recipe__train__per_device_train_batch_size=rows)
        changed = changed.at(recipe__train__gradient_accumulation_steps=accumulated)
        text = f"train.per_device_train_batch_size={rows} train.gradient_accumulation_steps={accumulated}"
        yield Change(text=text, case=changed)
    if case.where == "in_process":
        yield Change(text="teacher.where={name: server, base_url: ...}", case=case.at(where="server"))
        if case.ranks > 1 and _may_shard_teacher(recipe):
            yield Change(text="teacher.where=sharded", case=case.at(where="sharded"))
    if recipe.teacher.dtype == "float32" and case.where == "in_process":
        yield Change(text="teacher.dtype=bfloat16", case=case.at(recipe__teacher__dtype="bfloat16"))
    if recipe.teacher.bits is None and case.where == "in_process":
        for bits in (8, 4):
            yield Change(text=f"teacher.bits={bits}", case=case.at(recipe__teacher__bits=bits))
    if not case.fleet.device.host:
        for doubled in (2**i * case.ranks for i in range(1, 8)):
            more = case.at(fleet=replace(case.fleet, count=doubled), sharded=True)
            yield Change(text=f"--devices {more.fleet} with train.sharding=full", case=more)


def _smaller_batches(rows: int, accumulated: int) -> Iterator[tuple[int, int]]:
    """Fewer rows at a time, as many in a step."""
    while rows % 2 == 0:
        rows, accumulated = rows // 2, accumulated * 2
        yield rows, accumulated


def server_devices(case: Case) -> int:
    """Devices of this kind that a server of the teacher needs: a power of two, as tensor parallelism has them."""
    if case.teacher is None or case.fleet.device.host:
        return 1
    weights = case.teacher.parameters * BYTES["bfloat16"]
    return 2 ** max(0, ceil(log2(max(weights / (SERVER_SHARE * case.fleet.device.memory_gib * 2**30), 1))))
