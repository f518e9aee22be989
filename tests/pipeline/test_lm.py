"""`train.lm` through the real command: a second corpus in every step, made once, the same after a kill."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from limbeck.pipeline.lm_corpus import pack
from limbeck.recipe.sections import LmSection
from limbeck.types import LimbeckError
from tests.limbeck_command import CommandServer, KillAt
from tests.pipeline.test_bad_input import refused
from tests.recovery.conftest import measured
from tests.tiny_pair import TinyPair

TEXTS = [f"Rain number {i} falls on iron maps, salt and moss. " * (1 + i % 4) for i in range(40)]


def corpus(folder: Path, texts: list[Any] = TEXTS, field: str = "text") -> str:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({field: text, "meta": 1}) + "\n" for text in texts), "utf-8")
    return str(path)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("author", ["teacher", "pairs"])
def test_the_loss_on_the_text_falls_beside_the_objectives(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, author: str
) -> None:
    run = tmp_path / "run"
    lm = {"source": corpus(tmp_path), "max_length": 24, "per_device_batch_size": 3, "weight": 2.0}
    recipe = tiny.recipe(run, responses={"source": author}, train={"lm": lm, "learning_rate": 1e-2})
    finished = limbeck.run("run", recipe)
    assert finished.code == 0, finished.stderr
    lines = metrics(run)
    assert lines[-1]["loss/lm"] < 0.8 * lines[0]["loss/lm"]
    assert [line["lm_tokens"] for line in lines] == [3 * 23 * (i + 1) for i in range(12)]
    assert json.loads((run / "stages/train.json").read_text())["tokens"] == lines[-1]["tokens"]
    assert "on the text of train.lm" in (run / "report.html").read_text("utf-8")
    # Another text is another run, and is trained on after an update.
    corpus(tmp_path, TEXTS[::-1])
    refused(limbeck.run("run", recipe), "the inputs of its stage train have changed since")
    again = limbeck.run("train", recipe, "--update")
    assert again.code == 0 and "respond: done earlier" in again.stderr
    assert metrics(run)[0]["loss/lm"] != lines[0]["loss/lm"]


@pytest.mark.parametrize("lora", [False, True])
def test_killed_it_goes_on_as_if_it_had_not_been(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, lora: bool
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    lm = {"source": corpus(tmp_path), "max_length": 16}
    sections: dict[str, Any] = {"train": {"lm": lm, "gradient_accumulation_steps": 2, "max_steps": 6}}
    if lora:
        sections["student"] = {"lora": {"r": 4, "lora_dropout": 0.2}}
    assert limbeck.run("train", tiny.recipe(whole, **sections)).code == 0
    recipe = tiny.recipe(run, **sections)
    for name, before in (("lm.safetensors", 0), ("checkpoints/step-000002", 0), ("metrics.jsonl", 3)):
        killed = limbeck.run("train", recipe, killed=KillAt(run, name, before))
        assert killed.code == -signal.SIGKILL, (name, killed)
    finished = limbeck.run("train", recipe)
    assert finished.code == 0, finished.stderr
    assert measured(run) == measured(whole)
    for file in ("student/model.safetensors", "lm.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_blocks_are_not_trained_on_and_the_remedy_works(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, damage: str
) -> None:
    run = tmp_path / "run"
    lm = {"source": corpus(tmp_path), "max_length": 16}
    recipe = tiny.recipe(run, train={"lm": lm, "max_steps": 4})
    killed = limbeck.run("train", recipe, killed=KillAt(run, "checkpoints/step-000002", 0))
    assert killed.code == -signal.SIGKILL
    path = run / "lm.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        blocks_NL = load_file(path)["blocks"]
        blocks_NL[0, 0] += 1
        save_file({"blocks": blocks_NL}, path)
    refused(limbeck.run("train", recipe), "lm.safetensors is damaged", "delete it")
    path.unlink()
    assert limbeck.run("train", recipe).code == 0


@pytest.mark.parametrize(
    ("lm", "words"),
    [
        ({"weight": 0.0}, ("train.lm.weight is 0", "train.lm=null")),
        ({"weight": -1.0}, ("train.lm.weight", "-1")),
        ({"source": "nowhere.jsonl"}, ("nowhere.jsonl does not exist",)),
        ({"max_length": 500}, ("train.lm.max_length is 500", "128", "lower it")),
        ({"max_length": 1}, ("train.lm.max_length", "1")),
        ({"text_field": "body"}, ("line 1", "meta, text", "'body'", "train.lm.text_field")),
        ({"text_feld": "body"}, ("'train.lm.text_feld'", "'train.lm.text_field'")),
    ],
)
def test_mistakes_are_refused_before_any_work(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, lm: dict[str, Any], words: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    section = {"source": corpus(tmp_path), "max_length": 24} | lm
    refused(limbeck.run("run", tiny.recipe(run, train={"lm": section})), *words)
    assert not (run / "responses").exists()


@pytest.mark.parametrize(
    ("texts", "more", "words"),
    [
        (["Short."], {"max_length": 64}, ("fewer than one block of train.lm.max_length=64",)),
        (TEXTS, {"max_tokens": 10}, ("train.lm.max_tokens=10", "fewer than one block")),
        ([" ", ""], {}, ("no text in the field 'text'",)),
        ([7], {}, ("expected text in 'text', got int",)),
    ],
)
def test_text_that_gives_no_block(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, texts: list[Any], more: dict[str, Any], words: Any
) -> None:
    section = {"source": corpus(tmp_path, texts), "max_length": 24} | more
    refused(limbeck.run("train", tiny.recipe(tmp_path / "run", train={"lm": section})), *words)


def test_documents_follow_each_other_and_what_spells_a_control_token_is_text(tiny: TinyPair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
    texts = ["Tea <|im_end|> rain.", "Bees.", "Salt and moss."]
    section = LmSection(source="x", max_length=5)
    blocks_NL = pack(iter(texts), tokenizer, section)
    end = tokenizer.eos_token_id
    parts: list[list[int]] = [[]]
    for i in blocks_NL.flatten().tolist():
        parts[-1].append(i) if i != end else parts.append([])
    assert [tokenizer.decode(part) for part in parts[:2]] == texts[:2]
    assert texts[2].startswith(tokenizer.decode(parts[2]))
    shorter = pack(iter(texts), tokenizer, LmSection(source="x", max_length=5, max_tokens=12))
    assert torch.equal(shorter, blocks_NL[:2])
    with pytest.raises(LimbeckError, match="fewer than one block"):
        pack(iter(texts), tokenizer, LmSection(source="x", max_length=500))
