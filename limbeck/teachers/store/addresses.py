"""Addresses of signals: hashes of exactly what a teacher reads, the same in every run and for every author."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from limbeck.types import Response, TokenBatch

# Bytes of an address.
ADDRESS = 16


def address_of(response: Response) -> bytes:
    """The address of a response: a hash of its ids up to the last that enters the loss, of which ones do, and of its
    images."""
    prompt = len(response.prompt_ids)
    spans = response.spans or ((0, len(response.response_ids)),)
    ids = (*response.prompt_ids, *response.response_ids)[: prompt + spans[-1][1]]
    places = np.concatenate([np.arange(prompt + start, prompt + end) for start, end in spans])
    return _hash(np.array(ids), places, response.images)


def addresses_of(batch: TokenBatch) -> list[bytes]:
    """The addresses of the rows of a batch."""
    ids_BT, mask_BT = batch.input_ids_BT.cpu().numpy(), batch.loss_mask_BT.cpu().numpy()
    labels, counts = batch.labels_N.cpu().numpy(), mask_BT.sum(1)
    last = labels[np.cumsum(counts) - 1]
    found = []
    for row, mask_T in enumerate(mask_BT):
        places = np.nonzero(mask_T)[0] + 1
        ids = np.append(ids_BT[row, : places[-1]], last[row])
        found.append(_hash(ids, places, batch.images[row] if batch.images else ()))
    return found


def _hash(ids: npt.NDArray[np.integer], places: npt.NDArray[np.integer], images: Sequence[str]) -> bytes:
    whole = hashlib.sha256(f"{len(ids)} {len(places)} {' '.join(images)}\n".encode())
    whole.update(ids.astype("<u4").tobytes())
    whole.update(places.astype("<u4").tobytes())
    return whole.digest()[:ADDRESS]


def seed_of(address: bytes) -> int:
    """A seed for what is drawn at an address: the same in whichever order texts are captured."""
    return int.from_bytes(address[:7], "little")
