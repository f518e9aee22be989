"""Ways to spread a run over devices: which of them fit, and the one change that makes a recipe fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, log2

from limbeck.pipeline.checks import why_whole
from limbeck.pipeline.plan.case import Case
from limbeck.pipeline.plan.memory import StageMemory, peak
from limbeck.pipeline.plan.sizes import BYTES
from limbeck.recipe.load import Recipe
from limbeck.recipe.teacher import ITSELF, MOVING
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
        return self.worst is not None and self.worst.bytes <= self.case.usable


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
    recipe, whole = case.recipe, _why_not_sharded(case.recipe)
    apart, teacher = ("sharded", " teacher.where=sharded") if _may_shard_teacher(recipe) else ("in_process", "")
    sharded = case.ranks > 1 and whole is None
    spread = f" train.sharding={'full' if sharded else 'none'}"
    server, store = _server_keys(recipe) + spread, "teacher.where={name: store, path: ...}" + spread
    ways = [
        ("local", "train.sharding=none", {"where": "in_process", "sharded": False}, in_process),
        ("sharded", f"train.sharding=full{teacher}", {"where": apart, "sharded": True}, in_process or one or whole),
        ("served", server, {"where": "server", "sharded": sharded}, in_process or _why_not_served(recipe)),
        ("stored", store, {"where": "store", "sharded": sharded}, in_process or _why_not_stored(recipe)),
    ]
    found = []
    for name, keys, changes, refused in ways:
        changed = case.at(**changes)
        worst = None if refused else peak(changed)
        found.append(Way(name=name, keys=keys, case=changed, refused=refused, worst=worst))
    return found


def _may_shard_teacher(recipe: Recipe) -> bool:
    """Whether a teacher that writes nothing and gives no weights will do, and all ranks ask it as often."""
    teacher, preference = recipe.teacher, recipe.preference
    writes = recipe.base_author == "teacher" and recipe.responses.server is None
    asked_alone = (
        recipe.on_policy
        or recipe.combine is not None
        or teacher.model in ITSELF
        or teacher.cache_limit_gib is not None
        or teacher.student_k > 0
        or (preference is not None and preference.pairs.needs_teacher)
    )
    return not (writes or asked_alone or _why_in_process(recipe))


def _why_in_process(recipe: Recipe) -> str | None:
    """What takes the teacher's weights in the processes of the run; None where nothing does."""
    return "teacher.bits is of weights in this process" if recipe.teacher.bits is not None else _why_weights(recipe)


def _why_weights(recipe: Recipe) -> str | None:
    """The same, but for the way that its weights are kept."""
    if recipe.teacher.model in MOVING:
        return "the teacher is the student that trains"
    cut = recipe.student.model is None and recipe.student.init in PRUNED
    return "the student is cut out of the teacher's weights" if cut else None


def _why_not_sharded(recipe: Recipe) -> str | None:
    """Why the student stays whole on each rank; None where it can be sharded."""
    if not recipe.train.optim.shards:
        return "the optimizer updates no student that is sharded"
    why = why_whole(recipe)
    return None if why is None else why[0]


def _why_not_served(recipe: Recipe) -> str | None:
    """Why no server can be the teacher; None where one can."""
    source = recipe.responses.source
    if recipe.responses.draft is not None or (source.samples_teacher and not source.paired):
        return "the teacher writes together with another model"
    return _why_in_process(recipe)


def _server_keys(recipe: Recipe) -> str:
    """The keys that leave to a server what the teacher says, and what it writes."""
    source = recipe.responses.source
    writes = recipe.base_author == "teacher" or (source.paired and source.samples_teacher)
    answers = " responses.server={base_url: ...}" if writes and recipe.responses.server is None else ""
    return "teacher.where={name: server, base_url: ...}" + answers


def _why_not_stored(recipe: Recipe) -> str | None:
    """Why no store can be the teacher; None where one can."""
    if recipe.on_policy:
        return "the student writes texts that no store has"
    if recipe.base_author == "teacher" and (recipe.responses.draft or recipe.responses.verify):
        return "the teacher writes texts that no store has"
    if recipe.teacher.student_k or recipe.teacher.cache_limit_gib is not None:
        return "the teacher is asked anew for what is kept of it"
    return _why_weights(recipe)


def fits(case: Case) -> bool:
    """Whether every stage fits a rank's memory."""
    return peak(case).bytes <= case.usable


def change_of(case: Case) -> Change | None:
    """The first single change that makes a case fit; None where there is none.

    Those come first that leave the update as it is.
    """
    return next((change for change in _changes(case) if fits(change.case)), None)


def _changes(case: Case) -> Iterator[Change]:
    recipe, train = case.recipe, case.recipe.train
    shards = _why_not_sharded(recipe) is None
    if case.ranks > 1 and not case.sharded and shards:
        yield Change(text="train.sharding=full", case=case.at(sharded=True))
    if not train.gradient_checkpointing:
        changed = case.at(recipe__train__gradient_checkpointing=True)
        yield Change(text="train.gradient_checkpointing=true", case=changed)
    for rows, accumulated in _smaller_batches(recipe):
        changed = case.at(recipe__train__per_device_train_batch_size=rows)
        changed = changed.at(recipe__train__gradient_accumulation_steps=accumulated)
        text = f"train.per_device_train_batch_size={rows} train.gradient_accumulation_steps={accumulated}"
        yield Change(text=text, case=changed)
    if case.where == "in_process":
        yield from _of_teacher(case)
    if not case.fleet.device.host and shards:
        for doubled in (2**i * case.ranks for i in range(1, 8)):
            more = case.at(fleet=replace(case.fleet, count=doubled), sharded=True)
            yield Change(text=f"--devices {more.fleet} with train.sharding=full", case=more)


def _of_teacher(case: Case) -> Iterator[Change]:
    """Changes of a teacher that each rank has whole."""
    recipe = case.recipe
    if _why_not_served(recipe) is None:
        yield Change(text=_server_keys(recipe), case=case.at(where="server"))
    if case.ranks > 1 and _may_shard_teacher(recipe):
        yield Change(text="teacher.where=sharded", case=case.at(where="sharded"))
    if recipe.teacher.model in ITSELF:
        return
    if recipe.teacher.dtype == "float32":
        yield Change(text="teacher.dtype=bfloat16", case=case.at(recipe__teacher__dtype="bfloat16"))
    if recipe.teacher.bits is None:
        for bits in (8, 4):
            yield Change(text=f"teacher.bits={bits}", case=case.at(recipe__teacher__bits=bits))


def _smaller_batches(recipe: Recipe) -> Iterator[tuple[int, int]]:
    """Fewer rows at a time, as many in a step; the two of a pair stay together."""
    rows, accumulated = recipe.train.per_device_train_batch_size, recipe.train.gradient_accumulation_steps
    least = 2 if recipe.responses.source.paired else 1
    while rows % (2 * least) == 0:
        rows, accumulated = rows // 2, accumulated * 2
        yield rows, accumulated


def server_devices(case: Case) -> int:
    """Devices of this kind that a server of the teacher needs: a power of two, as tensor parallelism has them."""
    if case.teacher is None or case.fleet.device.host:
        return 1
    weights = case.teacher.parameters * BYTES["bfloat16"]
    return 2 ** max(0, ceil(log2(max(weights / (SERVER_SHARE * case.fleet.device.memory_gib * 2**30), 1))))
