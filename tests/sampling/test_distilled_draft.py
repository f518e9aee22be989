"""A pruned student, distilled to be accepted, drafts: what comes out is a sample of the teacher alone."""

from __future__ import annotations

from pathlib import Path

import torch

import limbeck
from limbeck.models.loading import load_model
from limbeck.models.vocabulary import real_vocab_size
from limbeck.sampling.speculative import SpeculativeSampler
from limbeck.types import Sampling, TokenPrompt
from tests.sampling.shares import assert_shares
from tests.tiny_pair import TinyPair


def test_two_tokens_follow_the_teacher_by_enumeration(tiny: TinyPair, tmp_path: Path) -> None:
    tree = tiny.tree(tmp_path / "run", objective={"name": "lk", "temperature": 1.0}, evaluate={"groups": {}})
    run = limbeck.run(tree)
    teacher, draft = load_model(str(tiny.teacher)), load_model(str(run.directory / "student"))
    ids, vocab = teacher.tokenizer("What is tea?")["input_ids"], real_vocab_size(teacher.tokenizer)
    # Sharper than the models are, so that pairs of tokens come often enough to be counted.
    sampling = Sampling(max_new_tokens=2, temperature=0.5)
    sampler = SpeculativeSampler(
        model=teacher.model,
        draft=draft.model,
        eos_token_ids=(),
        pad_token_id=0,
        vocab_size=vocab,
        draft_tokens=4,
        batch_size=500,
    )
    asked = [TokenPrompt(id=str(n), ids=tuple(ids)) for n in range(4000)]
    pairs_N2 = torch.tensor([response.response_ids for response in sampler.respond(asked, sampling)])
    with torch.no_grad():
        first_V = teacher.model(torch.tensor([ids])).logits[0, -1, :vocab]
        every_VT = torch.tensor([[*ids, token] for token in range(vocab)])
        second_VV = teacher.model(every_VT).logits[:, -1, :vocab]
    p_V, p_VV = ((logits.double() / sampling.temperature).softmax(-1) for logits in (first_V, second_VV))
    assert_shares(pairs_N2[:, 0], p_V)
    assert_shares(pairs_N2 @ torch.tensor([vocab, 1]), (p_V[:, None] * p_VV).flatten())
    assert 0.05 < sampler.tally.acceptance < 0.95, "a draft that is always right, or never, would show nothing"
