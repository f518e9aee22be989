"""Parts of a batch that are scored one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from limbeck.types import TokenBatch


def parts_within(batch: TokenBatch, tokens: int) -> Iterator[TokenBatch]:
    """Neighbouring rows of a batch of at most so many positions, padding included; a longer row is alone."""
    lengths = batch.attention_mask_BT.sum(1).tolist()
    rows: list[int] = []
    for row, length in enumerate(lengths):
        if rows and max(length, *(lengths[other] for other in rows)) * (len(rows) + 1) > tokens:
            yield rows_of_batch(batch, rows)
            rows = []
        rows.append(row)
    # Most batches are within the budget.
    yield batch if len(rows) == len(lengths) else rows_of_batch(batch, rows)


def rows_of_batch(batch: TokenBatch, rows: Sequence[int]) -> TokenBatch:
    """Some rows of a batch, for scoring alone."""
    import torch

    some = torch.tensor(rows, device=batch.input_ids_BT.device)
    keep_N = torch.isin(batch.sequence_N, some)
    width = int(batch.attention_mask_BT[some].sum(1).max())
    return replace(
        batch,
        input_ids_BT=batch.input_ids_BT[some, :width],
        attention_mask_BT=batch.attention_mask_BT[some, :width],
        loss_mask_BT=batch.loss_mask_BT[some, :width],
        labels_N=batch.labels_N[keep_N],
        rows=tuple(batch.rows[row] for row in rows),
        ids=tuple(batch.ids[row] for row in rows),
        by_student_B=batch.by_student_B[some],
        partners=(-1,) * len(rows),
        drawn_logp_N=batch.drawn_logp_N[keep_N],
        images=tuple(batch.images[row] for row in rows) if batch.images else (),
        prompts=tuple(batch.prompts[row] for row in rows),
        chosen_NS=None if batch.chosen_NS is None else batch.chosen_NS[keep_N],
    )
