"""A server process that behaves and misbehaves to order, and a sampler that asks it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from limbeck.client.openai import Server
from limbeck.client.pool import ServerPool
from limbeck.models.loading import load_tokenizer
from limbeck.models.vocabulary import real_vocab_size
from limbeck.sampling.served import ServedSampler
from tests.sampling.served.fake_server import END, MODEL, FakeServer
from tests.tiny_pair import TinyPair


@pytest.fixture(scope="module")
def running(tiny: TinyPair) -> Iterator[FakeServer]:
    server = FakeServer.start(tiny.teacher)
    yield server
    server.stop()


@pytest.fixture
def server(running: FakeServer) -> FakeServer:
    """Well behaved, with an empty record."""
    running.reset()
    return running


@pytest.fixture
def mortal(tiny: TinyPair) -> Iterator[FakeServer]:
    """One that a test may stop."""
    server = FakeServer.start(tiny.teacher)
    yield server
    server.stop()


@pytest.fixture
def sampler(server: FakeServer, tiny: TinyPair) -> ServedSampler:
    tokenizer = load_tokenizer(str(tiny.teacher))
    return ServedSampler(
        # On a busy machine a server that answers takes seconds; one that is asked again answers twice.
        pool=ServerPool(servers=(Server(base_url=server.url, timeout_s=60, retries=2, backoff_s=0.02),)),
        model=MODEL,
        tokenizer=tokenizer,
        eos_token_ids=(END,),
        end_id=END,
        vocab_size=real_vocab_size(tokenizer),
        author="teacher",
        concurrency=4,
    )
