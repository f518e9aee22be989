"""Blocks of a model on disk, beside its dequantised weights: quantized/blocks.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from limbeck.models.quantization.formats import FORMATS
from limbeck.types import Json, LimbeckError

Trained = Literal["straight_through", "frozen"]
# Below the model's own folder, where loaders of its weights do not look.
BLOCKS_FILE = "quantized/blocks.safetensors"
_ABOUT = "quantized"


@dataclass(frozen=True, kw_only=True)
class QuantizedWeights:
    """The blocks of a model.

    Attributes:
        trained: "straight_through": the model's weights are what the blocks stand for; "frozen": those below its
            adapters are.
        formats: names of the formats, by the weight's name in the plain model.
        blocks: bytes (rows, bytes of a row) of each of them.
    """

    trained: Trained
    formats: Mapping[str, str]
    blocks: Mapping[str, Tensor]

    @property
    def weights(self) -> int:
        """Number of weights that are in blocks."""
        return sum(FORMATS[self.formats[name]].weights_in(blocks) for name, blocks in self.blocks.items())

    @property
    def bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(blocks.numel() for blocks in self.blocks.values())


def save_blocks(folder: Path, quantized: QuantizedWeights) -> None:
    """Write the blocks into the folder of a model."""
    path = folder / BLOCKS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    # One entry: several come in any order, and the file would not be the same one each time.
    metadata = {_ABOUT: json.dumps({"trained": quantized.trained, "formats": dict(quantized.formats)})}
    save_file({name: blocks.cpu().contiguous() for name, blocks in quantized.blocks.items()}, path, metadata=metadata)


def _about(metadata: Mapping[str, str]) -> Json:
    if _ABOUT in metadata:
        return json.loads(metadata[_ABOUT])
    # As earlier versions wrote it.
    return {"trained": metadata["trained"], "formats": json.loads(metadata["formats"])}


def read_blocks(folder: Path) -> QuantizedWeights | None:
    """The blocks that lie in the folder of a model; None where it has none.

    Raises:
        LimbeckError: a file that is not what `save_blocks` wrote.
    """
    path = folder / BLOCKS_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = _about(file.metadata() or {})
            blocks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        trained, formats = about["trained"], about["formats"]
        if trained not in ("straight_through", "frozen") or formats.keys() != blocks.keys():
            raise ValueError("it names other weights than it holds")
        for name in formats.values():
            FORMATS.require(name)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise LimbeckError(
            f"{path} is damaged ({' '.join(str(error).split())[:120]}); make the student again with `limbeck run`"
        ) from error
    return QuantizedWeights(trained=trained, formats=formats, blocks=blocks)
