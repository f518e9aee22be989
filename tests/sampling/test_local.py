"""The local sampler against the naive line it replaces, and against itself: alone, in batches, interrupted."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from limbeck.models.heads import decoder_of, head_of, project
from limbeck.sampling import decoding
from limbeck.sampling.local import SamplingProgress
from limbeck.types import LimbeckError, Response, Sampler, Sampling, TokenPrompt
from tests.sampling.tiny import EOS, FAMILIES, IN_DOUBLE, VOCAB, sampler_of, tiny_model, tiny_prompts

WARM = Sampling(max_new_tokens=12, temperature=0.8, top_p=0.9, seed=3)
GREEDY = replace(WARM, temperature=0.0)


def generated(model: torch.nn.Module, prompts: list[TokenPrompt], sampling: Sampling) -> list[tuple[int, ...]]:
    """Greedy `generate` with padded slots of the head suppressed; ids up to the end of each response."""
    width = max(len(prompt.ids) for prompt in prompts)
    ids_BT = torch.tensor([(0,) * (width - len(prompt.ids)) + prompt.ids for prompt in prompts])
    written_BT = model.generate(  # pyright: ignore[reportCallIssue]
        ids_BT,
        attention_mask=(ids_BT != 0).long(),
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        suppress_tokens=list(range(VOCAB, 64)),
    )[:, width:]
    return [tuple(ids[: ids.index(EOS) + 1] if EOS in ids else ids) for ids in written_BT.tolist()]


def full_forward(model: torch.nn.Module, response: Response) -> tuple[Tensor, Tensor]:
    """Hidden states that predict the response's ids and the log-probs of those ids, from one pass over all ids."""
    ids = response.prompt_ids + response.response_ids
    with torch.no_grad():
        hidden_TD = decoder_of(model)(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        hidden_ND = hidden_TD[len(response.prompt_ids) - 1 : -1]
        logp_NV = project(head_of(model, VOCAB, verify=False), hidden_ND).log_softmax(-1)
    return hidden_ND, logp_NV.gather(-1, torch.tensor(response.response_ids)[:, None])[:, 0]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in FAMILIES] + [(family, torch.float64) for family in IN_DOUBLE],
)
def test_greedy_equals_generate(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 24)
    model, prompts = tiny_model(family, dtype), tiny_prompts()
    responses = sampler_of(model).respond(prompts, GREEDY)
    assert [r.prompt_id for r in responses] == [p.id for p in prompts]
    assert [r.response_ids for r in responses] == generated(model, prompts, GREEDY)
    assert {r.stop for r in responses} <= {"eos", "length"}


@pytest.mark.parametrize(
    ("family", "sampling"),
    [(family, WARM) for family in IN_DOUBLE] + [("llama", replace(WARM, top_p=1.0)), ("llama", replace(WARM, top_k=5))],
)
def test_a_response_does_not_depend_on_its_neighbours(family: str, sampling: Sampling) -> None:
    model, prompts = tiny_model(family), tiny_prompts()
    together = sampler_of(model, batch_size=5).respond(prompts, sampling)
    alone = [sampler_of(model, batch_size=1).respond([prompt], sampling)[0] for prompt in prompts]
    assert together == alone
    assert together == sampler_of(model, batch_size=3).respond(prompts[::-1], sampling)[::-1]


def test_seed_author_and_prompt_id_each_change_the_draws() -> None:
    sampler, prompt = sampler_of(tiny_model()), tiny_prompts(1)[0]
    base = sampler.respond([prompt], WARM)[0].response_ids
    assert base == sampler.respond([prompt], WARM)[0].response_ids
    assert base != sampler.respond([prompt], replace(WARM, seed=4))[0].response_ids
    assert base != replace(sampler, author="student").respond([prompt], WARM)[0].response_ids
    assert base != sampler.respond([replace(prompt, id="other")], WARM)[0].response_ids


def test_a_longer_limit_continues_the_same_response() -> None:
    sampler, prompts = sampler_of(tiny_model()), tiny_prompts()
    short = sampler.respond(prompts, WARM)
    long = sampler.respond(prompts, replace(WARM, max_new_tokens=40))
    assert all(b.response_ids[: len(a.response_ids)] == a.response_ids for a, b in zip(short, long, strict=True))


def test_first_tokens_follow_the_models_distribution() -> None:
    model, prompt = tiny_model(), tiny_prompts(1)[0]
    many = [replace(prompt, id=str(i)) for i in range(3000)]
    responses = sampler_of(model, batch_size=500).respond(many, Sampling(max_new_tokens=1, temperature=1.5))
    with torch.no_grad():
        hidden_1D = decoder_of(model)(input_ids=torch.tensor([prompt.ids])).last_hidden_state[:, -1]
        p_V = (project(head_of(model, VOCAB, verify=False), hidden_1D)[0] / 1.5).softmax(-1)
    seen_V = torch.bincount(torch.tensor([r.response_ids[0] for r in responses]), minlength=VOCAB) / 3000
    spread_V = (p_V * (1 - p_V) / 3000).sqrt()
    assert ((seen_V - p_V).abs() <= 5 * spread_V + 1e-3).all()


def test_skipping_finished_batches_leaves_the_rest_bit_identical() -> None:
    sampler, prompts = sampler_of(tiny_model(dtype=torch.float32), keep_logp=True), tiny_prompts(14)
    whole = list(sampler.respond_in_batches(prompts, WARM, capture_hidden=True))
    assert [a.indices for a in whole] == sampler.plan(prompts, WARM)
    assert sorted(i for a in whole for i in a.indices) == list(range(14))
    # The second batch was interrupted half way: it is sampled again in full.
    done = [*whole[0].indices, *whole[1].indices[:2]]
    rest = list(sampler.respond_in_batches(prompts, WARM, done=done, capture_hidden=True))
    assert [a.indices for a in rest] == [a.indices for a in whole[1:]]
    for again, before in zip(rest, whole[1:], strict=True):
        assert again.responses == before.responses
        assert again.hidden is not None and before.hidden is not None
        assert all(torch.equal(a, b) for a, b in zip(again.hidden, before.hidden, strict=True))


@pytest.mark.parametrize("family", IN_DOUBLE)
def test_captured_hidden_states_and_log_probs_are_those_of_a_full_pass(family: str) -> None:
    model = tiny_model(family)
    sampler = sampler_of(model, keep_logp=True)
    for answered in sampler.respond_in_batches(tiny_prompts(), WARM, capture_hidden=True):
        assert answered.hidden is not None
        for response, hidden_ND in zip(answered.responses, answered.hidden, strict=True):
            expected_ND, logp_N = full_forward(model, response)
            assert hidden_ND.dtype == torch.float32 and not hidden_ND.is_inference()
            torch.testing.assert_close(hidden_ND, expected_ND.float(), rtol=1e-5, atol=1e-5)
            assert response.logp is not None
            torch.testing.assert_close(torch.tensor(response.logp, dtype=torch.float64), logp_N)


def test_by_products_are_made_only_on_request() -> None:
    (answered,) = sampler_of(tiny_model()).respond_in_batches(tiny_prompts(2), WARM)
    assert answered.hidden is None and all(r.logp is None for r in answered.responses)


def test_padded_slots_of_the_head_are_never_drawn() -> None:
    model = tiny_model()
    with torch.no_grad():
        head_of(model, VOCAB, verify=False).weight_VD[VOCAB:] *= 100
    hot = Sampling(max_new_tokens=12, temperature=50.0)
    sampler = replace(sampler_of(model), eos_token_ids=())
    for settings in (hot, replace(hot, temperature=0.0), replace(hot, top_p=0.9), replace(hot, top_k=50)):
        responses = sampler.respond(tiny_prompts(), settings)
        assert all(token < VOCAB for r in responses for token in r.response_ids)
        assert all(r.stop == "length" and len(r.response_ids) == 12 for r in responses)


def test_finished_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    forward = decoding.DecodingModel.forward

    def spy(self: decoding.DecodingModel, ids: Tensor, *rest: object) -> Tensor:
        widths.append(len(ids))
        return forward(self, ids, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(decoding.DecodingModel, "forward", spy)
    hot = Sampling(max_new_tokens=40, temperature=2.0)
    responses = sampler_of(tiny_model(), batch_size=16).respond(tiny_prompts(16), hot)
    lengths = [len(r.response_ids) for r in responses]
    assert len(set(lengths)) > 3, "the test needs responses of different lengths"
    assert widths[-(max(lengths) - 1) :] == [sum(n > step for n in lengths) for step in range(1, max(lengths))]


def test_end_of_sequence_at_once_is_a_response_and_any_end_token_counts() -> None:
    model, prompts = tiny_model(), tiny_prompts(3)
    first = {r.response_ids[0] for r in sampler_of(model).respond(prompts, GREEDY)}
    sampler = replace(sampler_of(model), eos_token_ids=(EOS, *first))
    responses = sampler.respond(prompts, GREEDY)
    assert all(r.stop == "eos" and len(r.response_ids) == 1 for r in responses)


def test_settings_are_recorded_and_split_is_kept() -> None:
    prompts = [replace(p, split="heldout") for p in tiny_prompts(2)]
    for response, prompt in zip(sampler_of(tiny_model()).respond(prompts, WARM), prompts, strict=True):
        assert (response.sampling, response.split, response.author) == (WARM, "heldout", "teacher")
        assert response.prompt_ids == prompt.ids


def test_progress_counts_every_token_and_response() -> None:
    seen: list[SamplingProgress] = []
    sampler = replace(sampler_of(tiny_model()), on_progress=seen.append)
    responses = sampler.respond(tiny_prompts(), WARM)
    assert seen[-1] == SamplingProgress(
        responses_done=7, responses_total=7, tokens=sum(len(r.response_ids) for r in responses)
    )
    assert all(a.tokens < b.tokens for a, b in pairwise(seen))


def test_training_mode_gradients_and_function_modes_are_as_before() -> None:
    model = tiny_model().train()
    model.model.norm.eval()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    before = [module.training for module in model.modules()]
    batches = sampler_of(model).respond_in_batches(tiny_prompts(), WARM)
    next(batches)
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    model(input_ids=torch.tensor([[7, 8]])).logits.sum().backward()


def test_memory_for_the_cache_bounds_the_batch() -> None:
    sampler, prompts = sampler_of(tiny_model(), batch_size=8), tiny_prompts(20)
    # 3 layers, keys and values, 2 heads of 8 float64 numbers are 768 bytes a token; room for 3 rows of the longest.
    slots = max(len(p.ids) for p in prompts) + WARM.max_new_tokens
    small = replace(sampler, cache_gib=768 * slots * 3.5 / 2**30)
    sizes = [len(batch) for batch in small.plan(prompts, WARM)]
    assert sizes[0] == 3 and max(sizes) <= 8
    assert small.respond(prompts, WARM) == sampler.respond(prompts, WARM)


def test_it_is_a_sampler() -> None:
    assert isinstance(sampler_of(tiny_model()), Sampler)
    assert sampler_of(tiny_model()).respond([], WARM) == []


@pytest.mark.parametrize(
    ("prompt_ids", "sampling", "message"),
    [
        ((), WARM, "prompt 'x' has no tokens"),
        ((VOCAB,), WARM, f"prompt 'x' holds ids from {VOCAB} to {VOCAB}, expected 0 to {VOCAB - 1}"),
        ((7,) * 90, WARM, "prompt 'x' has 90 tokens and max_new_tokens is 12, expected at most 96"),
        ((7,), replace(WARM, stop=("END",)), "without a tokenizer"),
        ((7,), replace(WARM, stop=("",)), "sampling.stop is"),
        ((7,), replace(WARM, top_p=0.0), "sampling.top_p is 0.0"),
        ((7,), replace(WARM, temperature=-1.0), "sampling.temperature is -1.0"),
        ((7,), replace(WARM, top_k=-1), "sampling.top_k is -1"),
        ((7,), replace(WARM, max_new_tokens=0), "sampling.max_new_tokens is 0"),
    ],
)
def test_bad_input_is_refused_in_one_line(prompt_ids: tuple[int, ...], sampling: Sampling, message: str) -> None:
    with pytest.raises(LimbeckError) as refusal:
        sampler_of(tiny_model()).respond([TokenPrompt(id="x", ids=prompt_ids)], sampling)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_last_prompt_that_fits_the_window_is_answered() -> None:
    sampler = replace(sampler_of(tiny_model()), eos_token_ids=())
    (response,) = sampler.respond([TokenPrompt(id="x", ids=(7,) * 84)], WARM)
    assert response.length == 96


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [WARM, GREEDY])
def test_logits_that_are_not_finite_stop_the_run_and_name_the_prompt(poison: float, sampling: Sampling) -> None:
    model = tiny_model()
    with torch.no_grad():
        head_of(model, VOCAB, verify=False).weight_VD[9, 0] = poison
    with pytest.raises(LimbeckError, match=r"logits for prompt 'p\d+' are NaN or infinite at response token 0"):
        sampler_of(model).respond(tiny_prompts(), sampling)


def test_an_interrupt_leaves_the_model_usable() -> None:
    model, prompts = tiny_model().train(), tiny_prompts()

    def interrupt(progress: SamplingProgress) -> None:
        if progress.tokens > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(sampler_of(model), on_progress=interrupt).respond(prompts, WARM)
    assert model.training and not torch.is_inference_mode_enabled()
    assert sampler_of(model).respond(prompts, WARM) == sampler_of(tiny_model()).respond(prompts, WARM)
