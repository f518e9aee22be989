"""Samplers in which two models write: against one model alone, against enumeration, and against themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from limbeck.models.heads import decoder_of, head_of, project
from limbeck.sampling import decoding
from limbeck.sampling.draft_and_verify import SpeculativeSamplerBase
from limbeck.sampling.local import SamplingProgress
from limbeck.sampling.speculative import MixtureSampler, SkdSampler, SpeculativeSampler
from limbeck.sampling.top_p import probabilities
from limbeck.types import LimbeckError, Response, Sampler, Sampling, SeenPrompt, TokenPrompt
from tests.sampling.shares import assert_shares
from tests.sampling.tiny import EOS, IN_DOUBLE, VOCAB, sampler_of, tiny_model, tiny_prompts

WARM = Sampling(max_new_tokens=14, temperature=0.8, top_p=0.9, seed=3)
PLAIN = Sampling(max_new_tokens=14, seed=3)
GREEDY = replace(PLAIN, temperature=0.0)
Build = Callable[..., SpeculativeSamplerBase]


def near(model: PreTrainedModel, amount: float = 0.15) -> PreTrainedModel:
    """Another model that often agrees with `model`: the same weights, a little off."""
    other = tiny_model(model.config.model_type, model.dtype)
    draws = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
            parameter.add_((amount * 0.3 * noise).to(parameter.dtype))
    return other


def speculative(
    model: PreTrainedModel, draft: PreTrainedModel, vocab: int = VOCAB, **options: object
) -> SpeculativeSamplerBase:
    settings = {"eos_token_ids": (EOS,), "pad_token_id": 0, "vocab_size": vocab, "batch_size": 4} | options
    return SpeculativeSampler(model=model, draft=draft, **settings)  # pyright: ignore[reportArgumentType]


def skd(
    teacher: PreTrainedModel, model: PreTrainedModel, vocab: int = VOCAB, **options: object
) -> SpeculativeSamplerBase:
    settings = {"eos_token_ids": (EOS,), "pad_token_id": 0, "vocab_size": vocab, "batch_size": 4} | options
    return SkdSampler(model=model, teacher=teacher, **settings)  # pyright: ignore[reportArgumentType]


def mixture(
    teacher: PreTrainedModel, model: PreTrainedModel, vocab: int = VOCAB, **options: object
) -> SpeculativeSamplerBase:
    settings = {"eos_token_ids": (EOS,), "pad_token_id": 0, "vocab_size": vocab, "batch_size": 4} | options
    return MixtureSampler(model=model, teacher=teacher, **settings)  # pyright: ignore[reportArgumentType]


EVERY = pytest.mark.parametrize("build", [speculative, skd, mixture])


def logits_after(model: PreTrainedModel, ids: tuple[int, ...], vocab: int) -> Tensor:
    with torch.no_grad():
        hidden_1D = decoder_of(model)(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1:]
        return project(head_of(model, vocab, verify=False), hidden_1D)


def rule_of(build: Build, p_1V: Tensor, q_1V: Tensor, sampling: Sampling) -> Tensor:
    """The distribution of one token, by its definition."""
    p_V, q_V = probabilities(p_1V, sampling)[0], probabilities(q_1V, sampling)[0]
    if build is speculative:
        return p_V
    if build is mixture:
        return 0.4 * p_V + 0.6 * q_V
    high_V = torch.zeros_like(q_V).index_fill_(0, p_1V[0].topk(2).indices, 1.0)
    narrow_V = (p_1V[0] / sampling.temperature).softmax(-1) * high_V
    return q_V * high_V + (q_V * (1 - high_V)).sum() * narrow_V / narrow_V.sum()


@EVERY
@pytest.mark.parametrize("draft_tokens", [1, 2, 4])
@pytest.mark.parametrize(
    "sampling", [Sampling(max_new_tokens=3), Sampling(max_new_tokens=3, temperature=0.7, top_p=0.8)]
)
def test_three_tokens_follow_the_rule_by_enumeration(build: Build, draft_tokens: int, sampling: Sampling) -> None:
    vocab, prompt_ids = 6, (3, 1, 4)
    teacher = tiny_model()
    other = near(teacher, 0.4)
    options = {speculative: {}, skd: {"top_k": 2}, mixture: {"alpha": 0.4}}[build]
    sampler = build(teacher, other, vocab, eos_token_ids=(), batch_size=500, draft_tokens=draft_tokens, **options)
    many = [TokenPrompt(id=str(i), ids=prompt_ids) for i in range(2500)]
    written_N3 = torch.tensor([r.response_ids for r in sampler.respond(many, sampling)])
    expected = torch.zeros(vocab, vocab, vocab, dtype=torch.float64)

    def token(*before: int) -> Tensor:
        ids = prompt_ids + before
        return rule_of(build, logits_after(teacher, ids, vocab), logits_after(other, ids, vocab), sampling)

    first = token()
    for a in range(vocab):
        second = token(a)
        for b in range(vocab):
            expected[a, b] = first[a] * second[b] * token(a, b)
    assert_shares(written_N3[:, 0], expected.sum((1, 2)))
    assert_shares(written_N3[:, 0] * vocab + written_N3[:, 1], expected.sum(2).flatten())
    assert_shares((written_N3 * torch.tensor([vocab**2, vocab, 1])).sum(1), expected.flatten())


@pytest.mark.parametrize("family", IN_DOUBLE)
def test_greedy_is_the_teachers_own_token_for_token(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 24)
    model, long = tiny_model(family), replace(GREEDY, max_new_tokens=24)
    alone = sampler_of(model).respond(tiny_prompts(), long)
    for draft, draft_tokens in ((near(model), 1), (near(model), 30), (tiny_model("llama", seed=9), 3), (model, 3)):
        sampler = speculative(model, draft, draft_tokens=draft_tokens)
        assert sampler.respond(tiny_prompts(), long) == alone
    assert skd(model, near(model), top_k=1).respond(tiny_prompts(), PLAIN) == [
        replace(r, author="student", sampling=PLAIN) for r in sampler_of(model).respond(tiny_prompts(), GREEDY)
    ]


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_greedy_in_float32_and_on_eager_attention(family: str) -> None:
    model = tiny_model(family, torch.float32)
    model.set_attn_implementation("eager")
    sampler = speculative(model, near(model))
    assert sampler.respond(tiny_prompts(), GREEDY) == sampler_of(model).respond(tiny_prompts(), GREEDY)


def test_a_draft_model_that_is_the_teacher_writes_what_the_teacher_writes_alone() -> None:
    model = tiny_model()
    sampler = speculative(model, model)
    assert sampler.respond(tiny_prompts(), PLAIN) == sampler_of(model).respond(tiny_prompts(), PLAIN)
    assert sampler.tally.rejected == 0 and sampler.tally.acceptance == 1
    assert sampler.tally.drafted == sampler.tally.accepted


def test_the_student_alone_is_what_is_left_without_the_teacher() -> None:
    teacher, student = tiny_model(), near(tiny_model())
    alone = replace(sampler_of(student), author="student").respond(tiny_prompts(), PLAIN)
    free = skd(teacher, student, top_k=VOCAB)
    assert free.respond(tiny_prompts(), PLAIN) == alone
    assert free.tally.replaced == 0
    none = mixture(teacher, student, alpha=0.0).respond(tiny_prompts(), PLAIN)
    assert [r.response_ids for r in none] == [r.response_ids for r in alone]
    # Greedy, the mixture with alpha = 1 is the teacher's own.
    whole = mixture(teacher, student, alpha=1.0).respond(tiny_prompts(), GREEDY)
    assert [r.response_ids for r in whole] == [
        r.response_ids for r in sampler_of(teacher).respond(tiny_prompts(), GREEDY)
    ]


def test_a_refused_token_may_be_drawn_from_the_teachers_nucleus() -> None:
    teacher = tiny_model()
    student = near(teacher)

    def written(redraw: str, sampling: Sampling) -> list[tuple[int, ...]]:
        sampler = skd(teacher, student, top_k=1, redraw=redraw)
        return [r.response_ids for r in sampler.respond(tiny_prompts(), sampling)]

    assert written("nucleus", PLAIN) != written("top_k", PLAIN)
    # Of a nucleus of one token there is one draw.
    narrow = replace(PLAIN, top_p=1e-6)
    assert written("nucleus", narrow) == written("top_k", narrow)


@EVERY
@pytest.mark.parametrize("family", IN_DOUBLE)
def test_a_response_depends_on_no_neighbour_and_not_on_what_may_follow(build: Build, family: str) -> None:
    teacher, prompts = tiny_model(family), [*tiny_prompts(), TokenPrompt(id="one", ids=(7,))]
    other = near(teacher)

    def written(batch_size: int, asked: list[TokenPrompt], sampling: Sampling = WARM) -> list[tuple[int, ...]]:
        sampler = build(teacher, other, batch_size=batch_size, eos_token_ids=(EOS, 17, 33))
        return [r.response_ids for r in sampler.respond(asked, sampling)]

    together = written(8, prompts)
    assert together == [written(1, [prompt])[0] for prompt in prompts]
    assert together == written(3, prompts[::-1])[::-1]
    long = written(8, prompts, replace(WARM, max_new_tokens=40))
    assert all(b[: len(a)] == a for a, b in zip(together, long, strict=True))
    # Gemma's random weights repeat themselves to the end.
    assert family == "gemma3_text" or len({len(ids) for ids in long}) > 2, "the test needs different lengths"


@EVERY
@pytest.mark.parametrize("family", IN_DOUBLE)
def test_captured_hidden_states_and_log_probs_are_those_of_a_full_pass(build: Build, family: str) -> None:
    teacher = tiny_model(family)
    other = near(teacher)
    sampler = build(teacher, other, keep_logp=True)
    main = teacher if build is speculative else other
    for answered in sampler.respond_in_batches(tiny_prompts(), WARM, capture_hidden=True):
        assert answered.hidden is not None
        for response, hidden_ND in zip(answered.responses, answered.hidden, strict=True):
            expected_ND, p_NV = full_pass(teacher, response)
            assert hidden_ND.dtype == torch.float32 and not hidden_ND.is_inference()
            torch.testing.assert_close(hidden_ND, expected_ND.float(), rtol=1e-5, atol=1e-5)
            _, main_NV = full_pass(main, response)
            ids_N1 = torch.tensor(response.response_ids)[:, None]
            logp_N = main_NV.log_softmax(-1).gather(-1, ids_N1)[:, 0]
            torch.testing.assert_close(torch.tensor(response.logp, dtype=torch.float64), logp_N)
            if build is not mixture:
                assert response.sampled_logp is None
                continue
            mixed_NV = 0.2 * probabilities(p_NV, WARM) + 0.8 * probabilities(main_NV, WARM)
            drawn_N = mixed_NV.gather(-1, ids_N1)[:, 0].log()
            torch.testing.assert_close(torch.tensor(response.sampled_logp, dtype=torch.float64), drawn_N)


def full_pass(model: PreTrainedModel, response: Response) -> tuple[Tensor, Tensor]:
    """Hidden states and logits that predict the response's ids, from one pass over all ids."""
    ids = response.prompt_ids + response.response_ids
    with torch.no_grad():
        hidden_TD = decoder_of(model)(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        hidden_ND = hidden_TD[len(response.prompt_ids) - 1 : -1]
        return hidden_ND, project(head_of(model, VOCAB, verify=False), hidden_ND)


def test_importance_weights_of_the_mixture_average_to_one() -> None:
    teacher = tiny_model()
    many = [replace(tiny_prompts(1)[0], id=str(i)) for i in range(3000)]
    responses = mixture(teacher, near(teacher, 0.4), batch_size=500).respond(many, Sampling(max_new_tokens=1))
    weights = [math.exp(q - m) for r in responses for q, m in zip(r.logp or (), r.sampled_logp or (), strict=True)]
    assert sum(weights) / len(weights) == pytest.approx(1, abs=0.03)
    assert max(weights) <= 1 / 0.8 + 1e-9


@EVERY
def test_an_end_inside_an_accepted_run_ends_the_response(build: Build) -> None:
    model = tiny_model()
    free = build(model, model, eos_token_ids=()).respond(tiny_prompts(), GREEDY)
    for place in range(5):
        end = free[0].response_ids[place]
        sampler = build(model, model, eos_token_ids=(end,))
        for before, after in zip(free, sampler.respond(tiny_prompts(), GREEDY), strict=True):
            ids = before.response_ids
            cut = ids[: ids.index(end) + 1] if end in ids else ids
            assert after.response_ids == cut and after.stop == ("eos" if end in ids else "length")
        assert sampler.tally.rejected == 0 and sampler.tally.accepted == sampler.tally.drafted


@EVERY
def test_a_stop_string_inside_an_accepted_run_ends_the_response(
    build: Build, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, stop = tiny_model(), ("b", "kq", "aa")
    warm = Sampling(max_new_tokens=40, temperature=1.5, stop=stop)
    alone = replace(sampler_of(model), tokenizer=tokenizer, author="teacher" if build is speculative else "student")
    options = {"top_k": VOCAB} if build is skd else {}
    together = build(model, model, tokenizer=tokenizer, **options).respond(tiny_prompts(), warm)
    expected = alone.respond(tiny_prompts(), warm)
    assert [(r.response_ids, r.stop) for r in together] == [(r.response_ids, r.stop) for r in expected]
    assert "stop" in {r.stop for r in together}


@EVERY
def test_no_response_is_longer_than_asked(build: Build) -> None:
    teacher = tiny_model()
    for limit, draft_tokens in itertools.product((1, 2, 5), (1, 4, 9)):
        sampler = build(teacher, near(teacher), eos_token_ids=(), draft_tokens=draft_tokens)
        responses = sampler.respond(tiny_prompts(), replace(PLAIN, max_new_tokens=limit))
        assert all(len(r.response_ids) == limit and r.stop == "length" for r in responses)


def gpt2(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


@EVERY
def test_drafts_never_reach_beyond_the_last_learned_position(build: Build) -> None:
    sampler = build(gpt2(0), gpt2(1), eos_token_ids=(), draft_tokens=6)
    prompts = [TokenPrompt(id="full", ids=(7,) * 18), TokenPrompt(id="short", ids=(9, 8))]
    assert [r.length for r in sampler.respond(prompts, PLAIN)] == [32, 16]


@EVERY
def test_padded_slots_of_either_head_are_never_drawn(build: Build) -> None:
    teacher, other = tiny_model(), near(tiny_model())
    with torch.no_grad():
        for model in (teacher, other):
            head_of(model, VOCAB, verify=False).weight_VD[VOCAB:] *= 100
    for sampling in (Sampling(max_new_tokens=12, temperature=50.0), replace(GREEDY, max_new_tokens=12)):
        responses = build(teacher, other, eos_token_ids=()).respond(tiny_prompts(), sampling)
        assert all(token < VOCAB for r in responses for token in r.response_ids)


@EVERY
def test_skipping_finished_batches_leaves_the_rest_bit_identical(build: Build) -> None:
    teacher = tiny_model(dtype=torch.float32)
    sampler, prompts = build(teacher, near(teacher)), tiny_prompts(11)
    whole = list(sampler.respond_in_batches(prompts, WARM, capture_hidden=True))
    assert [a.indices for a in whole] == sampler.plan(prompts, WARM)
    rest = list(sampler.respond_in_batches(prompts, WARM, done=whole[0].indices, capture_hidden=True))
    assert [a.responses for a in rest] == [a.responses for a in whole[1:]]
    for again, before in zip(rest, whole[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(again.hidden or (), before.hidden or (), strict=True))


@EVERY
def test_counts_add_up_and_are_shared_by_copies(build: Build) -> None:
    seen: list[SamplingProgress] = []
    teacher = tiny_model()
    sampler = build(teacher, near(teacher))
    responses = replace(sampler, on_progress=seen.append).respond(tiny_prompts(), PLAIN)
    tokens, tally = sum(len(r.response_ids) for r in responses), sampler.tally
    assert seen[-1] == SamplingProgress(responses_done=7, responses_total=7, tokens=tokens)
    assert tally.accepted > 0 and tally.rejected > 0 and tally.accepted + tally.rejected <= tally.drafted
    followed = tokens - tally.accepted - tally.rejected
    # What neither stood nor replaced is what the teacher added behind a full round.
    assert (0 < followed <= tally.rounds) if build is speculative else followed == 0


@EVERY
def test_weights_changed_between_calls_are_used_and_modes_come_back(build: Build) -> None:
    teacher, other = tiny_model(dtype=torch.float32), tiny_model(seed=4, dtype=torch.float32).train()
    sampler = build(teacher, other)
    before = sampler.respond(tiny_prompts(), PLAIN)
    assert other.training and not teacher.training and not torch.is_inference_mode_enabled()
    with torch.no_grad():
        for parameter, new in zip(other.parameters(), near(teacher).parameters(), strict=True):
            parameter.copy_(new)
    after = sampler.respond(tiny_prompts(), PLAIN)
    assert after == build(teacher, near(teacher)).respond(tiny_prompts(), PLAIN) != before


def test_they_are_samplers_and_memory_bounds_the_batch() -> None:
    teacher = tiny_model()
    sampler = speculative(teacher, near(teacher), batch_size=8)
    assert isinstance(sampler, Sampler) and sampler.respond([], WARM) == []
    # Twice 3 layers, keys and values, 2 heads of 8 float64 numbers are 1536 bytes a token.
    prompts = tiny_prompts(20)
    slots = max(len(p.ids) for p in prompts) + WARM.max_new_tokens
    sizes = [len(batch) for batch in replace(sampler, cache_gib=1536 * slots * 3.5 / 2**30).plan(prompts, WARM)]
    assert sizes[0] == 3 and max(sizes) <= 8


def test_what_cannot_be_is_refused_in_one_line() -> None:
    model = tiny_model()
    for options, message in (
        ({"draft_tokens": 0}, "draft_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"pad_token_id": VOCAB}, f"pad_token_id is {VOCAB}"),
    ):
        with pytest.raises(LimbeckError, match=message):
            speculative(model, model, **options)
    with pytest.raises(LimbeckError, match=r"alpha is 1\.5"):
        mixture(model, model, alpha=1.5)
    with pytest.raises(LimbeckError, match="top_k is 0"):
        skd(model, model, top_k=0)
    with pytest.raises(LimbeckError, match="expected at most 32 together"):
        speculative(model, gpt2(0)).respond([TokenPrompt(id="x", ids=(7,) * 30)], WARM)


def test_models_that_cannot_take_tokens_back_are_refused() -> None:
    shared = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    for family, said in (("mamba", "keeps LinearAttentionLayer"), ("bloom", "positions by ALiBi")):
        config = AutoConfig.for_model(family, **shared, **({"n_head": 4, "n_layer": 2} if family == "bloom" else {}))
        strange = AutoModelForCausalLM.from_config(config)
        with pytest.raises(LimbeckError, match=said) as refusal:
            speculative(tiny_model(), strange)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("poisoned", [0, 1])
def test_logits_that_are_not_finite_stop_the_run_and_name_the_prompt(poisoned: int) -> None:
    models = (tiny_model(), near(tiny_model()))
    sampler = speculative(*models)
    with torch.no_grad():
        head_of(models[poisoned], VOCAB, verify=False).weight_VD[9, 0] = float("nan")
    with pytest.raises(LimbeckError, match=r"logits for prompt 'p\d+' are NaN or infinite at response token 0"):
        sampler.respond(tiny_prompts(), WARM)
    with pytest.raises(LimbeckError, match="gives NaN or infinite logits on plain tokens"):
        speculative(*models)


@pytest.mark.parametrize("build", [skd, mixture])
def test_a_teacher_that_reads_another_prompt_follows_the_rule_by_enumeration(build: Build) -> None:
    """The student's prompt is shorter or longer than the teacher's; the states handed over are the teacher's."""
    vocab, own, theirs = 6, (3, 1, 4), ((2, 5, 1, 1, 4), (5,))
    teacher, sampling = tiny_model(), Sampling(max_new_tokens=2)
    other = near(teacher, 0.4)
    options = {skd: {"top_k": 2}, mixture: {"alpha": 0.4}}[build]

    def seen(prompts: Sequence[TokenPrompt]) -> list[TokenPrompt]:
        return [SeenPrompt(id=p.id, ids=theirs[int(p.id) % 2], asked=p) for p in prompts]

    sampler = build(teacher, other, vocab, eos_token_ids=(), batch_size=500, draft_tokens=2, seen=seen, **options)
    many = [TokenPrompt(id=str(i), ids=own) for i in range(3000)]
    written = sampler.respond(many, sampling)
    assert all(response.prompt_ids == own for response in written)
    for which, ids in enumerate(theirs):
        written_N2 = torch.tensor([r.response_ids for r in written if int(r.prompt_id) % 2 == which])
        expected = torch.zeros(vocab, vocab, dtype=torch.float64)
        first = rule_of(build, logits_after(teacher, ids, vocab), logits_after(other, own, vocab), sampling)
        for a in range(vocab):
            p_1V, q_1V = logits_after(teacher, (*ids, a), vocab), logits_after(other, (*own, a), vocab)
            expected[a] = first[a] * rule_of(build, p_1V, q_1V, sampling)
        assert_shares((written_N2 * torch.tensor([vocab, 1])).sum(1), expected.flatten())
    (batch,) = sampler.respond_in_batches(many[:4], sampling, capture_hidden=True)
    for response, states in zip(batch.responses, batch.hidden or (), strict=True):
        ids = (*theirs[int(response.prompt_id) % 2], *response.response_ids)
        with torch.no_grad():
            wanted = decoder_of(teacher)(input_ids=torch.tensor([ids[:-1]]), use_cache=False).last_hidden_state[0, -2:]
        torch.testing.assert_close(states, wanted.float(), rtol=1e-4, atol=1e-5)
