"""A teacher that reads other prompts than the student: any teacher, with its own prompt before the same response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from limbeck.teachers.base import Teacher
from limbeck.teachers.in_front import InFront
from limbeck.types import Signal, TokenBatch

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
class SeeingTeacher(InFront):
    """A teacher with prompts of its own.

    Attributes:
        prompt_ids: ids of the prompts that it reads, by the ids of the student's.
        view: what it sees, as fingerprints hold it.
    """

    prompt_ids: PromptIds
    view: str

    @classmethod
    def of(cls, inner: Teacher, prompt_ids: PromptIds, view: str) -> SeeingTeacher:
        return cls(model=inner.model, device=inner.device, inner=inner, prompt_ids=prompt_ids, view=view)

    def asks(self, batch: TokenBatch) -> TokenBatch:
        return self.reads(batch)

    def read_stored(self, batch: TokenBatch) -> Signal | None:
        return self.inner.read_stored(self.asks(batch))

    def reads(self, batch: TokenBatch) -> TokenBatch:
        return behind(batch, self.prompt_ids(batch.prompts))

    @property
    def fingerprint(self) -> str:
        from limbeck.runtime.records import fingerprint

        return fingerprint({"teacher": self.inner.fingerprint, "sees": self.view})
