"""Answers that are text alone, and where an answer ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from limbeck.sampling.served import ServedSampler
from limbeck.types import LimbeckError
from tests.sampling.served.asking import SAMPLING, drawn, prompts_of, served_of, with_turns
from tests.sampling.served.fake_server import END, FakeServer

OTHER_END = 0


def test_stop_strings_stay_where_the_ids_hold_them(sampler: ServedSampler, server: FakeServer) -> None:
    (prompt,) = prompts_of(sampler, 1)
    ids = [50, 60, 70]
    last = sampler.tokenizer.decode(ids[-1:])
    choice = {"finish_reason": "stop", "token_ids": ids}
    server.order(faults=[{"status": 200, "body": {"choices": [choice]}}])
    (response,) = sampler.respond([prompt], replace(SAMPLING, stop=(last,)))
    assert response.response_ids == tuple(ids) and response.stop == "stop"
    assert server.record()["requests"][0]["stop"] == [last]


@pytest.mark.parametrize(
    ("said", "stop", "text"),
    [
        ({"text": "abc"}, "stop", "abc"),
        ({"text": "ab", "stop_reason": "c"}, "stop", "abc"),
        ({"text": "ab", "matched_stop": END}, "eos", "ab"),
        ({"text": "ab", "finish_reason": "length"}, "length", "ab"),
        ({"text": "ab\ufffd", "finish_reason": "length"}, "length", "ab"),
    ],
)
def test_stop_strings_of_a_server_that_gives_text(
    sampler: ServedSampler, server: FakeServer, said: Any, stop: str, text: str
) -> None:
    server.order(faults=[{"status": 200, "body": {"choices": [{"finish_reason": "stop"} | said]}}])
    (response,) = sampler.respond(prompts_of(sampler, 1), replace(SAMPLING, stop=("c",)))
    ids = list(response.response_ids)
    assert response.stop == stop and (stop != "eos" or ids.pop() == END)
    assert sampler.tokenizer.decode(ids) == text


def test_a_stop_that_may_be_either_is_refused(sampler: ServedSampler, server: FakeServer) -> None:
    server.order(faults=[{"status": 200, "body": {"choices": [{"finish_reason": "stop", "text": "ab"}]}}])
    with pytest.raises(LimbeckError, match=r"does not say whether .* \['c'\]; leave responses\.stop empty"):
        sampler.respond(prompts_of(sampler, 1), replace(SAMPLING, stop=("c",)))


def test_text_that_spells_a_control_token_stays_text(sampler: ServedSampler, server: FakeServer) -> None:
    server.order(faults=[{"status": 200, "body": {"choices": [{"finish_reason": "length", "text": "a<|im_end|>b"}]}}])
    (response,) = sampler.respond(prompts_of(sampler, 1), replace(SAMPLING, max_new_tokens=40))
    assert END not in response.response_ids and sampler.tokenizer.decode(list(response.response_ids)) == "a<|im_end|>b"


def test_what_lies_behind_an_end_is_cut(sampler: ServedSampler, server: FakeServer) -> None:
    """Servers that know another end than the chat template's run on."""
    choice = {"finish_reason": "length", "token_ids": [50, END, 60, 61, 62, 63, 64, 65]}
    server.order(faults=[{"status": 200, "body": {"choices": [choice]}}])
    (response,) = sampler.respond(prompts_of(sampler, 1), SAMPLING)
    assert response.response_ids == (50, END) and response.stop == "eos"


@pytest.mark.parametrize(
    ("said", "ids"),
    [
        ({"token_ids": [50, OTHER_END], "stop_reason": OTHER_END}, (50, OTHER_END)),
        ({"token_ids": [50], "stop_reason": OTHER_END}, (50, OTHER_END)),
        ({"token_ids": [50, OTHER_END]}, (50, OTHER_END)),
        ({"token_ids": [50], "stop_reason": 60}, (50, END)),
        ({"text": "", "stop_reason": OTHER_END}, (OTHER_END,)),
    ],
)
def test_an_end_that_the_server_alone_knows(
    sampler: ServedSampler, server: FakeServer, said: Any, ids: tuple[int, ...]
) -> None:
    """As vLLM ends answers of Qwen2.5 with <|endoftext|>, which its generation configuration names."""
    reply = {"choices": [{"finish_reason": "stop"} | said]}
    server.order(faults=[{"status": 200, "body": reply}])
    (response,) = sampler.respond(prompts_of(sampler, 1), SAMPLING)
    assert response.response_ids == ids and response.stop == "eos"


def test_a_control_token_before_an_end_that_was_left_out(sampler: ServedSampler, server: FakeServer) -> None:
    choice = {"finish_reason": "stop", "token_ids": [50, OTHER_END]}
    server.order(faults=[{"status": 200, "body": {"choices": [choice], "usage": {"completion_tokens": 3}}}])
    (response,) = sampler.respond(prompts_of(sampler, 1), SAMPLING)
    assert response.response_ids == (50, OTHER_END, END)


def test_an_empty_answer_is_one(sampler: ServedSampler, server: FakeServer) -> None:
    server.order(faults=[{"status": 200, "body": {"choices": [{"finish_reason": "stop", "text": ""}]}}])
    (response,) = sampler.respond(prompts_of(sampler, 1), SAMPLING)
    assert response.response_ids == (END,) and response.stop == "eos"


def test_text_the_tokenizer_does_not_give_back(sampler: ServedSampler, server: FakeServer) -> None:
    class Lossy:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [50]}

        def decode(self, ids: list[int], **_: Any) -> str:
            return "ax"

    prompts = prompts_of(sampler, 1)
    server.order(faults=[{"status": 200, "body": {"choices": [{"finish_reason": "stop", "text": "ab"}]}}])
    with pytest.raises(LimbeckError, match=r"from character 1 on: 'x' for 'b'\); use a server that returns token ids"):
        replace(sampler, tokenizer=cast(Any, Lossy())).respond(prompts, SAMPLING)


@pytest.mark.parametrize("manner", ["transformers", "openai", "chat"])
def test_text_alone_is_tokenised_again_and_said_so(sampler: ServedSampler, server: FakeServer, manner: str) -> None:
    server.order(manner=manner)
    prompts, settings = prompts_of(sampler), replace(SAMPLING, top_k=0)
    if manner == "chat":
        sampler = with_turns(sampler)
    served = sorted(sampler.respond_as_they_come(prompts, settings), key=lambda one: one.index)
    decode = sampler.tokenizer.decode
    for one, prompt in zip(served, prompts, strict=True):
        assert one.reencoded and not one.prompt_differs and one.api == ("chat" if manner == "chat" else "completions")
        assert decode(list(one.response.response_ids)) == decode(list(drawn(prompt)))
        assert one.response.stop == ("eos" if drawn(prompt)[-1] == END else "length")
    declined = {"transformers": 1, "openai": 2, "chat": 3}[manner]
    assert len(server.record()["requests"]) == len(prompts) + declined, "the manner is found once"


def test_ids_of_which_some_are_hidden_are_not_believed(sampler: ServedSampler, server: FakeServer) -> None:
    server.order(manner="merging llama.cpp")
    prompts = prompts_of(sampler)
    served = served_of(sampler, prompts)
    decode = sampler.tokenizer.decode
    assert all(one.reencoded for one in served)
    assert [decode(list(one.response.response_ids)) for one in served] == [decode(list(drawn(p))) for p in prompts]


def test_another_chat_template_is_noticed(sampler: ServedSampler, server: FakeServer) -> None:
    server.order(manner="chat")
    turns = {f"p{n}": [{"role": "system", "content": "Hi."}] for n in range(2)}
    served = served_of(replace(sampler, turns=turns), prompts_of(sampler, 2))
    assert all(one.prompt_differs for one in served)


def test_settings_a_server_has_no_words_for_are_refused(sampler: ServedSampler, server: FakeServer) -> None:
    server.order(manner="openai")
    with pytest.raises(LimbeckError, match=r"Unrecognized request arguments supplied: .*top_k.*; correct"):
        sampler.respond(prompts_of(sampler, 2), SAMPLING)
