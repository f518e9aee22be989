"""llama.cpp's own server as a judge that is read by its letters: the probabilities of the same model here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.evaluation.judge.questions import AnswerPair, questions_of
from limbeck.models.loading import load_model
from tests.limbeck_command import CommandServer
from tests.models.tiny import save_gguf
from tests.sampling.served.llama_cpp import llama_cpp
from tests.tiny_pair import TinyPair, write_model, write_prompts

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp's server comes with xllamacpp: see extra dev"
)


def ids_of(loaded: Any, question: str) -> torch.Tensor:
    turns = [{"role": "user", "content": question}]
    text = loaded.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return torch.tensor([loaded.tokenizer(text)["input_ids"]])


def letters(loaded: Any) -> list[int]:
    return [loaded.tokenizer.convert_tokens_to_ids(letter) for letter in "AB"]


def judge_of_letters(folder: Path) -> Any:
    """A model that says A or B to whatever it is asked, with a leaning that the question decides."""
    loaded: Any = load_model(str(write_model(folder, window=2048, seed=5)))
    a, b = letters(loaded)
    with torch.no_grad():
        # A part of the residual stream that nothing writes to and that is the same everywhere: a bias for the head.
        loaded.model.get_input_embeddings().weight[:, 0] = 4.0
        for name, weight in loaded.model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[0] = 0.0
        embedding_VD = loaded.model.get_input_embeddings().weight
        head_VD = torch.zeros_like(embedding_VD)
        head_VD[a], head_VD[b] = embedding_VD[a] / 2, -embedding_VD[a] / 2
        head_VD[[a, b], 0] = 40.0
        # Not tied to the embeddings any more.
        loaded.model.get_output_embeddings().weight = torch.nn.Parameter(head_VD)
    return loaded


def p_of_letters(loaded: Any, question: str) -> dict[str, float]:
    with torch.no_grad():
        p_V = loaded.model(ids_of(loaded, question)).logits[0, -1].double().softmax(0)
    return {letter: p_V[place].item() for letter, place in zip("AB", letters(loaded), strict=True)}


def test_the_probabilities_are_those_of_the_model(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    loaded = judge_of_letters(tmp_path / "judge")
    rows = [{"prompt": f"What is {i}?", "completion": "It is a number. " * (1 + i % 3)} for i in range(8)]
    prompts = write_prompts(tmp_path / "prompts.jsonl", rows)
    gguf = save_gguf(tmp_path / "judge.gguf", loaded.model, tokenizer=loaded.tokenizer)
    options = ("against=references", "verdict=logprobs", "concurrency=1", "timeout_s=60.0")
    with llama_cpp(gguf, n_ctx=4096, n_parallel=1) as url:
        end = limbeck.run(
            *("evaluate", str(tiny.teacher), "--prompts", str(prompts), f"output_dir={tmp_path / 'run'}"),
            *("evaluate.max_new_tokens=6", "evaluate.groups=[judge]"),
            *(f"evaluate.groups.judge.{option}" for option in (*options, f"base_url={url}")),
        )
    assert end.code == 0, end.stderr
    scores = json.loads((tmp_path / "run/scores.json").read_text())["after"]
    pairs = [json.loads(line) for line in (tmp_path / "run/scores/after.judge.pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == len(rows)
    values = []
    for line in pairs:
        pair = AnswerPair(
            id=line["question_id"], request=line["prompt"], student=line["answer_1"], other=line["answer_2"]
        )
        ((one, two),) = questions_of([pair], "tiny", "logprobs")
        here = [p_of_letters(loaded, question.text) for question in (one, two)]
        for game, expected in enumerate(here, start=1):
            assert line[f"g{game}_probabilities"] == pytest.approx(expected, abs=2e-4)
        leaning = [p["A"] / (p["A"] + p["B"]) for p in here]
        values.append((leaning[0] + 1 - leaning[1]) / 2)
    assert scores["win_rate_references"]["n"] == len(rows)
    assert scores["win_rate_references"]["mean"] == pytest.approx(sum(values) / len(values), abs=2e-4)
    assert len({round(line["g1_probabilities"]["A"], 2) for line in pairs}) > 1, "the judge says the same of all"
