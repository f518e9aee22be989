"""Stop strings end a response at the token that completes them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from limbeck.sampling.stop_strings import StopStrings
from limbeck.types import Sampling
from tests.sampling.tiny import sampler_of, tiny_model, tiny_prompts


@pytest.mark.parametrize(
    ("ids", "strings", "complete"),
    [
        ((0, 1, 2), ("bc",), True),
        ((0, 1, 2), ("bd", "c"), True),
        ((0, 1), ("bc",), False),
        ((26,), ("é",), False),
        ((26, 27), ("é",), True),
        ((5, 28, 6), (" g",), True),
        ((1, 29), ("</s>",), True),
        ((1, 31), ("a",), True),
        (tuple(range(26)) * 4, ("wxyz",), True),
    ],
)
def test_strings_are_found_across_tokens_characters_and_special_tokens(
    tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...], strings: tuple[str, ...], complete: bool
) -> None:
    assert StopStrings(tokenizer, strings).complete(ids) is complete


def test_a_response_ends_with_the_token_that_completes_a_string(tokenizer: PreTrainedTokenizerFast) -> None:
    warm = Sampling(max_new_tokens=40, temperature=1.5)
    sampler = replace(sampler_of(tiny_model()), tokenizer=tokenizer)
    free = sampler.respond(tiny_prompts(), warm)
    stops = ("b", "kq", "aa")
    stopped = sampler.respond(tiny_prompts(), replace(warm, stop=stops))
    for before, after in zip(free, stopped, strict=True):
        assert before.response_ids[: len(after.response_ids)] == after.response_ids
        texts = [tokenizer.decode(list(before.response_ids[: n + 1])) for n in range(len(before.response_ids))]
        hits = [n for n, text in enumerate(texts) if any(stop in text for stop in stops)]
        if hits and before.response_ids[hits[0]] != 5:
            assert after.stop == "stop" and len(after.response_ids) == hits[0] + 1
        else:
            assert after.stop == before.stop
    assert {response.stop for response in stopped} >= {"stop"}
