"""A small store on disk, of a tiny model's signals of responses of random length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from limbeck.models.heads import head_of
from limbeck.pipeline.capturing import Captured, capture_into
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.store.addresses import address_of
from limbeck.teachers.store.base import Codec, Frame
from limbeck.teachers.store.dense import Hidden
from limbeck.teachers.store.manifest import Manifest, TeacherIdentity
from limbeck.teachers.store.reader import Store, codec_name
from limbeck.teachers.store.sparse import TopK
from limbeck.teachers.store.writer import writing
from limbeck.types import Head, Json, Response
from tests.training.play import VOCAB, tiny_model, tiny_responses

FRAME = Frame(vocab_size=VOCAB, width=32, temperatures=(1.0, 2.0))
IDENTITY = TeacherIdentity(
    name="tiny", fingerprint="f" * 64, configuration="c" * 64, dtype="float32", attention="sdpa", weight_bytes=1
)


def tiny_teacher() -> LocalTeacher:
    model = tiny_model(3, tied=False)
    return LocalTeacher(model, head_of(model, VOCAB))


def manifest(codec: Codec | None = None, heldout: Codec | None = None) -> Manifest:
    """Of held-out texts hidden states, as they are where these are what is kept of the others too."""
    heldout = codec if isinstance(codec, Hidden) and heldout is None else heldout
    return Manifest(
        teacher=IDENTITY,
        tokenizer="t" * 64,
        template={"name": "chat"},
        frame=FRAME,
        codec=codec or TopK(k=8),
        heldout=heldout or Hidden(),
    )


def texts(count: int = 22) -> list[Response]:
    """Responses of which the last five are held out."""
    responses = tiny_responses(count)
    return [replace(r, split="heldout") if i >= count - 5 else r for i, r in enumerate(responses)]


def make(
    path: Path,
    responses: list[Response] | None = None,
    *,
    identity: Manifest | None = None,
    shard_responses: int = 6,
    said: list[str] | None = None,
    teacher: LocalTeacher | None = None,
    sampling: Json | None = None,
) -> Captured:
    """Capture some responses, a few in each shard."""
    said = [] if said is None else said
    with writing(path, identity or manifest(), say=said.append) as writer:
        writer.shard_responses = shard_responses
        return capture_into(
            writer,
            teacher or tiny_teacher(),
            responses or texts(),
            sampling=sampling,
            advance=lambda tokens: None,
        )


def heads(store: Store) -> dict[str, Head]:
    """The heads of a store by codec."""
    found = {codec_name(codec): store.head(codec, torch.device("cpu")) for codec in store.manifest.codecs}
    return {name: head for name, head in found.items() if head is not None}


def content(path: Path, responses: list[Response]) -> list[dict[str, bytes]]:
    """Every column of every response, as the store has it."""
    store, addresses = Store(path), [address_of(response) for response in responses]
    store.locate(addresses)
    if missing := sum(address not in store.places for address in addresses):
        raise store.lacks(missing, len(addresses))
    return [{name: column.tobytes() for name, column in store.entry(a)[1].items()} for a in addresses]
