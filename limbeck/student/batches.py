"""Which responses meet in which optimizer step, and how they become tensors.

The plan is a pure function of lengths, seed and epoch. It is made in two moves: responses of similar length are put
together into optimizer steps, so that padding costs next to nothing; then each step is cut into micro-batches for the
ranks. The first move does not know how many ranks or accumulation steps there are, so the update does not either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from limbeck.flow import Response, TokenBatch

# Steps of similar length are formed inside windows of this many optimizer steps: long enough that lengths match,
# short enough that the order stays random.
WINDOW_STEPS = 32


@dataclass(frozen=True, slots=True)
class Plan:
    """The order of the data over a whole run.

    Attributes:
        lengths: tokens of each response with its prompt, which padding depends on.
        tokens: response tokens of each response, which enter the loss.
        step_rows: responses of one optimizer step, over all ranks and accumulation steps.
    """

    lengths: tuple[int, ...]
    tokens: tuple[int, ...]
    step_rows: int
    seed: int

    @classmethod
    def of(cls, responses: Sequence[Response], *, step_rows: int, seed: int) -> Plan:
        return cls(
            lengths=tuple(r.length for r in responses),
            tokens=tuple(len(r.response_ids) for r in responses),
            step_rows=step_rows,
            seed=seed,
        )

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.step_rows)

    def epoch(self, epoch: int) -> list[tuple[int, ...]]:
        """The optimizer steps of an epoch, each a tuple of row numbers sorted by length, longest first."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        window = WINDOW_STEPS * self.step_rows
        steps: list[tuple[int, ...]] = []
        for start in range(0, len(order), window):
            # A stable sort of a random order: equal lengths still meet in random company.
            block = sorted(order[start : start + window], key=lambda row: -self.lengths[row])
            # The window's remainder is its shortest rows; steps before it are full.
            steps += [tuple(block[i : i + self.step_rows]) for i in range(0, len(block), self.step_rows)]
        shuffled = torch.randperm(len(steps), generator=generator).tolist()
        return [steps[i] for i in shuffled]

    def total_tokens(self, steps: int) -> int:
        """Tokens that enter the loss in the first `steps` optimizer steps."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        partial = self.epoch(epochs)[:rest] if rest else []
        return epochs * sum(self.tokens) + sum(self.step_tokens(rows) for rows in partial)

    def step_tokens(self, rows: Sequence[int]) -> int:
        """Tokens that enter the loss of a step: the number its loss is divided by."""
        return sum(self.tokens[row] for row in rows)


def micro_batches(rows: Sequence[int], *, rows_per_device: int, rank: int, ranks: int) -> list[tuple[int, ...]]:
    """The micro-batches of one rank: neighbouring rows stay together, ranks take turns.

    Every rank gets equally many, since the ranks of a step meet at each backward pass; a rank that has run out gets an
    empty tuple.
    """
    chunks = [tuple(rows[i : i + rows_per_device]) for i in range(0, len(rows), rows_per_device)]
    rounds = math.ceil(len(chunks) / ranks)
    chunks += [()] * (rounds * ranks - len(chunks))
    return chunks[rank::ranks]


def collate(responses: Sequence[Response] | Mapping[int, Response], rows: Sequence[int], *, pad_id: int) -> TokenBatch:
    """Tensors of the given rows, padded on the right.

    The last id of a row is left out of the input: nothing is predicted from it.
    """
    chosen = [responses[row] for row in rows]
    width = max(r.length for r in chosen) - 1
    input_ids_BT = torch.full((len(chosen), width), pad_id, dtype=torch.int64)
    loss_mask_BT = torch.zeros((len(chosen), width), dtype=torch.bool)
    labels: list[int] = []
    for i, response in enumerate(chosen):
        assert response.prompt_ids, "the first token of an answer is predicted from the last one of its prompt"
        ids = (*response.prompt_ids, *response.response_ids)[:-1]
        input_ids_BT[i, : len(ids)] = torch.tensor(ids)
        loss_mask_BT[i, len(response.prompt_ids) - 1 : len(ids)] = True
        labels += response.response_ids
    steps_T = torch.arange(width)
    ends_B1 = torch.tensor([[r.length - 1] for r in chosen])
    return TokenBatch(
        input_ids_BT=input_ids_BT,
        attention_mask_BT=(steps_T < ends_B1).long(),
        loss_mask_BT=loss_mask_BT,
        labels_N=torch.tensor(labels, dtype=torch.int64),
        rows=tuple(rows),
    )
