"""What a codec is: the form in which a store keeps the distribution of each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from limbeck.types import Head, Signal

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    Columns = Mapping[str, npt.NDArray[Any]]

Kind = Literal["dense", "topk", "sampled"]
Precision = Literal["float32", "bfloat16", "float16"]
# Name of a column's numbers, as numpy has them, and its shape per token.
Layout = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What all signals of a store have in common.

    Attributes:
        width: of the teacher's hidden states; 0 where it gives none.
        temperatures: the grid that sparse signals are exact for.
    """

    vocab_size: int
    width: int
    temperatures: tuple[float, ...]

    @property
    def tempered(self) -> tuple[int, ...]:
        """Columns of the grid other than temperature 1, whose normaliser is none."""
        return tuple(column for column, tau in enumerate(self.temperatures) if tau != 1)


class Codec(Protocol):
    """A member of the registry. Its fields are its options.

    Attributes:
        kind: of the signals it takes and gives.
    """

    kind: ClassVar[Kind]

    def check(self, frame: Frame) -> None:
        """Check that signals of this frame can be kept.

        Raises:
            LimbeckError: they cannot.
        """
        ...

    def layout(self, frame: Frame) -> Layout:
        """The columns of a token."""
        ...

    def shared(self, head: Head, hidden_ND: Tensor) -> dict[str, Tensor]:
        """The tensors that all tokens share: none, or a head as `weight` and `bias`, and what belongs to it.

        Args:
            hidden_ND: the teacher's states of some tokens, which an approximation is best on.
        """
        ...

    def shared_bytes(self, frame: Frame, number_bytes: int) -> int:
        """Size of these tensors, but for a bias, where a number of the teacher's head takes `number_bytes`."""
        ...

    def encode(self, signal: Signal, frame: Frame, shared: Mapping[str, Tensor]) -> Columns:
        """The columns of a signal, one row per token.

        Raises:
            LimbeckError: numbers that are none, or beyond the precision.
        """
        ...

    def decode(self, columns: Columns, frame: Frame, head: Head | None) -> Signal:
        """The signal of some columns, on the host.

        Args:
            head: made of what `shared` gave.
        """
        ...


def bytes_per_token(codec: Codec, frame: Frame) -> int:
    """Size of a token's columns."""
    import numpy as np

    return sum(np.dtype(dtype).itemsize * prod(shape) for dtype, shape in codec.layout(frame).values())
