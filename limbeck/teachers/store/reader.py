"""Reading a store: which signals it has, and the signal of some addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.runtime.records import fingerprint
from limbeck.teachers.store.addresses import addresses_of
from limbeck.teachers.store.base import Codec
from limbeck.teachers.store.codecs import codec_tree, read_codec
from limbeck.teachers.store.manifest import Manifest, read_manifest
from limbeck.teachers.store.seals import damaged, read_seal, read_whole_seal
from limbeck.teachers.store.shards import Columns, OpenShards, require_layout
from limbeck.teachers.store.texts import Text
from limbeck.types import Head, Json, LimbeckError, Signal, TokenBatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHARDS = "[0-9]" * 6 + ".safetensors"
Place = tuple[Path, int]


@dataclass
class Store:
    """A store that is read; nothing of it is in memory but what is asked for.

    Attributes:
        remedy: for signals that it lacks.
        places: shard and number of the addresses that were looked up.
    """

    path: Path
    remedy: str = "add these with `limbeck store capture`"
    places: dict[bytes, Place] = field(default_factory=dict)
    _shards: OpenShards = field(default_factory=OpenShards)
    _codecs: dict[Path, Codec] = field(default_factory=dict)

    @cached_property
    def manifest(self) -> Manifest:
        return read_manifest(self.path)

    @cached_property
    def seals(self) -> dict[Path, Json]:
        """The seals of the whole shards by their files, in order."""
        found = {path: read_seal(path) for path in sealed_shards(self.path)}
        for path, seal in found.items():
            if seal.get("store") != self.manifest.fingerprint:
                raise damaged(path, "it belongs to another store")
            if seal["shared"] != shared_hash(self.path, read_codec(seal["codec"])):
                raise damaged(path, "it was made for another head")
        return found

    def locate(self, addresses: Sequence[bytes]) -> None:
        """Look up some addresses in one pass over the indices."""
        missing = [address for address in dict.fromkeys(addresses) if address not in self.places]
        for path in self.seals:
            if not missing:
                return
            found = self._shards[path].places(missing)
            self.places |= {address: (path, number) for address, number in found.items()}
            missing = [address for address in missing if address not in found]

    def signal(self, batch: TokenBatch, heads: Mapping[str, Head]) -> Signal:
        """The signal at every loss position of a batch, on the host.

        Args:
            heads: by the name of the codec, see `head`.

        Raises:
            LimbeckError: the store has none for a row, or a damaged one.
        """
        import numpy as np

        addresses = addresses_of(batch)
        self.locate(addresses)
        if missing := sum(address not in self.places for address in addresses):
            raise self.lacks(missing, len(addresses))
        found = [self.entry(address) for address in addresses]
        codecs = {codec_name(codec): codec for codec, _ in found}
        if len(codecs) > 1:
            raise LimbeckError(f"{self.path} keeps one batch in several forms ({', '.join(codecs)}); expected one")
        (name, codec), rows = next(iter(codecs.items())), [columns for _, columns in found]
        joined = {column: np.concatenate([row[column] for row in rows]) for column in rows[0]}
        return codec.decode(joined, self.manifest.frame, heads.get(name))

    def lacks(self, missing: int, of: int) -> LimbeckError:
        return LimbeckError(
            f"{self.path} has no signal for {missing} of {of} responses: it was captured of other texts, or with "
            f"another template or tokenizer; {self.remedy}"
        )

    def entry(self, address: bytes) -> tuple[Codec, Columns]:
        """The columns of an address that was looked up, and their codec."""
        path, number = self.places[address]
        codec, columns = self._codec(path), self._shards[path].entry(number)
        require_layout(path, columns, codec.layout(self.manifest.frame))
        return codec, columns

    def text(self, address: bytes) -> tuple[Text | None, Json | None]:
        """The text of an address that was looked up and how it was sampled, where the store keeps that."""
        path, number = self.places[address]
        return self._shards[path].text(number), self.seals[path]["sampling"]

    def answers(self, keys: Sequence[bytes], sampling: Json) -> dict[bytes, Text]:
        """The teacher's answers to some prompts (`prompt_key`) that were sampled in one way."""
        found: dict[bytes, Text] = {}
        for path, seal in self.seals.items():
            if seal["sampling"] == sampling and (missing := [key for key in keys if key not in found]):
                found |= self._shards[path].texts_of(missing)
        return found

    @property
    def samplings(self) -> list[Json]:
        """The ways in which the answers of the store were sampled."""
        found = {fingerprint(seal["sampling"]): seal["sampling"] for seal in self.seals.values() if seal["sampling"]}
        return list(found.values())

    def _codec(self, path: Path) -> Codec:
        if path not in self._codecs:
            self._codecs[path] = read_codec(self.seals[path]["codec"])
        return self._codecs[path]

    def addresses_in(self, shard: Path) -> list[bytes]:
        """Every address of a shard."""
        return self._shards[shard].addresses

    def shared(self, codec: Codec) -> dict[str, Tensor]:
        """The tensors that all tokens of a codec share, compared with their seal."""
        from safetensors.torch import load_file

        path = shared_file(self.path, codec)
        if not path.exists():
            return {}
        read_whole_seal(path)
        return load_file(path)

    def head(self, codec: Codec, device: torch.device) -> Head | None:
        """The head for the signals of a codec; None where they need none.

        Raises:
            LimbeckError: it is damaged.
        """
        tensors = self.shared(codec)
        if "weight" not in tensors:
            return None
        record = read_seal(shared_file(self.path, codec))
        if len(tensors["weight"]) != self.manifest.frame.vocab_size:
            raise damaged(shared_file(self.path, codec), f"it has {len(tensors['weight'])} rows")
        bias_V = tensors.get("bias")
        return Head(
            weight_VD=tensors["weight"].to(device),
            bias_V=None if bias_V is None else bias_V.to(device),
            scale=record["scale"],
            softcap=record["softcap"],
            vocab_size=self.manifest.frame.vocab_size,
        )


def codec_name(codec: Codec) -> str:
    return str(codec_tree(codec)["name"])


def shared_file(path: Path, codec: Codec) -> Path:
    """The file of what all tokens of a codec share."""
    return path / f"{codec_name(codec)}.safetensors"


def shared_hash(path: Path, codec: Codec) -> str | None:
    """Hash of that file, by its seal; None where there is none."""
    file = shared_file(path, codec)
    return read_seal(file)["sha256"] if file.exists() else None


def sealed_shards(path: Path) -> list[Path]:
    """The shards that have a seal, in order."""
    return [seal.with_suffix(".safetensors") for seal in sorted(path.glob("[0-9]" * 6 + ".json"))]
