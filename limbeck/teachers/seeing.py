"""A teacher that reads other prompts than the student: any teacher, with its own prompt before the same response."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from limbeck.teachers.base import Provision, Teacher
from limbeck.types import Head, Response, Sampling, Signal, TokenBatch, TokenPrompt

if TYPE_CHECKING:
    from limbeck.models.loading import LoadedModel
    from limbeck.models.vocabulary import VocabularyCard

PromptIds = Callable[[Sequence[str]], Sequence[tuple[int, ...]]]


def behind(batch: TokenBatch, prompts: Sequence[tuple[int, ...]]) -> TokenBatch:
    """The responses of a batch behind other prompts. Responses, labels and their order stay as they are.

    Args:
        prompts: ids of the prompt of each row.
    """
    import torch

    device = batch.input_ids_BT.device
    rows, losses = [], []
    for ids_T, real_T, loss_T, prompt in zip(
        batch.input_ids_BT, batch.attention_mask_BT, batch.loss_mask_BT, prompts, strict=True
    ):
        length, first = int(real_T.sum()), int(loss_T.nonzero()[0])
        rows.append(torch.cat([torch.tensor(prompt, device=device), ids_T[first + 1 : length]]))
        losses.append(torch.cat([loss_T.new_zeros(len(prompt) - 1), loss_T[first:length]]))
    # Padding is never read: the id of a token that is surely there will do.
    padded_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    ends_B1 = torch.tensor([[len(row)] for row in rows], device=device)
    return replace(
        batch,
        input_ids_BT=padded_BT,
        attention_mask_BT=(torch.arange(padded_BT.shape[1], device=device) < ends_B1).long(),
        loss_mask_BT=torch.nn.utils.rnn.pad_sequence(losses, batch_first=True, padding_value=False),
    )


@dataclass(kw_only=True)
class SeeingTeacher(Teacher):
    """A teacher with prompts of its own.

    Attributes:
        inner: the teacher that reads them.
        prompt_ids: ids of the prompts that it reads, by the ids of the student's.
        view: what it sees, as fingerprints hold it.
    """

    inner: Teacher
    prompt_ids: PromptIds
    view: str

    @classmethod
    def of(cls, inner: Teacher, prompt_ids: PromptIds, view: str) -> SeeingTeacher:
        return cls(model=inner.model, device=inner.device, inner=inner, prompt_ids=prompt_ids, view=view)

    def signal(self, batch: TokenBatch) -> Signal:
        return self.inner.signal(self.reads(batch))

    def reads(self, batch: TokenBatch) -> TokenBatch:
        return behind(batch, self.prompt_ids(batch.prompts))

    def answers(self, prompts: Sequence[TokenPrompt], sampling: Sampling) -> list[Response]:
        return self.inner.answers(prompts, sampling)

    @property
    def scorer(self) -> Teacher:
        return self.inner.scorer

    def reach(self) -> None:
        self.inner.reach()

    def fetch_ahead(self, batches: Iterable[TokenBatch], done: Callable[[int], None]) -> None:
        self.inner.fetch_ahead((self.reads(batch) for batch in batches), done)

    def settled(self, batches: Iterable[TokenBatch] | None = None) -> None:
        self.inner.settled(None if batches is None else (self.reads(batch) for batch in batches))

    def locate(self, batches: Iterable[TokenBatch]) -> None:
        self.inner.locate(self.reads(batch) for batch in batches)

    @property
    def fingerprint(self) -> str:
        from limbeck.runtime.records import fingerprint

        return fingerprint({"teacher": self.inner.fingerprint, "sees": self.view})

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

    def release(self) -> None:
        self.inner.release()
