"""Scoring responses with a teacher into a store: that of one run, or one that many runs share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from limbeck.objectives import SparseForm
from limbeck.objectives.sparse import sparse_columns
from limbeck.rollouts.collate import collate
from limbeck.rollouts.table import lengths_of
from limbeck.runtime.files import whole_file
from limbeck.teachers.base import Teacher
from limbeck.teachers.store.addresses import addresses_of, seed_of
from limbeck.teachers.store.base import Codec, Frame
from limbeck.teachers.store.dense import Svd
from limbeck.teachers.store.reader import sealed_shards
from limbeck.teachers.store.shards import Columns, write_shard_file
from limbeck.teachers.store.source import as_it_is
from limbeck.teachers.store.sparse import Sampled, TopK
from limbeck.teachers.store.texts import Text
from limbeck.teachers.store.writer import ShardFiller, StoreWriter
from limbeck.types import (
    DenseSignal,
    Head,
    Json,
    LimbeckError,
    Response,
    Signal,
    SignalSource,
    TokenBatch,
    TopKSignal,
)

# Rows of one forward pass, and of one shard of a run: the most that is redone after an interruption.
SCORING_BATCH_SIZE = 16
SHARD_ROWS = 64
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


def capture_into(
    writer: StoreWriter,
    teacher: Scorer,
    responses: Sequence[Response],
    *,
    reads: Callable[[TokenBatch], TokenBatch] = as_it_is,
    sampling: Json | None = None,
    advance: Callable[[int], None],
) -> Captured:
    """Score responses in batches that depend on them alone, so that an interrupted capture ends as a whole one.

    Args:
        teacher: may be asked about many responses at a time, where it is one over a network.
        reads: a batch as the teacher reads it, whose hash is the address; the teacher itself is given the batch.
        sampling: how the responses were written, where they are kept too.
        advance: called with the tokens that were scored, or were there.
    """
    texts = by_address(responses, reads)
    order = list(texts)
    capture = Capture(writer, teacher, texts, sampling)
    if sealed_shards(writer.store.path):
        # What they share may have been lost; shards of another one go with it.
        _ = capture.shared
    writer.store.locate(order)
    left = {address for address in order if not writer.holds(address)}
    advance(sum(texts[address].tokens for address in order if address not in left))
    size, tokens = _asked_at_once(writer, teacher, len(order)), 0
    for start in range(0, len(order), size):
        some = {address: texts[address] for address in order[start : start + size]}
        if missing := left & some.keys():
            asked = [response for address, response in some.items() if address in missing]
            tokens += sum(response.tokens for response in asked)
            with _asking(writer, teacher, asked, advance) as counting:
                capture.score_all(some, missing, counting)
    return Captured(added=len(left), found=len(order) - len(left), tokens=tokens)


def by_address(responses: Sequence[Response], reads: Callable[[TokenBatch], TokenBatch]) -> Mapping[bytes, Response]:
    """Responses by the addresses of their signals, each once, the longest first; those on disk stay there."""
    rows: dict[bytes, int] = {}
    for row, address in enumerate(addresses_as_read(responses, reads)):
        rows.setdefault(address, row)
    lengths = lengths_of(responses)
    # Sorting keeps the order of equal lengths: a batch depends on the responses and their order alone.
    return _Addressed(responses, {address: rows[address] for address in sorted(rows, key=lambda a: -lengths[rows[a]])})


class _Addressed(Mapping[bytes, Response]):
    """Some responses, each under an address."""

    def __init__(self, responses: Sequence[Response], rows: Mapping[bytes, int]):
        self._responses, self._rows = responses, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._rows)

    def __contains__(self, address: object) -> bool:
        return address in self._rows

    def __getitem__(self, address: bytes) -> Response:
        return self._responses[self._rows[address]]


def _asked_at_once(writer: StoreWriter, teacher: Scorer, most: int) -> int:
    """Responses that a teacher over a network is asked about at a time.

    Hidden states that are on their way into a store take room on the disk; likeliest tokens take next to none.
    """
    if isinstance(teacher, Teacher) and "hidden" in teacher.provides:
        return max(writer.shard_responses, SHARD_ROWS)
    return max(most, 1)


@contextmanager
def _asking(
    writer: StoreWriter, teacher: Scorer, responses: Sequence[Response], advance: Callable[[int], None]
) -> Iterator[Callable[[int], None]]:
    """A block in which responses are scored, about which the teacher was asked before; it ends with all on disk.

    Yields:
        What counts the tokens that are scored in it.
    """
    if not isinstance(teacher, Teacher):
        yield advance
        return
    counted = 0

    def count(tokens: int) -> None:
        nonlocal counted
        counted += tokens
        advance(tokens)

    teacher.fetch_ahead(batches_of(responses), count)
    yield advance if counted == 0 else lambda tokens: None
    writer.flush()
    teacher.settled(batches_of(responses))


def batches_of(responses: Sequence[Response]) -> Iterator[TokenBatch]:
    """Some responses in batches of the size that they are scored in."""
    for start in range(0, len(responses), SCORING_BATCH_SIZE):
        batch = responses[start : start + SCORING_BATCH_SIZE]
        yield collate(batch, range(len(batch)), pad_id=0)


def addresses_as_read(responses: Sequence[Response], reads: Callable[[TokenBatch], TokenBatch]) -> list[bytes]:
    """The addresses of the signals of some responses."""
    return [address for batch in batches_of(responses) for address in addresses_of(reads(batch))]


@dataclass
class Capture:
    """One pass of a teacher over some responses by their addresses, longest first."""

    writer: ShardFiller
    teacher: Scorer
    texts: Mapping[bytes, Response]
    sampling: Json | None

    def score_all(
        self, texts: Mapping[bytes, Response], missing: Collection[bytes], advance: Callable[[int], None]
    ) -> None:
        """Add the signals that are missing of some texts; a batch with one of them is scored whole."""
        every = list(texts.items())
        for start in range(0, len(every), SCORING_BATCH_SIZE):
            batch = every[start : start + SCORING_BATCH_SIZE]
            if any(address in missing for address, _ in batch):
                advance(self._score(batch, missing))

    def _score(self, batch: Sequence[tuple[bytes, Response]], missing: Collection[bytes]) -> int:
        """Add the signals of a batch that are missing; their number of tokens."""
        manifest, tokens = self.writer.manifest, 0
        signals = signals_of(self.teacher, [response for _, response in batch])
        for (address, response), signal in zip(batch, signals, strict=True):
            if address in missing:
                codec = manifest.heldout if response.split == "heldout" else manifest.codec
                kept = signal_for(codec, manifest.frame, signal, seed=seed_of(address))
                columns = _encoded(codec, manifest.frame, response, kept, self.shared[codec])
                text = None if self.sampling is None or response.spans else Text.of(response)
                self.writer.add(codec, address, columns, text, self.sampling)
                tokens += response.tokens
        return tokens

    @cached_property
    def shared(self) -> dict[Codec, Mapping[str, Tensor]]:
        """The tensors that all tokens share, for each codec of the store.

        Made when the first signal is there, so that nothing is written of a teacher whose numbers are none.
        """
        return {
            codec: self.writer.shared(codec, lambda codec=codec: self._made(codec))
            for codec in self.writer.manifest.codecs
        }

    def _made(self, codec: Codec) -> tuple[Head, Mapping[str, Tensor]]:
        head = self.teacher.head
        states = head.weight_VD.new_zeros(0, head.weight_VD.shape[1])
        if isinstance(codec, Svd):
            some = list(self.texts)[:: -(-len(self.texts) // CALIBRATION_RESPONSES)]
            signals = (signal for address in some for signal in signals_of(self.teacher, [self.texts[address]]))
            states = torch.cat([signal.hidden_ND for signal in signals if isinstance(signal, DenseSignal)])
        return head, codec.shared(head, states)


def write_signals(
    path: Path,
    addresses: Sequence[bytes],
    responses: Sequence[Response],
    signals: Sequence[Signal],
    codec: Codec,
    frame: Frame,
) -> None:
    """Write the signals of some responses as a shard outside any store, whole or not at all.

    Raises:
        LimbeckError: one is not finite, or beyond the precision.
    """
    entries = {}
    for address, response, signal in zip(addresses, responses, signals, strict=True):
        kept = signal_for(codec, frame, signal, seed=seed_of(address))
        entries[address] = _encoded(codec, frame, response, kept, {})
    with whole_file(path) as partial:
        write_shard_file(partial, entries, {})


def _encoded(codec: Codec, frame: Frame, response: Response, signal: Signal, shared: Mapping[str, Tensor]) -> Columns:
    try:
        return codec.encode(signal, frame, shared)
    except LimbeckError as error:
        raise LimbeckError(f"response {response.id} to prompt {response.prompt_id}: {error}") from None


def signals_of(teacher: SignalSource, responses: Sequence[Response]) -> list[Signal]:
    """What a teacher says of each of some responses, scored in one batch.

    Raises:
        LimbeckError: a hidden state that is not finite.
    """
    return signals_by_row(teacher, collate(responses, range(len(responses)), pad_id=0))


def signals_by_row(teacher: SignalSource, batch: TokenBatch) -> list[Signal]:
    """What a teacher says of each response of a batch.

    Raises:
        LimbeckError: a hidden state that is not finite.
    """
    signal = teacher.signal(batch)
    lengths = batch.loss_mask_BT.sum(1).tolist()
    if isinstance(signal, DenseSignal):
        parts = signal.hidden_ND.split(lengths)
        for hidden_TD, name in zip(parts, batch.ids, strict=True):
            # Here, before anything of a teacher whose numbers are none is on disk.
            if not hidden_TD.isfinite().all():
                raise LimbeckError(f"the teacher's output is not finite on response {name}; try teacher.dtype=float32")
        return [DenseSignal(hidden_ND=hidden_TD, head=signal.head) for hidden_TD in parts]
    assert isinstance(signal, TopKSignal), "all else that a teacher can provide: see limbeck.pipeline.provisions"
    columns = {name: getattr(signal, name).split(lengths) for name in sparse_columns(TopKSignal)}
    return [
        TopKSignal(temperatures=signal.temperatures, **{name: parts[row] for name, parts in columns.items()})
        for row in range(len(lengths))
    ]


def signal_for(codec: Codec, frame: Frame, signal: Signal, *, seed: int) -> Signal:
    """The signal of the kind that a codec keeps, at the temperatures of the store.

    Args:
        seed: of draws.
    """
    if isinstance(signal, TopKSignal):
        return at_temperatures(signal, frame.temperatures)
    if isinstance(signal, DenseSignal) and isinstance(codec, TopK | Sampled):
        return _form_of(codec, frame).of(signal, seed=seed)
    return signal


def _form_of(codec: TopK | Sampled, frame: Frame) -> SparseForm:
    if isinstance(codec, TopK):
        return SparseForm(support="topk_tail", k=codec.k, temperatures=frame.temperatures)
    return SparseForm(support="sampled", k=codec.draws, temperatures=frame.temperatures)


def at_temperatures(signal: TopKSignal, temperatures: tuple[float, ...]) -> TopKSignal:
    """A signal of a teacher that says no more, on the grid of a store.

    Of a temperature at which log Z is not known it is NaN, and refused where it is read.
    """
    known = dict(zip(signal.temperatures, signal.log_z_NG.unbind(-1), strict=True))
    unknown_N = torch.full_like(signal.log_z_NG[:, 0], torch.nan)
    log_z_NG = torch.stack([known.get(tau, unknown_N) for tau in temperatures], dim=-1)
    return replace(signal, temperatures=temperatures, log_z_NG=log_z_NG)
