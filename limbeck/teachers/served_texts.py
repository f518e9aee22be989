"""The rows of a batch as texts whose tokens a server scores."""

from __future__ import annotations

from limbeck.teachers.served_dialects import ScoredText
from limbeck.types import TokenBatch


def texts_of(batch: TokenBatch) -> list[ScoredText | None]:
    """The rows of a batch as texts whose tokens of the loss are to be scored; None for a row without any.

    A text ends with the last token that is scored, which is no input of the batch where it ends the row.
    """
    labels, texts = iter(batch.labels_N.tolist()), []
    chosen = None if batch.chosen_NS is None else iter(batch.chosen_NS.tolist())
    for ids, mask in zip(batch.input_ids_BT.tolist(), batch.loss_mask_BT.tolist(), strict=True):
        places = [place for place, counts in enumerate(mask) if counts]
        followed = [next(labels) for _ in places]
        if not places:
            texts.append(None)
            continue
        whole = (*ids[: places[-1] + 1], followed[-1])
        more = () if chosen is None else tuple(tuple(next(chosen)) for _ in places)
        texts.append(ScoredText(ids=whole, positions=tuple(place + 1 for place in places), chosen=more))
    return texts
