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
from limbeck.teachers.store.addresses import addresses_of
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

    The student reads each response alone, so that its choice does not depend on the others of a batch. It chooses anew
    whenever a response is scored, but for those that were fetched ahead and are not settled yet.

    Attributes:
        choose: gives the student's tokens (N, S) for a batch with the student's prompts.
        keep: gives what is kept of a whole distribution, with the chosen tokens.
    """

    choose: Choose
    keep: Keep
    # Of responses that were fetched ahead, by hashes of their tokens: the answers to them are found by what was chosen,
    # and the weights may have moved on before all is on disk.
    _held: dict[bytes, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, inner: Teacher, choose: Choose, keep: Keep) -> StudentsChoice:
        return cls(model=inner.model, device=inner.device, inner=inner, choose=choose, keep=keep)

    def asks(self, batch: TokenBatch) -> TokenBatch:
        import torch

        chosen = [self._choice(batch, row, address) for row, address in enumerate(addresses_of(batch))]
        return replace(batch, chosen_NS=torch.cat(chosen).long().to(batch.labels_N.device))

    def _choice(self, batch: TokenBatch, row: int, address: bytes) -> Tensor:
        """The student's tokens for a row."""
        import torch

        held = self._held.get(address)
        return self.choose(rows_of_batch(batch, [row])).to("cpu", torch.int32) if held is None else held

    def fetch_ahead(self, batches: Iterable[TokenBatch], done: Callable[[int], None]) -> None:
        """Have the other one prepare its signals, and hold what was chosen for them until they are settled."""
        self.inner.fetch_ahead((self._asks_and_holds(batch) for batch in batches), done)

    def _asks_and_holds(self, batch: TokenBatch) -> TokenBatch:
        for row, address in enumerate(addresses_of(batch)):
            self._held[address] = self._choice(batch, row, address)
        return self.asks(batch)

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
            self._held.clear()
            return
        # A text may be in two of them.
        every = [(batch, addresses_of(batch)) for batch in batches]
        for batch, addresses in every:
            if all(address in self._held for address in addresses):
                self.inner.settled([self.asks(batch)])
        for address in (address for _, addresses in every for address in addresses):
            self._held.pop(address, None)
