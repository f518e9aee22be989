"""Stage 3: the teacher signal of every response token, stored once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from limbeck.pipeline.build import sparse_form
from limbeck.pipeline.capturing import SHARD_ROWS, batches_of, capture_into
from limbeck.pipeline.capturing_by_ranks import Chunks, capture_by_ranks, capture_share
from limbeck.pipeline.context import RunContext, Stage
from limbeck.pipeline.sampled_responses import captures
from limbeck.pipeline.several import by_teacher
from limbeck.pipeline.sharing import choice_inputs
from limbeck.pipeline.stages.respond import load_responses, teacher_inputs
from limbeck.pipeline.store_identity import exact_codec, manifest_of
from limbeck.pipeline.students_choice import capture_with_choice
from limbeck.rollouts.table import ResponseTable
from limbeck.runtime.folders import remove
from limbeck.runtime.shared_work import Job
from limbeck.teachers.base import Teacher
from limbeck.teachers.several import SeveralTeachers
from limbeck.teachers.store.dense import Hidden
from limbeck.teachers.store.reader import Store
from limbeck.teachers.store.source import StoredSignals
from limbeck.teachers.store.writer import StoreWriter, writing_alone
from limbeck.types import DenseSignal, Head, Json, Response, Signal, SignalSource, TokenBatch


def _signal_inputs(context: RunContext) -> Json:
    form = sparse_form(context.recipe)
    inputs = {
        "cache": context.recipe.teacher.cache,
        "dtype": context.recipe.teacher.cache_dtype,
        "teacher": teacher_inputs(context),
    }
    if context.recipe.teacher.across is not None:
        inputs["across"] = True
    if not captures(context) and not _scores_train(context):
        inputs["split"] = "heldout"
    inputs |= choice_inputs(context)
    return inputs if form is None else inputs | {"sparse": asdict(form)}


def _run_signal(context: RunContext) -> Json:
    if "captured" in context.teacher.provides:
        return {"cached": False, "captured": _locate(context)}
    if not context.recipe.teacher.cache:
        return {"cached": False}

    run = context.run
    captured = sorted((run.responses / "batches").glob("[0-9]*.safetensors"))
    with _writing(context, run.signal) as writer:
        tokens = _take_in(context, writer, captured) if captured else _score(context, writer)
    size = sum(path.stat().st_size for path in run.signal.iterdir())
    return {"cached": True, "captured_while_sampling": bool(captured), "tokens": tokens, "mib": size >> 20}


@contextmanager
def _writing(context: RunContext, folder: Path, teacher: Teacher | None = None) -> Iterator[StoreWriter]:
    """A store of the run.

    Args:
        teacher: one of several, whose hidden states are kept as they are.
    """
    codec = exact_codec(context.recipe) if teacher is None else Hidden()
    manifest, say = manifest_of(context, codec, teacher), context.console.warn
    with writing_alone(folder, manifest, say=say, shard_responses=SHARD_ROWS) as writer:
        yield writer


def _take_in(context: RunContext, writer: StoreWriter, captured: list[Path]) -> int:
    """Link what the teacher's states were stored in while it sampled; no token is scored."""
    codec = writer.manifest.codec
    head = context.teacher.head
    writer.shared(codec, lambda: (head, codec.shared(head, head.weight_VD[:0])))
    for number, path in enumerate(captured):
        writer.take_in(path, codec, number)
    return 0


def _score(context: RunContext, writer: StoreWriter) -> int:
    """One pass of the teacher over all responses; those whose signal is on disk are not scored again.

    With a sparse support the held-out rows are kept whole where the teacher says that much: evaluation measures over
    the whole vocabulary.
    """
    responses = _scored(context)
    tokens = sum(response.tokens for response in responses)
    with context.console.meter("teach", tokens, "tokens") as meter:
        if context.recipe.mixing is not None:
            _score_mean(context, writer, responses, meter.advance)
        elif context.recipe.teacher.student_k:
            capture_with_choice(context, writer, responses, advance=meter.advance)
        else:
            _score_each(context, writer, responses, meter.advance)
    return tokens


def _score_each(
    context: RunContext, writer: StoreWriter, responses: ResponseTable, advance: Callable[[int], None]
) -> None:
    """Every response by its teacher; one of several is in memory at a time."""
    teacher = context.teacher
    # One that is elsewhere is asked by one process, which keeps many questions under way.
    shared = context.launch.ranks > 1 and ("weights" in teacher.provides or teacher.in_step)
    for number, some in enumerate(by_teacher(context, responses)):
        if number:
            teacher.release()
        if shared:
            # Before the others look what it holds.
            writer.describe()
            with context.work.posted("teach", {"group": number}) as share:
                capture_by_ranks(writer, teacher, some, share, reads=teacher.reads, advance=advance)
        else:
            capture_into(writer, teacher, some, reads=teacher.reads, advance=advance)
        writer.flush()


def _help(context: RunContext, job: Job) -> None:
    """Another rank's share of a pass of the teacher."""
    teacher, number = context.teacher, job.fields["group"]
    if number:
        teacher.release()
    responses = by_teacher(context, _scored(context))[number]
    manifest = manifest_of(context, exact_codec(context.recipe))
    chunks = Chunks.of(context.run.signal, responses, teacher.reads)
    capture_share(chunks, manifest, teacher, job)


def _score_mean(
    context: RunContext, writer: StoreWriter, responses: Sequence[Response], advance: Callable[[int], None]
) -> None:
    """Every response by all teachers, one in memory at a time: the states of each are kept until all are there."""
    parts = context.run.signal / "parts"
    reads, stores = context.teacher.reads, {}
    writer.describe()
    for name, member in context.run_teachers.items():
        reading = member if context.seen is None else context.seen.teacher(member)
        if "captured" in member.provides:
            member.locate(reads(batch) for batch in batches_of(responses))
        with _writing(context, parts / name, member) as part:
            capture_into(part, reading, responses, reads=reads, advance=lambda tokens: None)
        member.release()
        stores[name] = StoredSignals(Store(parts / name), context.device, reads)
    several = context.teacher.scorer
    assert isinstance(several, SeveralTeachers), "a mean is one of several teachers"
    capture_into(writer, _Mean(several, stores), responses, reads=reads, advance=advance)
    writer.flush()
    remove(parts)


@dataclass(frozen=True)
class _Mean:
    """Several teachers as one, from what each has said."""

    several: SeveralTeachers
    stores: Mapping[str, StoredSignals]

    @property
    def head(self) -> Head:
        return self.several.head

    def signal(self, batch: TokenBatch) -> Signal:
        found = {name: store.signal(batch) for name, store in self.stores.items()}
        dense = {name: signal for name, signal in found.items() if isinstance(signal, DenseSignal)}
        if self.several.of_p:
            return self.several.mean_of_p(dense)
        hidden = {name: signal.hidden_ND for name, signal in dense.items()}
        return DenseSignal(hidden_ND=self.several.joined(hidden), head=self.head)


def _scored(context: RunContext) -> ResponseTable:
    """The responses whose signal the run reads; they stay on disk until one is asked for."""
    heldout = load_responses(context, "heldout").responses
    return heldout.followed_by(load_responses(context, "train").responses) if _scores_train(context) else heldout


def _locate(context: RunContext) -> int:
    """Check that captured signals are there for all responses of the run; their number."""
    responses = _scored(context)
    context.teacher.locate(batches_of(responses))
    return len(responses)


def _scores_train(context: RunContext) -> bool:
    """Whether the teacher scores the training responses that were written before training."""
    recipe = context.recipe
    # What a student chose is kept: it chooses otherwise in every step.
    chosen = recipe.teacher.student_k > 0 and recipe.responses.source.trains_on_initial
    if recipe.teacher.cache and not recipe.teacher.keeps_whole:
        # They are scored a few steps before they are trained on.
        return False
    return not recipe.on_policy or recipe.sft_on_responses or chosen


def stored_signals(context: RunContext) -> StoredSignals:
    """The signals that the run has stored."""
    store = Store(context.run.signal, remedy="delete the folder and run the same command again")
    return StoredSignals(store, context.device, context.teacher.reads)


def open_teacher(context: RunContext, beside: Teacher | None = None) -> SignalSource:
    """Source of teacher signals for training and evaluation: files, or the teacher where the run has none.

    Args:
        beside: the teacher that a training asks; None takes that of the run.
    """
    if "captured" in context.teacher.provides:
        # In one pass, not batch by batch.
        _locate(context)
    elif context.recipe.teacher.cache:
        return stored_signals(context)
    return beside or context.teacher


STAGE = Stage(
    name="teach",
    inputs=_signal_inputs,
    run=_run_signal,
    outputs=lambda run: (run.signal, run.blocks_before),
    intermediate=True,
    hands_on_teacher=True,
    helped={"teach": _help},
)
