"""A teacher in this process: one forward pass per batch, hidden states and head instead of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from limbeck.models.forward import hidden_states
from limbeck.ops import onednn
from limbeck.teachers.likeliest import vocabulary_alone
from limbeck.teachers.parts import parts_within
from limbeck.types import DenseSignal, Head, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LocalTeacher:
    """A model and its head, ready to score batches.

    Attributes:
        head: from `limbeck.models.heads.head_of`, cut to the real vocabulary.
        max_tokens: of a forward pass, padding included; a larger batch takes several. None takes batches as they come.
    """

    model: PreTrainedModel
    head: Head
    max_tokens: int | None = None

    def signal(self, batch: TokenBatch) -> DenseSignal:
        """The teacher's distribution at every loss position of the batch."""
        import torch

        with torch.inference_mode(), onednn.linears():
            parts = [batch] if self.max_tokens is None else parts_within(batch, self.max_tokens)
            found = [hidden_states(self.model, part.to(self.head.weight_VD.device)) for part in parts]
            hidden_ND = torch.cat(found) if len(found) > 1 else found[0]
        # A clone outside inference mode, since the student's autograd graph will hold on to it.
        return DenseSignal(hidden_ND=hidden_ND.clone(), head=self.head)


@dataclass(frozen=True)
class NullTeacher:
    """Replaces the teacher where every objective reads labels alone, so that no signal need be computed.

    Attributes:
        head: the teacher's, of width 0, with the real vocabulary.
    """

    head: Head

    @classmethod
    def of(cls, vocab_size: int) -> NullTeacher:
        return cls(vocabulary_alone(vocab_size))

    def signal(self, batch: TokenBatch) -> DenseSignal:
        """A signal in which all tokens are alike."""
        import torch

        return DenseSignal(hidden_ND=torch.zeros(len(batch.labels_N), 0), head=self.head)
