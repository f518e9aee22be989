"""Fidelity: how close the student's next-token distributions are to the teacher's, at temperature 1.

p is the teacher, q the student. Every value is an expectation over the whole vocabulary of real tokens, computed from
hidden states tile by tile; what exists at once is a few tokens by the vocabulary, never all tokens by the vocabulary.
Beside a teacher that says its likeliest tokens alone it is what is certain of them (`token_metrics.likeliest_teacher`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.evaluation.token_metrics.calibration import bin_sums, curve, pooled_parts
from limbeck.evaluation.token_metrics.likeliest_teacher import LikeliestChunk, values_beside_likeliest
from limbeck.evaluation.token_metrics.tokens import FidelityChunk, fidelity_values
from limbeck.evaluation.token_metrics.values import CALIBRATION, FIDELITY, TokenValues
from limbeck.models.forward import hidden_states
from limbeck.objectives.fused.body import Compile
from limbeck.rollouts.collate import collate
from limbeck.types import DenseSignal, Head, Json, LimbeckError, Response, ScoredRow, SignalSource, TopKSignal

BY_POSITION: tuple[str, ...] = ("forward_kl", "reverse_kl", "top1_agreement")
# The examples of a chunk, and the positions that each has in it.
Examples = tuple[tuple[str, ...], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Fidelity of the student on some answers.

    Attributes:
        rows: one per example, in the order of first appearance: means over its tokens, weighted by their number, and
            its part of the calibration errors. An example without response tokens has none.
        detail: `tokens`, the reliability curves of `CALIBRATION`, and `BY_POSITION` in bins of the position.
    """

    rows: list[ScoredRow]
    detail: Json


def chunks_of(
    student: nn.Module,
    head: Head,
    responses: Mapping[int, Response],
    teacher: SignalSource,
    *,
    batch_size: int,
    device: torch.device,
) -> Iterator[FidelityChunk | LikeliestChunk]:
    """Responses as the student and the teacher see them, the longest first, `batch_size` rows at a time.

    Args:
        head: the student's.
        responses: by their number.
        teacher: says its whole distribution of each, or its likeliest tokens.
    """
    order = sorted(responses, key=lambda row: (-responses[row].length, row))
    for start in range(0, len(order), batch_size):
        yield chunk_of(student, head, responses, order[start : start + batch_size], teacher, device=device)


def chunk_of(
    student: nn.Module,
    head: Head,
    responses: Mapping[int, Response] | Sequence[Response],
    rows: Sequence[int],
    teacher: SignalSource,
    *,
    device: torch.device,
) -> FidelityChunk | LikeliestChunk:
    """Some rows of the responses, in one forward pass of each model."""
    batch = collate(responses, rows, pad_id=0)
    with torch.inference_mode():
        hidden_ND = hidden_states(student, batch.to(device))
    signal = teacher.signal(batch)
    assert isinstance(signal, DenseSignal | TopKSignal), "of held-out responses nothing is a sample"
    shared: dict[str, Any] = {
        "student_hidden_ND": hidden_ND,
        "student_head": head,
        "label_ids_N": batch.labels_N.to(device),
        "ids": tuple(responses[row].prompt_id for row in batch.rows),
        "lengths": tuple(responses[row].tokens for row in batch.rows),
    }
    if isinstance(signal, TopKSignal):
        return LikeliestChunk(teacher=signal, **shared)
    return FidelityChunk(teacher=signal, **shared)


def values_of(chunk: FidelityChunk | LikeliestChunk, *, top_k: int, compile: Compile = "auto") -> TokenValues:
    """The metrics of every token of a chunk.

    Args:
        top_k: k of the top-k agreement.
        compile: "auto" compiles the work on the logits where a compiler is there and the vocabulary is large.

    Raises:
        LimbeckError: its shapes or vocabularies disagree, or the vocabulary has fewer than k tokens.
    """
    if isinstance(chunk, LikeliestChunk):
        return values_beside_likeliest(chunk, top_k=top_k)
    return fidelity_values(chunk, top_k=top_k, compile=compile)


def measure(chunks: Iterable[FidelityChunk | LikeliestChunk], *, top_k: int, compile: Compile = "auto") -> Fidelity:
    """Fidelity of every example. Sums over tokens are taken in float64.

    Args:
        top_k: k of the top-k agreement.
        compile: "auto" compiles the work on the logits where a compiler is there and the vocabulary is large.

    Raises:
        LimbeckError: shapes or vocabularies of a chunk disagree, the vocabulary has fewer than k tokens, or a value is
            not finite (NaN or inf in a model).
    """
    return joined(((chunk.ids, chunk.lengths), values_of(chunk, top_k=top_k, compile=compile)) for chunk in chunks)


def joined(values: Iterable[tuple[Examples, TokenValues]]) -> Fidelity:
    """Fidelity of every example from the values of its tokens, chunk after chunk.

    Raises:
        LimbeckError: a value is not finite (NaN or inf in a model).
    """
    tally = _Tally()
    for examples, found in values:
        tally.add(*examples, found)
    return Fidelity(rows=tally.rows(), detail=tally.detail())


@dataclass(kw_only=True)
class _Tally:
    """Sums of the metrics so far: by example, and by power of two of the position.

    Attributes:
        names, calibrations: of the metrics, as the first chunk has them.
        sums: the metrics, by example.
        bins: `bin_sums` of each calibration, (calibrations, 3, bins), by example.
        tokens: by example.
        positions: tokens and the sums of `BY_POSITION` at positions 2**i to 2**(i + 1) - 1, counted from 1, by i.
    """

    names: tuple[str, ...] = FIDELITY
    calibrations: tuple[str, ...] = CALIBRATION
    sums: dict[str, Tensor] = field(default_factory=dict)
    bins: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    positions: dict[int, Tensor] = field(default_factory=dict)

    def add(self, ids: tuple[str, ...], lengths: tuple[int, ...], found: TokenValues) -> None:
        self.names, self.calibrations = found.names, found.calibrations
        values_MN = found.values_MN.cpu()
        example_N = torch.repeat_interleave(torch.tensor(lengths))
        confidences = (bin_sums(c_N.cpu(), o_N.cpu(), example_N, len(ids)) for c_N, o_N in found.confidences)
        bins_EC3B = torch.stack(list(confidences), dim=1)
        position_N = torch.cat([torch.empty(0, dtype=torch.int64), *self._positions(ids, lengths)])
        start = 0
        for name, length, bins_C3B in zip(ids, lengths, bins_EC3B, strict=True):
            if length:
                total_M = values_MN[:, start : start + length].sum(dim=1)
                known = name in self.sums
                self.sums[name] = self.sums[name] + total_M if known else total_M
                self.bins[name] = self.bins[name] + bins_C3B if known else bins_C3B
                self.tokens[name] = self.tokens.get(name, 0) + length
            start += length
        self._add_positions(values_MN, position_N)

    def _positions(self, ids: tuple[str, ...], lengths: tuple[int, ...]) -> list[Tensor]:
        """Position of each token in its answer, from 1; an example goes on where an earlier chunk left it."""
        seen, positions = dict(self.tokens), []
        for name, length in zip(ids, lengths, strict=True):
            first = seen.get(name, 0) + 1
            positions.append(torch.arange(first, first + length))
            seen[name] = first + length - 1
        return positions

    @property
    def _by_position(self) -> list[str]:
        """The metrics of `BY_POSITION`, or bounds of them."""
        return [name for name in self.names if name.removesuffix("_at_least") in BY_POSITION]

    def _add_positions(self, values_MN: Tensor, position_N: Tensor) -> None:
        shown_MN = values_MN[[self.names.index(name) for name in self._by_position]]
        columns_PN = torch.cat([torch.ones_like(shown_MN[:1]), shown_MN])
        # The exponent of frexp is exact, which a rounded logarithm is not at powers of two.
        power_N = torch.frexp(position_N.double()).exponent - 1
        for power in power_N.unique().tolist():
            total_P = columns_PN[:, power_N == power].sum(dim=1)
            self.positions[power] = self.positions[power] + total_P if power in self.positions else total_P

    def rows(self) -> list[ScoredRow]:
        rows = []
        for name, total_M in self.sums.items():
            values = dict(zip(self.names, (total_M / self.tokens[name]).tolist(), strict=True))
            broken = [metric for metric, value in values.items() if not math.isfinite(value)]
            if broken:
                raise LimbeckError(
                    f"{broken[0]} of example {name!r} is {values[broken[0]]}; expected finite logits from both models: "
                    "look for NaN or inf in their weights, or evaluate in float32"
                )
            parts = zip(self.calibrations, self.bins[name], strict=True)
            sums = {metric: pooled_parts(sums_3B) for metric, sums_3B in parts}
            rows.append(ScoredRow(id=name, weight=float(self.tokens[name]), values=values, sums=sums))
        return rows

    def detail(self) -> Json:
        curves: Sequence[list[Json]] = [[] for _ in self.calibrations]
        if self.bins:
            curves = [curve(sums_3B) for sums_3B in torch.stack(list(self.bins.values())).sum(0)]
        by_position = [
            {"first": 2**power, "last": 2 ** (power + 1) - 1, "tokens": int(tokens)}
            | {name: float(value / tokens) for name, value in zip(self._by_position, total_M, strict=True)}
            for power, (tokens, *total_M) in sorted((p, total.tolist()) for p, total in self.positions.items())
        ]
        return {
            "examples": len(self.tokens),
            "tokens": sum(self.tokens.values()),
            "reliability": dict(zip(self.calibrations, curves, strict=True)),
            "by_position": by_position,
        }
