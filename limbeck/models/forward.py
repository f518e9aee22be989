"""Hidden states at the positions of the loss: the forward pass that teacher, student and evaluation share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from limbeck.models.heads import decoder_of
from limbeck.ops import onednn

if TYPE_CHECKING:
    from torch import Tensor, nn

    from limbeck.types import TokenBatch


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own mode again (frozen parts may differ from the rest)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def hidden_states(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Final hidden states of the positions in `batch.loss_mask_BT`, row by row: (N, D).

    Rows are padded on the right and attention is causal, so real tokens never see padding: no attention mask is
    needed, and without one the backend's own causal kernel is used.
    """
    if batch.images:
        from limbeck.models.vision import image_hidden_states

        with onednn.linears():
            return image_hidden_states(model, batch)
    with onednn.linears():
        output = decoder_of(model)(input_ids=batch.input_ids_BT, use_cache=False)
    return output.last_hidden_state[batch.loss_mask_BT]
