"""The student's own likeliest tokens in a top-k signal.

Where the student is likely and the teacher is not, the teacher's k tokens do not say how unlikely it finds that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from limbeck.teachers.base import Teacher
from limbeck.teachers.in_front import InFront
from limbeck.teachers.parts import rows_of_batch
from limbeck.types import DenseSignal, Signal, TokenBatch

if TYPE_CHECKING:
    from torch import Tensor, nn


# Of the student's logits at a time.
_BLOCK_BYTES = 1 << 26

Choose = Callable[[TokenBatch], "Tensor"]
Keep = Callable[[DenseSignal, "Tensor"], Signal]


def likeliest_of(student: nn.Module, batch: TokenBatch, *, count: int, vocab_size: int) -> Tensor:
    """The ids of the student's likeliest tokens at every position of the loss (N, count)."""
    import torch

    from limbeck.models.forward import evaluating, hidden_states
    from limbeck.models.heads import head_of, project
    from limbeck.ops import onednn

    with torch.inference_mode(), evaluating(student), onednn.linears():
        head = head_of(student, vocab_size, verify=False)
        hidden_ND = hidden_states(student, batch.to(head.weight_VD.device))
        rows = max(1, _BLOCK_BYTES // (4 * vocab_size))
        blocks = [project(head, some_ND).topk(count, dim=-1).indices for some_ND in hidden_ND.split(rows)]
        chosen_NS = torch.cat(blocks) if blocks else hidden_ND.new_empty(0, count, dtype=torch.int64)
    return chosen_NS.clone()


@dataclass(kw_only=True)
class StudentsChoice(InFront):
    """A teacher of which the likeliest tokens are kept, and those that the student finds likeliest.

    The student reads each response alone, so that its choice does not depend on the others of a batch.

    Attributes:
        choose: gives the student's tokens (N, S) for a batch with the student's prompts.
        keep: gives what is kept of a whole distribution, with the chosen tokens.
    """

    choose: Choose
    keep: Keep
    # Of responses that are being scored, by their ids: the weights that chose may have moved on before all is on disk.
    _chosen: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, inner: Teacher, choose: Choose, keep: Keep) -> StudentsChoice:
        return cls(model=inner.model, device=inner.device, inner=inner, choose=choose, keep=keep)

    def asks(self, batch: TokenBatch) -> TokenBatch:
        import torch

        for row, name in enumerate(batch.ids):
            if name not in self._chosen:
                self._chosen[name] = self.choose(rows_of_batch(batch, [row])).to("cpu", torch.int32)
        chosen_NS = torch.cat([self._chosen[name] for name in batch.ids]).long()
        return replace(batch, chosen_NS=chosen_NS.to(batch.labels_N.device))

    def signal(self, batch: TokenBatch) -> Signal:
        asked = self.asks(batch)
        return self.kept(self.inner.signal(asked), asked)

    def kept(self, signal: Signal, asked: TokenBatch) -> Signal:
        """What is kept of a signal of a batch with the student's choice."""
        if isinstance(signal, DenseSignal):
            assert asked.chosen_NS is not None, "set by `asks`"
            return self.keep(signal, asked.chosen_NS)
        return signal

    def settled(self, batches: Iterable[TokenBatch] | None = None) -> None:
        """Let go of what was chosen for some batches too; of others nothing is kept anywhere."""
        if batches is None:
            self.inner.settled()
            self._chosen.clear()
            return
        for batch in batches:
            if all(name in self._chosen for name in batch.ids):
                self.inner.settled([self.asks(batch)])
            for name in batch.ids:
                self._chosen.pop(name, None)
