"""Blocks of plain text for a language-modelling loss beside the objective, a batch of its own in every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.rollouts.collate import collate, micro_batches
from limbeck.types import Response, TokenBatch


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text as token ids, cut into blocks of one length.

    Attributes:
        blocks_NL: token ids, any integer type.
        weight: factor on the mean loss per token.
        rows: blocks of a micro-batch; every rank has as many micro-batches as accumulation steps.
        seed: of the order, another one for each time all blocks have come.
    """

    blocks_NL: Tensor
    weight: float
    rows: int
    seed: int

    def tokens(self, *, accumulation: int, ranks: int) -> int:
        """Tokens that are predicted in a step over all ranks: all of a block but the first."""
        return self.rows * accumulation * ranks * (self.blocks_NL.shape[1] - 1)

    def batches(
        self, step: int, *, accumulation: int, rank: int, ranks: int, pad_id: int
    ) -> Iterator[tuple[TokenBatch, list[float]]]:
        """The micro-batches of one rank with the weight of each token by row.

        The weights add up to a mean over the tokens of the whole step times `weight`, times the number of ranks, over
        which DDP averages.
        """
        blocks = self.at(step, self.rows * accumulation * ranks)
        weight = ranks * self.weight / self.tokens(accumulation=accumulation, ranks=ranks)
        for rows in micro_batches(tuple(blocks), rows_per_device=self.rows, rank=rank, ranks=ranks):
            yield collate(blocks, rows, pad_id=pad_id), [weight] * len(rows)

    def at(self, step: int, count: int) -> dict[int, Response]:
        """The blocks of an optimizer step, numbered from 0: a function of the step alone."""
        places = range(step * count, (step + 1) * count)
        size = len(self.blocks_NL)
        orders = {turn: self._order(turn) for turn in range(places[0] // size, places[-1] // size + 1)}
        found: dict[int, Response] = {}
        for number, place in enumerate(places):
            ids = tuple(self.blocks_NL[orders[place // size][place % size]].tolist())
            found[number] = Response(
                prompt_id=str(place), author="data", prompt_ids=ids[:1], response_ids=ids[1:], stop="length"
            )
        return found

    def _order(self, turn: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        return torch.randperm(len(self.blocks_NL), generator=generator)
