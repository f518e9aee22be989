"""A teacher in this process: one forward pass a batch, hidden states and head instead of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from limbeck import onednn
from limbeck.flow import DenseSignal, Head, TokenBatch
from limbeck.models.hidden import hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LocalTeacher:
    """A model and its head, ready to judge batches.

    Attributes:
        head: from `limbeck.models.heads.head_of`, cut to the real vocabulary.
    """

    model: PreTrainedModel
    head: Head

    def signal(self, batch: TokenBatch) -> DenseSignal:
        """The teacher's distribution at every loss position of the batch."""
        import torch

        with torch.inference_mode(), onednn.linears():
            hidden_ND = hidden_states(self.model, batch.to(self.head.weight_VD.device))
        # A clone outside inference mode, since the student's autograd graph will hold on to it.
        return DenseSignal(hidden_ND=hidden_ND.clone(), head=self.head)
