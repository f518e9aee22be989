"""Prompts for the fake server, and what it is to answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from limbeck.client.pool import ServerPool
from limbeck.sampling.decoding import row_seed
from limbeck.sampling.served import Served, ServedSampler
from limbeck.types import Sampling, TokenPrompt
from tests.sampling.served.fake_server import FakeServer, draw
from tests.tiny_pair import questions

SAMPLING = Sampling(max_new_tokens=8, temperature=0.7, top_p=0.9, top_k=5, seed=3)


def prompts_of(sampler: ServedSampler, count: int = 12) -> list[TokenPrompt]:
    texts = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in questions(count)]
    rows: Any = sampler.tokenizer(texts)["input_ids"]
    return [TokenPrompt(id=f"p{number}", ids=tuple(ids)) for number, ids in enumerate(rows)]


def with_options(sampler: ServedSampler, **options: Any) -> ServedSampler:
    """The sampler with other options of its first server."""
    return replace(sampler, pool=ServerPool(servers=(replace(sampler.pool.servers[0], **options),)))


def at_url(sampler: ServedSampler, url: str) -> ServedSampler:
    return with_options(sampler, base_url=url)


def at_both(sampler: ServedSampler, *servers: FakeServer, said: list[str] | None = None) -> ServedSampler:
    """The sampler with several servers, and the list of its warnings."""
    one = sampler.pool.servers[0]
    pool = ServerPool(
        servers=tuple(replace(one, base_url=server.url) for server in servers),
        warn=(lambda line: None) if said is None else said.append,
    )
    return replace(sampler, pool=pool)


def at(sampler: ServedSampler, server: FakeServer) -> ServedSampler:
    return at_url(sampler, server.url)


def with_turns(sampler: ServedSampler, count: int = 12) -> ServedSampler:
    return replace(
        sampler, turns={f"p{n}": [{"role": "user", "content": text}] for n, text in enumerate(questions(count))}
    )


def drawn(prompt: TokenPrompt) -> tuple[int, ...]:
    """What the server draws for a prompt."""
    seed = row_seed(SAMPLING, "teacher", prompt.id) % 2**31
    return tuple(draw(list(prompt.ids), seed, SAMPLING.max_new_tokens))


def served_of(sampler: ServedSampler, prompts: list[TokenPrompt], **kwargs: Any) -> list[Served]:
    return sorted(sampler.respond_as_they_come(prompts, SAMPLING, **kwargs), key=lambda one: one.index)
