"""Micro-batches of tensors, made of the responses of an optimizer step.

Responses of similar length were put together into steps (limbeck.rollouts.order), so that padding costs next to
nothing; here a step is cut for the ranks. The first move does not know how many ranks or accumulation steps there are,
so the update does not either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from limbeck.types import Response, TokenBatch


def micro_batches(rows: Sequence[int], *, rows_per_device: int, rank: int, ranks: int) -> list[tuple[int, ...]]:
    """The micro-batches of one rank, each of so many rows."""
    return turns(cut_by_rows(rows, rows_per_device), rank=rank, ranks=ranks)


def turns(chunks: Sequence[tuple[int, ...]], *, rank: int, ranks: int) -> list[tuple[int, ...]]:
    """The chunks of a step that are one rank's: neighbouring rows stay together, ranks take turns.

    Every rank gets equally many, since the ranks of a step meet at each backward pass; a rank that has run out gets an
    empty tuple.
    """
    rounds = math.ceil(len(chunks) / ranks)
    return [*chunks, *[()] * (rounds * ranks - len(chunks))][rank::ranks]


def cut_by_rows(rows: Sequence[int], rows_per_device: int) -> list[tuple[int, ...]]:
    """The rows of a step in chunks of so many."""
    return [tuple(rows[i : i + rows_per_device]) for i in range(0, len(rows), rows_per_device)]


def cut_by_tokens(
    by_row: Mapping[int, Response], tokens: int, *, together: int = 1, ranks: int = 1, packed: bool = False
) -> list[tuple[int, ...]]:
    """The rows of a step in chunks of at most so many positions, padding included; a longer row is alone.

    A chunk that is left over would make all ranks but one wait, so large ones are halved until each has as many.

    Args:
        together: rows that stay side by side, such as the two of a pair.
        packed: whether there is no padding, so that positions are the rows' own.
    """
    units = cut_by_rows(tuple(by_row), together)
    chunks: list[list[tuple[int, ...]]] = []
    widest = own = 0
    for unit in units:
        lengths = [by_row[row].length - 1 for row in unit]
        widest, own = max(widest, *lengths), own + sum(lengths)
        positions = own if packed else widest * together * (len(chunks[-1]) + 1 if chunks else 1)
        if chunks and positions <= tokens:
            chunks[-1].append(unit)
        else:
            chunks.append([unit])
            widest, own = max(lengths), sum(lengths)
    while len(chunks) % ranks and max(map(len, chunks)) > 1:
        place = max(range(len(chunks)), key=lambda i: len(chunks[i]))
        half = (len(chunks[place]) + 1) // 2
        chunks[place : place + 1] = [chunks[place][:half], chunks[place][half:]]
    return [tuple(row for unit in chunk for row in unit) for chunk in chunks]


def padding(by_row: Mapping[int, Response], chunks: Sequence[tuple[int, ...]]) -> float:
    """Share of a step's positions that are padding, in these chunks of its rows."""
    real = sum(response.length for response in by_row.values())
    return 1 - real / sum(max(by_row[row].length for row in chunk) * len(chunk) for chunk in chunks)


def collate(responses: Sequence[Response] | Mapping[int, Response], rows: Sequence[int], *, pad_id: int) -> TokenBatch:
    """Tensors of the given rows, padded on the right.

    The last id of a row is left out of the input: nothing is predicted from it.
    """
    chosen = [responses[row] for row in rows]
    width = max(r.length for r in chosen) - 1
    input_ids_BT = torch.full((len(chosen), width), pad_id, dtype=torch.int64)
    loss_mask_BT = torch.zeros((len(chosen), width), dtype=torch.bool)
    labels: list[int] = []
    drawn: list[float] = []
    for i, response in enumerate(chosen):
        assert response.prompt_ids, "the first token of an answer is predicted from the last one of its prompt"
        ids = (*response.prompt_ids, *response.response_ids)[:-1]
        input_ids_BT[i, : len(ids)] = torch.tensor(ids)
        first = len(response.prompt_ids) - 1
        for start, end in response.spans or ((0, len(response.response_ids)),):
            loss_mask_BT[i, first + start : first + end] = True
        labels += response.label_ids
        drawn += response.sampled_logp or response.logp or [math.nan] * response.tokens
    steps_T = torch.arange(width)
    ends_B1 = torch.tensor([[r.length - 1] for r in chosen])
    return TokenBatch(
        input_ids_BT=input_ids_BT,
        attention_mask_BT=(steps_T < ends_B1).long(),
        loss_mask_BT=loss_mask_BT,
        labels_N=torch.tensor(labels, dtype=torch.int64),
        rows=tuple(rows),
        ids=tuple(r.id for r in chosen),
        by_student_B=torch.tensor([r.author == "student" for r in chosen]),
        partners=_partners(chosen),
        drawn_logp_N=torch.tensor(drawn, dtype=torch.float32),
        images=tuple(r.images for r in chosen) if any(r.images for r in chosen) else (),
        prompts=tuple(r.prompt_id for r in chosen),
    )


def _partners(responses: Sequence[Response]) -> tuple[int, ...]:
    sides = {(r.prompt_id, r.author == "student"): i for i, r in enumerate(responses)}
    return tuple(sides.get((r.prompt_id, r.author != "student"), -1) for r in responses)
