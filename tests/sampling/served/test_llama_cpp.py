"""llama.cpp's own server (out of the package xllamacpp) with the tiny teacher as a GGUF file: ids in, ids out."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.models.loading import load_model
from limbeck.rollouts.collate import collate
from limbeck.rollouts.io import read_responses
from limbeck.runtime.rundir import RunDirectory
from limbeck.sampling.served import ServedSampler
from limbeck.teachers.base import TeacherModel
from limbeck.teachers.served_options import OnServer
from limbeck.types import Response, Sampling, TokenPrompt, TopKSignal
from tests.limbeck_command import CommandServer
from tests.models.tiny import save_gguf
from tests.sampling.served.asking import at_url, prompts_of
from tests.sampling.served.llama_cpp import llama_cpp
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp's server comes with xllamacpp: see extra dev"
)


@pytest.fixture(scope="module")
def loaded(tiny: TinyPair) -> Any:
    return load_model(str(tiny.teacher))


@pytest.fixture(scope="module")
def url(loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", loaded.model, tokenizer=loaded.tokenizer)
    with llama_cpp(path) as url:
        yield url


@pytest.fixture
def asked(sampler: ServedSampler, url: str) -> ServedSampler:
    return at_url(replace(sampler, model="tiny"), url)


def test_greedy_answers_are_those_of_the_teacher_here(
    tiny: TinyPair, url: str, limbeck: CommandServer, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 10}
    for name, server in (("there", {"server": {"base_url": url, "timeout_s": 60.0}}), ("here", {})):
        end = limbeck.run("respond", tiny.recipe(tmp_path / name, responses=settings | server))
        assert end.code == 0, end.stderr
    there, here = (read_responses(tmp_path / name / "responses/teacher.jsonl") for name in ("there", "here"))
    assert [r.prompt_ids for r in there] == [r.prompt_ids for r in here]
    # Token for token, but for a near tie now and then, which another order of summation decides otherwise.
    assert sum(x.response_ids == y.response_ids for x, y in zip(there, here, strict=True)) >= 22
    assert {r.stop for r in there} == {"eos", "length"}
    record = RunDirectory(tmp_path / "there").manifest("respond")
    assert record is not None and record["server"]["reencoded_from_text"] == 0


def test_it_keeps_to_seeds(asked: ServedSampler) -> None:
    prompts, settings = prompts_of(asked), Sampling(max_new_tokens=10, temperature=0.8, seed=5)
    first = [r.response_ids for r in asked.respond(prompts, settings)]
    again = [r.response_ids for r in replace(asked, concurrency=2).respond(prompts, settings)]
    # Another batch rounds otherwise, which tips a draw now and then.
    assert sum(x == y for x, y in zip(first, again, strict=True)) >= 9
    other = [r.response_ids for r in asked.respond(prompts, replace(settings, seed=6))]
    assert sum(x != y for x, y in zip(first, other, strict=True)) >= 9


def test_tokens_follow_the_settings(asked: ServedSampler, loaded: Any) -> None:
    """Temperature, then top-k, then top-p, and none of the server's habits: chi-squared against the teacher here."""
    count, settings = 1500, Sampling(max_new_tokens=1, temperature=2.0, top_k=20, top_p=0.8, seed=11)
    (prompt,) = prompts_of(asked, 1)
    rows = [TokenPrompt(id=f"row {i}", ids=prompt.ids) for i in range(count)]
    drawn = torch.tensor([r.response_ids[0] for r in asked.respond(rows, settings)])
    with torch.no_grad():
        logits_V = loaded.model(torch.tensor([prompt.ids])).logits[0, -1, : asked.vocab_size]
    top = (logits_V / settings.temperature).topk(settings.top_k)
    p_K = top.values.softmax(0)
    kept_K = p_K.cumsum(0) - p_K < settings.top_p
    p_K, ids_K = p_K[kept_K] / p_K[kept_K].sum(), top.indices[kept_K]
    seen_K = (drawn[:, None] == ids_K).sum(0)
    assert seen_K.sum() == count, "nothing outside the nucleus"
    chi2 = ((seen_K - count * p_K) ** 2 / (count * p_K)).sum()
    freedom = len(ids_K) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


def test_it_says_at_which_stop_string_it_stopped(asked: ServedSampler) -> None:
    prompts, settings = prompts_of(asked), Sampling(max_new_tokens=12, temperature=0.0)
    word = next(
        text
        for r in asked.respond(prompts[:1], settings)
        for text in (asked.tokenizer.decode([token]) for token in r.response_ids[2:])
        if isinstance(text, str) and text.isascii() and text.strip()
    )
    (stopped,) = asked.respond(prompts[:1], replace(settings, stop=(word,)))
    text = asked.tokenizer.decode(list(stopped.response_ids))
    assert stopped.stop == "stop" and isinstance(text, str) and word in text


def test_it_scores_given_tokens_as_a_teacher(tiny: TinyPair, url: str, loaded: Any) -> None:
    """The likeliest tokens of every position, one request each: those of the model here, and where likely the label."""
    k, ids = 8, torch.randint(3, 290, (2, 14), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        Response(prompt_id=f"p{i}", author="data", prompt_ids=tuple(r[:4]), response_ids=tuple(r[4:]), stop="length")
        for i, r in enumerate(ids)
    ]
    batch = collate(rows, range(2), pad_id=0)
    where = OnServer(base_url=url, model="tiny", retries=0, timeout_s=60.0)
    teacher = where.open(TeacherModel(model=str(tiny.teacher)), device=torch.device("cpu"), progress=None)
    teacher.support_k = k
    teacher.reach()
    said = teacher.signal(batch)
    assert isinstance(said, TopKSignal)
    with torch.no_grad():
        logits_BTV = loaded.model(batch.input_ids_BT).logits[..., : teacher.vocabulary.vocab_size]
    log_p_NV = logits_BTV[batch.loss_mask_BT].log_softmax(-1)
    torch.testing.assert_close(said.logp_NK, log_p_NV.gather(1, said.ids_NK), rtol=0, atol=0.05)
    best_NK = log_p_NV.topk(k).indices
    assert (said.ids_NK.sort(1).values == best_NK.sort(1).values).float().mean() > 0.9
    assert (said.logp_NK.exp().sum(1) < 1).all(), "normalised over the whole vocabulary"
