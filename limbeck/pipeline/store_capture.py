"""Capturing a recipe's teacher signals into a store, and the size of that before anything is captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from limbeck.models.fingerprints import tokenizer_fingerprint
from limbeck.objectives import SparseForm
from limbeck.pipeline.build import sparse_form
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.sampling import sampling_of
from limbeck.pipeline.stage_order import STAGES
from limbeck.pipeline.stages.respond import load_responses
from limbeck.pipeline.stages.teach import SCORING_BATCH_SIZE
from limbeck.recipe.load import Recipe, signal_temperatures
from limbeck.rollouts.collate import collate
from limbeck.runtime.console import Console
from limbeck.teachers.store.addresses import addresses_of, seed_of
from limbeck.teachers.store.base import Codec, Frame
from limbeck.teachers.store.dense import Hidden, Svd
from limbeck.teachers.store.manifest import Manifest, TeacherIdentity
from limbeck.teachers.store.sparse import Sampled, TopK
from limbeck.teachers.store.teacher import sampling_tree
from limbeck.teachers.store.texts import Text
from limbeck.teachers.store.writer import StoreWriter, writing
from limbeck.types import DenseSignal, Head, Json, LimbeckError, Response, Signal, SignalSource, TokenBatch

# An approximation of the head is best on the hidden states of so many responses.
CALIBRATION_RESPONSES = 64


class Scorer(SignalSource, Protocol):
    """A teacher that scores any text."""

    @property
    def head(self) -> Head: ...


@dataclass(frozen=True, kw_only=True)
class Captured:
    """What a capture has added.

    Attributes:
        found: responses that the store had before.
    """

    added: int
    found: int
    tokens: int


def codec_of(recipe: Recipe) -> Codec:
    """The codec for a recipe that names none: what its support asks for, with log-probabilities in few bits."""
    form = sparse_form(recipe)
    if form is None:
        return Hidden(dtype=recipe.teacher.cache_dtype)
    return Sampled(draws=form.k) if form.support == "sampled" else TopK(k=form.k)


def frame_of(context: RunContext) -> Frame:
    """What all signals of a recipe's teacher have in common, known without weights."""
    embeddings = context.teacher.skeleton.get_output_embeddings()
    return Frame(
        vocab_size=context.teacher_card.vocab_size,
        width=0 if embeddings is None else embeddings.weight.shape[1],
        temperatures=signal_temperatures(context.recipe),
    )


def heldout_codec(recipe: Recipe, codec: Codec) -> Codec:
    """The codec of held-out texts, which evaluation reads over the whole vocabulary."""
    return codec if isinstance(codec, Hidden) else Hidden(dtype=recipe.teacher.cache_dtype)


def manifest_of(context: RunContext, codec: Codec) -> Manifest:
    """The identity of a store of a recipe's teacher; the stage respond is done."""
    # What it sees is in the addresses: they are those of the texts that it reads.
    teacher, prompts = context.teacher.scorer, context.recipe.prompts
    options = {"chat_options": dict(prompts.chat_options)} if prompts.chat_options else {}
    return Manifest(
        teacher=TeacherIdentity(
            name=teacher.model.model,
            fingerprint=teacher.fingerprint,
            configuration=teacher.configuration_hash,
            dtype=teacher.model.dtype,
            attention=teacher.model.attn_implementation,
            weight_bytes=teacher.bytes_on_disk or 0,
        ),
        tokenizer=tokenizer_fingerprint(teacher.tokenizer),
        template={"name": (context.run.manifest("respond") or {}).get("template")} | options,
        frame=frame_of(context),
        codec=codec,
        heldout=heldout_codec(context.recipe, codec),
    )


def capture(recipe: Recipe, path: Path, codec: Codec | None, *, console: Console, update: bool = False) -> Captured:
    """Score all responses of a recipe with its teacher into a store; what it holds already is not scored again.

    Raises:
        LimbeckError: the store is another teacher's, another process writes to it, or the teacher cannot score.
    """
    context = RunContext(recipe, console)
    if recipe.combine is not None:
        raise LimbeckError(
            f"a store holds the signals of one teacher, but the recipe has {len(recipe.teachers)}; capture each with a "
            "recipe of its own (teacher.model), and name the stores in teachers"
        )
    if "hidden" not in context.teacher.provides:
        raise context.teacher.lacks("hidden")
    codec = codec or codec_of(recipe)
    codec.check(frame_of(context))
    run_pipeline(recipe, stages=STAGES, until="respond", console=console, update=update)
    responses = [*load_responses(context, "train").values(), *load_responses(context, "heldout").values()]
    with writing(path, manifest_of(context, codec), say=console.warn) as writer:
        tokens = sum(response.tokens for response in responses)
        with console.meter("capture", tokens, "tokens") as meter:
            teacher, kept = context.teacher, kept_sampling(recipe)
            return capture_into(writer, teacher, responses, reads=teacher.reads, sampling=kept, advance=meter.advance)


def kept_sampling(recipe: Recipe) -> Json | None:
    """How the answers that are kept beside their signals were written; None where they are not the teacher's alone."""
    section = recipe.responses
    alone = recipe.base_author == "teacher" and section.verify is None and section.draft is None
    return sampling_tree(sampling_of(section)) if alone else None


def capture_into(
    writer: StoreWriter,
    teacher: Scorer,
    responses: Sequence[Response],
    *,
    reads: Callable[[TokenBatch], TokenBatch] = lambda batch: batch,
    sampling: Json | None = None,
    advance: Callable[[int], object],
) -> Captured:
    """Score responses in batches that depend on them alone, so that an interrupted capture ends as a whole one.

    Args:
        reads: a batch as the teacher reads it.
        sampling: how the responses were written, where they are kept too.
        advance: called with the tokens of each batch.
    """
    texts: dict[bytes, Response] = {}
    for start in range(0, len(responses), SCORING_BATCH_SIZE):
        batch = responses[start : start + SCORING_BATCH_SIZE]
        read = addresses_of(reads(collate(batch, range(len(batch)), pad_id=0)))
        texts |= {address: response for address, response in zip(read, batch, strict=True) if address not in texts}
    order = sorted(texts, key=lambda address: (-texts[address].length, address))
    shared = _shared(writer, teacher, [texts[address] for address in order])
    writer.store.locate(order)
    found = sum(writer.holds(address) for address in order)
    tokens = 0
    for start in range(0, len(order), SCORING_BATCH_SIZE):
        batch = order[start : start + SCORING_BATCH_SIZE]
        missing = {address for address in batch if not writer.holds(address)}
        if missing:
            tokens += _score(writer, teacher, [(a, texts[a]) for a in batch], missing, shared, sampling)
        advance(sum(texts[address].tokens for address in batch))
    return Captured(added=len(order) - found, found=found, tokens=tokens)


def _score(
    writer: StoreWriter,
    teacher: Scorer,
    batch: Sequence[tuple[bytes, Response]],
    missing: set[bytes],
    shared: Mapping[Codec, Mapping[str, Tensor]],
    sampling: Json | None,
) -> int:
    """Add the signals of a batch that are missing; their number of tokens."""
    manifest, tokens = writer.manifest, 0
    hidden = _hidden_states(teacher, [response for _, response in batch])
    for (address, response), hidden_TD in zip(batch, hidden, strict=True):
        if address in missing:
            codec = manifest.heldout if response.split == "heldout" else manifest.codec
            dense = DenseSignal(hidden_ND=hidden_TD, head=teacher.head)
            signal = signal_for(codec, manifest.frame, dense, seed=seed_of(address))
            try:
                columns = codec.encode(signal, manifest.frame, shared[codec])
            except LimbeckError as error:
                raise LimbeckError(f"response {response.id} to prompt {response.prompt_id}: {error}") from None
            text = None if sampling is None or response.spans else Text.of(response)
            writer.add(codec, address, columns, text, sampling)
            tokens += response.tokens
    return tokens


def _hidden_states(teacher: SignalSource, responses: Sequence[Response]) -> list[Tensor]:
    signal = teacher.signal(collate(responses, range(len(responses)), pad_id=0))
    assert isinstance(signal, DenseSignal), "all that a teacher which scores any text gives"
    return list(signal.hidden_ND.split([response.tokens for response in responses]))


def signal_for(codec: Codec, frame: Frame, dense: DenseSignal, *, seed: int) -> Signal:
    """The signal of the kind that a codec keeps.

    Args:
        seed: of draws.
    """
    if isinstance(codec, TopK):
        return SparseForm(support="topk_tail", k=codec.k, temperatures=frame.temperatures).of(dense, seed=seed)
    if isinstance(codec, Sampled):
        return SparseForm(support="sampled", k=codec.draws, temperatures=frame.temperatures).of(dense, seed=seed)
    return dense


def _shared(writer: StoreWriter, teacher: Scorer, responses: Sequence[Response]) -> dict[Codec, Mapping[str, Tensor]]:
    """The tensors that all tokens share, for each codec of the store; made at its first capture."""

    def make(codec: Codec) -> tuple[Head, Mapping[str, Tensor]]:
        head = teacher.head
        states = head.weight_VD.new_zeros(0, head.weight_VD.shape[1])
        if isinstance(codec, Svd):
            some = responses[:: -(-len(responses) // CALIBRATION_RESPONSES)]
            states = torch.cat([_hidden_states(teacher, [response])[0] for response in some])
        return head, codec.shared(head, states)

    return {codec: writer.shared(codec, lambda codec=codec: make(codec)) for codec in writer.manifest.codecs}
