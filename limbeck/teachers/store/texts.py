"""The teacher's answers in a shard, so that another run trains on them without the teacher.

text.key   (R, 16)  uint8   hash of the prompt's ids     text.first  (R,)  int64   its first id
text.crc   (R,)     uint32  of its ids                   text.tokens (R,)  int64   of prompt and answer together
text.stop  (R,)     uint8   how it ended                 text.prompt (R,)  int64   of them those of the prompt
text.ids   (T,)     uint16 or uint32
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from limbeck.teachers.store.addresses import ADDRESS
from limbeck.types import Response, StopReason

_STOPS: tuple[StopReason, ...] = get_args(StopReason)
# Of each text: everything but its ids.
TEXT_INDEX_BYTES = ADDRESS + 4 + 1 + 8 + 8 + 8


@dataclass(frozen=True, kw_only=True)
class Text:
    """A prompt with its answer.

    Attributes:
        ids: of the prompt and then of the answer.
        prompt: number of those of the prompt.
        images: ids of those of the prompt.
    """

    ids: tuple[int, ...]
    prompt: int
    stop: StopReason
    images: tuple[str, ...] = ()

    @classmethod
    def of(cls, response: Response) -> Text:
        ids = (*response.prompt_ids, *response.response_ids)
        return cls(ids=ids, prompt=len(response.prompt_ids), stop=response.stop, images=response.images)

    @property
    def key(self) -> bytes:
        return prompt_key(self.ids[: self.prompt], self.images)


def prompt_key(ids: Sequence[int], images: Sequence[str]) -> bytes:
    """The name under which the answer to a prompt is found: a hash of its ids and images."""
    whole = hashlib.sha256(f"{' '.join(images)}\n".encode())
    whole.update(np.array(ids, dtype="<u4").tobytes())
    return whole.digest()[:ADDRESS]


def id_bytes(vocab_size: int) -> int:
    """Bytes of an id of a text."""
    return 2 if vocab_size <= 1 << 16 else 4


def text_tensors(texts: Sequence[Text], vocab_size: int) -> dict[str, npt.NDArray[Any]]:
    """The tensors of some texts, in the order of the index of their shard."""
    kind = np.uint16 if id_bytes(vocab_size) == 2 else np.uint32
    rows = [np.array(text.ids, dtype=kind) for text in texts]
    tokens = np.array([len(row) for row in rows], dtype=np.int64)
    keys = b"".join(text.key for text in texts)
    return {
        "text.key": np.frombuffer(keys, dtype=np.uint8).reshape(len(texts), ADDRESS),
        "text.crc": np.array([text_checksum(row, text.stop) for row, text in zip(rows, texts, strict=True)], np.uint32),
        "text.stop": np.array([_STOPS.index(text.stop) for text in texts], dtype=np.uint8),
        "text.first": np.cumsum(tokens) - tokens,
        "text.tokens": tokens,
        "text.prompt": np.array([text.prompt for text in texts], dtype=np.int64),
        "text.ids": np.concatenate(rows),
    }


def text_checksum(ids: npt.NDArray[Any], stop: StopReason) -> int:
    return zlib.crc32(stop.encode(), zlib.crc32(ids.data.cast("B")))


def stop_of(number: int) -> StopReason | None:
    """How a text ended, by its number in a shard; None for one that means nothing."""
    return _STOPS[number] if number < len(_STOPS) else None
