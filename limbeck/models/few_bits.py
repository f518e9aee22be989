"""A model whose linear layers are kept in few bits: each matrix is rounded by a library as it is read from its file.

Only the weights are rounded, and what computes with them is the model's own precision, so that a state depends on the
tokens before it and on nothing beside them. (bitsandbytes' own 8 bits round activations too, by columns that are chosen
over the whole batch: what such a model says of a response depends on the responses beside it.) Embeddings, norms and
head stay as they are.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from limbeck.types import LimbeckError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Bits = Literal[4, 8]


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a matrix is kept.

    Attributes:
        library: that rounds it and computes with it.
        name: as the library has it.
        bytes: of a weight, scales included.
    """

    library: str
    name: str
    bytes: float


# NF4 has a float32 scale for each 64 weights; int8 one for each row, which is next to nothing.
FORMATS: dict[int, Format] = {
    4: Format(library="bitsandbytes", name="nf4", bytes=0.5 + 4 / 64),
    8: Format(library="torchao", name="int8", bytes=1.0),
}


def require_library(bits: Bits) -> None:
    """See that the library of a format is installed; it is not imported.

    Raises:
        LimbeckError: it is not.
    """
    library = FORMATS[bits].library
    if importlib.util.find_spec(library) is None:
        raise LimbeckError(
            f"teacher.bits={bits} needs {library}, which is not installed; pip install 'limbeck[bits]', or remove "
            "teacher.bits"
        )


def quantization_config(bits: Bits, dtype: torch.dtype) -> Any:
    """What transformers reads a model in few bits with.

    Args:
        dtype: of the products, and of all that is not rounded.

    Raises:
        LimbeckError: the library is not installed.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    require_library(bits)
    if bits == 4:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-not-found]

    return TorchAoConfig(Int8WeightOnlyConfig())


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Leave out what the libraries warn of while they are imported and read: kernels of devices that are not here."""
    import logging

    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def require_whole_head(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """See that the head of a model in few bits is as it was.

    Raises:
        LimbeckError: it was rounded too.
    """
    from torch import Tensor, nn

    head: Any = model.get_output_embeddings()
    if head is None or type(head.weight) not in (nn.Parameter, Tensor) or head.weight.dtype != dtype:
        raise LimbeckError(
            f"the head of {type(model).__name__} would be kept in few bits too, and the loss needs it whole; remove "
            "teacher.bits"
        )
