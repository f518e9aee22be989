"""A service's log-probabilities of its own answer as a signal: its tokens are the student's, byte for byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limbeck.teachers.alignment.token_bytes import TokenBytes

# One token as it is kept of a reply: its bytes in hexadecimal, its log-probability, and the likeliest in its place.
KeptToken = Sequence[Any]


@dataclass(frozen=True, kw_only=True)
class ScoredAnswer:
    """An answer in the student's tokens.

    Attributes:
        ids: of the tokens that were drawn.
        support: of each position the tokens that are kept, the likeliest first, with the one that was drawn.
        logp: their log-probabilities.
    """

    ids: tuple[int, ...]
    support: tuple[tuple[int, ...], ...]
    logp: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class OneToOne:
    """The ids of a service's tokens, where each of them is one of the student's.

    Attributes:
        spelled: bytes of the student's tokens.
        k: tokens that are kept of each position.
    """

    spelled: TokenBytes
    k: int

    @cached_property
    def _control(self) -> dict[bytes, int]:
        """Control tokens by their spelling, which services give in the place of bytes."""
        return {text.encode(): index for index, text in self.spelled.control.items()}

    def id_of(self, name: str) -> int:
        """The student's id of a token's bytes in hexadecimal.

        Raises:
            ValueError: it has none.
        """
        raw = bytes.fromhex(name)
        ids = self.spelled.ids.get(raw)
        found = ids[0] if ids else self._control.get(raw)
        if found is None:
            raise ValueError(f"the token {raw.decode('utf-8', 'backslashreplace')!r}, which the student has not")
        return found

    def answer(self, tokens: Sequence[KeptToken]) -> ScoredAnswer:
        """An answer by its tokens.

        Raises:
            ValueError: a token that the student lacks, fewer log-probabilities than are kept, or some that are none.
        """
        ids, rows = [], []
        for name, logp, likeliest in tokens:
            label = self.id_of(name)
            row = {self.id_of(other): float(value) for other, value in likeliest} | {label: float(logp)}
            rows.append(self._support(row, label))
            ids.append(label)
        return ScoredAnswer(
            ids=tuple(ids),
            support=tuple(tuple(token for token, _ in row) for row in rows),
            logp=tuple(tuple(value for _, value in row) for row in rows),
        )

    def _support(self, row: dict[int, float], label: int) -> list[tuple[int, float]]:
        if any(math.isnan(logp) or logp > 1e-4 for logp in row.values()):
            raise ValueError(f"log-probabilities that are none ({max(row.values())})")
        if (mass := math.fsum(math.exp(logp) for logp in row.values())) > 1.001:
            raise ValueError(f"probabilities of one position that add up to {mass:.4g}")
        ranked = sorted(row.items(), key=lambda one: (-one[1], one[0]))[: self.k]
        if len(ranked) < self.k:
            raise ValueError(f"{len(ranked)} log-probabilities of a position where {self.k} are asked for")
        if all(token != label for token, _ in ranked):
            ranked[-1] = (label, row[label])
        return ranked
