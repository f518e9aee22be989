"""Sampling with images: greedy answers are those of transformers' own generate, whatever stands beside a prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("PIL", reason="images need Pillow: pip install 'limbeck[vision]'")

from limbeck.models.forward import hidden_states
from limbeck.models.vision import require_reader
from limbeck.models.vocabulary import real_vocab_size
from limbeck.rollouts.collate import collate
from limbeck.sampling.local import LocalSampler
from limbeck.sampling.speculative import SkdSampler
from limbeck.types import LimbeckError, Sampling, TokenPrompt
from tests.models.vision_pairs import VisionPair
from tests.tiny_vision import FAMILIES

NEW = 7


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionPair:
    return VisionPair.write(tmp_path_factory.mktemp(request.param), request.param)


def prompts_of(pair: VisionPair, tokenizer: Any) -> list[TokenPrompt]:
    return [TokenPrompt(id=r.prompt_id, ids=r.prompt_ids, images=r.images) for r in pair.responses(tokenizer)]


def sampler_of(loaded: Any, **changes: Any) -> LocalSampler:
    eos = loaded.tokenizer.eos_token_id
    return LocalSampler(
        model=loaded.model,
        eos_token_ids=(eos,),
        pad_token_id=0,
        vocab_size=real_vocab_size(loaded.tokenizer),
        author="teacher",
        **changes,
    )


def test_greedy_answers_are_those_of_generate(pair: VisionPair) -> None:
    """Rows with none, one and two images in one batch, prefilled in one group and decoded together."""
    loaded: Any = pair.load("teacher")
    processor = require_reader(loaded.model).processor
    prompts = prompts_of(pair, loaded.tokenizer)
    answers = sampler_of(loaded).respond(prompts, Sampling(max_new_tokens=NEW, temperature=0.0))
    for (text, _, images), prompt, answer in zip(pair.texts(), prompts, answers, strict=True):
        pictures = [pair.images.open(name) for name in images]
        inputs = processor(text=[text], images=pictures or None, return_tensors="pt")
        with torch.no_grad():
            whole = loaded.model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        expected = whole[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(answer.response_ids) == expected
        assert (answer.prompt_ids, answer.images) == (prompt.ids, prompt.images)


def test_states_kept_while_sampling_are_those_of_a_second_reading(pair: VisionPair) -> None:
    """The teacher's signal is taken from the very pass that wrote the answers."""
    loaded = pair.load("teacher")
    sampling = Sampling(max_new_tokens=NEW, temperature=1.0, seed=3)
    prompts = prompts_of(pair, loaded.tokenizer)
    (batch,) = sampler_of(loaded).respond_in_batches(prompts, sampling, capture_hidden=True)
    assert batch.hidden is not None
    with torch.no_grad():
        read_ND = hidden_states(loaded.model, collate(batch.responses, range(len(prompts)), pad_id=0))
    torch.testing.assert_close(torch.cat(batch.hidden), read_ND, rtol=1e-3, atol=1e-4)


def test_an_answer_does_not_depend_on_its_neighbours(pair: VisionPair) -> None:
    loaded = pair.load("student")
    prompts = prompts_of(pair, loaded.tokenizer)
    sampling = Sampling(max_new_tokens=NEW, temperature=1.0, seed=1)
    together = sampler_of(loaded).respond(prompts, sampling)
    alone = [sampler_of(loaded, batch_size=1).respond([prompt], sampling)[0] for prompt in prompts]
    assert together == alone
    other = replace(prompts[0], images=prompts[1].images[:1])
    states = [
        next(sampler_of(loaded).respond_in_batches([p], sampling, capture_hidden=True)) for p in (prompts[0], other)
    ]
    assert states[0].hidden is not None and states[1].hidden is not None
    assert not torch.equal(states[0].hidden[0][0], states[1].hidden[0][0])


def test_a_prompt_that_is_too_long_with_its_images_is_refused(pair: VisionPair) -> None:
    loaded = pair.load("teacher")
    prompts = prompts_of(pair, loaded.tokenizer)
    longest = max(len(require_reader(loaded.model).expand(p.ids, p.images).ids) for p in prompts)
    with pytest.raises(LimbeckError, match=f"has {longest} tokens and max_new_tokens is"):
        sampler_of(loaded).respond(prompts, Sampling(max_new_tokens=161 - longest))


def test_two_models_together_read_text_alone(pair: VisionPair) -> None:
    teacher, student = pair.load("teacher"), pair.load("student")
    sampler = SkdSampler(
        model=student.model,
        teacher=teacher.model,
        eos_token_ids=(2,),
        pad_token_id=0,
        vocab_size=real_vocab_size(student.tokenizer),
    )
    with pytest.raises(LimbeckError, match="has images, which a sampler of two models does not read"):
        sampler.respond(prompts_of(pair, student.tokenizer), Sampling(max_new_tokens=4))
