"""A teacher in front of another one: what it changes is its own, all else is the other's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from limbeck.teachers.base import Provision, Teacher
from limbeck.types import Head, Response, Sampling, Signal, TokenBatch, TokenPrompt

if TYPE_CHECKING:
    from limbeck.models.loading import LoadedModel
    from limbeck.models.vocabulary import VocabularyCard


@dataclass(kw_only=True)
class InFront(Teacher):
    """Base class of teachers that change the batches on their way to another one, or its signals on their way back.

    Attributes:
        inner: the other one.
    """

    inner: Teacher

    def asks(self, batch: TokenBatch) -> TokenBatch:
        """The batch that the other one is given."""
        return batch

    def signal(self, batch: TokenBatch) -> Signal:
        return self.inner.signal(self.asks(batch))

    def reads(self, batch: TokenBatch) -> TokenBatch:
        return self.inner.reads(batch)

    def fetch_ahead(self, batches: Iterable[TokenBatch], done: Callable[[int], None]) -> None:
        self.inner.fetch_ahead((self.asks(batch) for batch in batches), done)

    def settled(self, batches: Iterable[TokenBatch] | None = None) -> None:
        self.inner.settled(None if batches is None else (self.asks(batch) for batch in batches))

    def locate(self, batches: Iterable[TokenBatch]) -> None:
        self.inner.locate(self.asks(batch) for batch in batches)

    def answers(self, prompts: Sequence[TokenPrompt], sampling: Sampling) -> list[Response]:
        return self.inner.answers(prompts, sampling)

    @property
    def scorer(self) -> Teacher:
        return self.inner.scorer

    @property
    def in_step(self) -> bool:
        return self.inner.in_step

    @property
    def elsewhere(self) -> bool:
        return self.inner.elsewhere

    def attend(self) -> None:
        self.inner.attend()

    def reach(self) -> None:
        self.inner.reach()

    @property
    def fingerprint(self) -> str:
        return self.inner.fingerprint

    @property
    def provides(self) -> frozenset[Provision]:
        return self.inner.provides

    @property
    def vocabulary(self) -> VocabularyCard:  # type: ignore[override]
        return self.inner.vocabulary

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        return self.inner.tokenizer

    @property
    def skeleton(self) -> Any:  # type: ignore[override]
        return self.inner.skeleton

    @property
    def window(self) -> int | None:
        return self.inner.window

    @property
    def size(self) -> int | None:
        return self.inner.size

    @property
    def blocks(self) -> int | None:
        return self.inner.blocks

    @property
    def state_width(self) -> int:
        return self.inner.state_width

    @property
    def bytes_on_disk(self) -> int | None:
        return self.inner.bytes_on_disk

    @property
    def head(self) -> Head:
        return self.inner.head

    def weights(self) -> LoadedModel:
        return self.inner.weights()

    def writing(self) -> LoadedModel:
        return self.inner.writing()

    def release(self) -> None:
        self.inner.release()
