"""Hidden states at the positions of the loss: the forward pass that teacher, student and evaluation share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from limbeck.models.heads import decoder_of
from limbeck.ops import onednn
from limbeck.types import LimbeckError

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


def hidden_states(model: nn.Module, batch: TokenBatch, *, packed: bool = False) -> Tensor:
    """Final hidden states of the positions in `batch.loss_mask_BT`, row by row: (N, D).

    Rows are padded on the right and attention is causal, so real tokens never see padding: no attention mask is
    needed, and without one the backend's own causal kernel is used.

    Args:
        packed: leave padding out, if there is any; see `packed_states`.
    """
    if batch.images:
        from limbeck.models.vision import image_hidden_states

        with onednn.linears():
            return image_hidden_states(model, batch)
    if packed and not bool(batch.attention_mask_BT.all()):
        return packed_states(model, batch)
    with onednn.linears():
        output = decoder_of(model)(input_ids=batch.input_ids_BT, use_cache=False)
    return output.last_hidden_state[batch.loss_mask_BT]


def packed_states(model: nn.Module, batch: TokenBatch) -> Tensor:
    """`hidden_states` with the rows of the batch one after another in a single one, without padding.

    Positions begin anew with each row; from these transformers makes the mask that keeps the rows apart, or the bounds
    of the rows for flash attention.
    """
    import torch

    real_BT = batch.attention_mask_BT.bool()
    positions_BT = torch.arange(real_BT.shape[1], device=real_BT.device).expand(real_BT.shape)
    with onednn.linears():
        output = decoder_of(model)(
            input_ids=batch.input_ids_BT[real_BT][None], position_ids=positions_BT[real_BT][None], use_cache=False
        )
    return output.last_hidden_state[0][batch.loss_mask_BT[real_BT]]


def require_rows_apart(model: nn.Module, batch: TokenBatch) -> None:
    """Check that a model keeps the rows of a batch apart when they are packed.

    Raises:
        LimbeckError: it does not: what it carries from token to token goes past the ends of rows, or it counts
            positions in a way of its own.
    """
    import torch

    with evaluating(model), torch.no_grad():
        padded_ND, packed_ND = hidden_states(model, batch).float(), packed_states(model, batch).float()
    gap = float((padded_ND - packed_ND).abs().max() / padded_ND.abs().max())
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    if gap > (1e-3 if exact else 5e-2):
        raise LimbeckError(
            f"train.packing: the student does not keep rows apart that stand one after another (its states differ by "
            f"{gap:.1%}); set train.packing=false"
        )
