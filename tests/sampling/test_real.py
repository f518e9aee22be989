"""The sampler on real weights: greedy text is that of `generate`, by-products are those of a full pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limbeck.models.heads import decoder_of, head_of, project
from limbeck.models.loading import load_model
from limbeck.models.vocabulary import real_vocab_size
from limbeck.sampling.local import LocalSampler
from limbeck.types import Sampling, TokenPrompt

QUESTIONS = ("Name a colour.", "What is the capital of France? Answer in one short sentence.")


@pytest.mark.real
def test_greedy_answers_hidden_states_and_log_probs_of_smollm2(smollm2_dir: Path) -> None:
    loaded = load_model(str(smollm2_dir))
    tokenizer, model = loaded.tokenizer, loaded.model
    prompts = [
        TokenPrompt(
            id=question,
            ids=tuple(tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")),
        )
        for question in QUESTIONS
    ]
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    vocab = real_vocab_size(tokenizer)
    sampler = LocalSampler(
        model=model, eos_token_ids=(eos,), pad_token_id=eos, vocab_size=vocab, author="teacher", keep_logp=True
    )
    greedy = Sampling(max_new_tokens=12, temperature=0.0)
    (answered,) = sampler.respond_in_batches(prompts, greedy, capture_hidden=True)
    assert answered.hidden is not None
    for response, hidden_ND in zip(answered.responses, answered.hidden, strict=True):
        ids_BT = torch.tensor([response.prompt_ids])
        written = model.generate(  # pyright: ignore[reportCallIssue]
            ids_BT, attention_mask=torch.ones_like(ids_BT), do_sample=False, max_new_tokens=12, pad_token_id=eos
        )
        assert tuple(written[0, ids_BT.shape[1] :].tolist()) == response.response_ids
        with torch.no_grad():
            whole = torch.tensor([response.prompt_ids + response.response_ids])
            expected_TD = decoder_of(model)(input_ids=whole, use_cache=False).last_hidden_state[0]
            logp_NV = project(head_of(model, vocab, verify=False), hidden_ND).log_softmax(-1)
        torch.testing.assert_close(hidden_ND, expected_TD[ids_BT.shape[1] - 1 : -1], rtol=1e-3, atol=1e-3)
        ids_N1 = torch.tensor(response.response_ids)[:, None]
        assert response.logp is not None
        torch.testing.assert_close(torch.tensor(response.logp), logp_NV.gather(-1, ids_N1)[:, 0], rtol=1e-3, atol=1e-3)
