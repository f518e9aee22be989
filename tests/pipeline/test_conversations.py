"""Conversations from the data to the scores: every turn of the assistant is trained on, judged and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.runtime.console import PlainConsole
from limbeck.types import LimbeckError
from tests.tiny_pair import TOPICS, TinyPair, write_prompts


def conversations() -> list[dict[str, Any]]:
    """Two rounds about every topic, with a column that nobody reads."""
    rows = []
    for topic in TOPICS:
        said = [f"What is {topic}?", f"{topic} is a thing.", f"Is {topic} old?", f"Yes, {topic} is."]
        roles = ["user", "assistant"] * 2
        turns = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
        rows.append({"messages": [{"role": "system", "content": "Be kind."}, *turns], "mood": "calm"})
    return rows


def played(tiny: TinyPair, out: Path, verb: str | None = None, **prompts: Any) -> Path:
    source = write_prompts(out.with_suffix(".jsonl"), conversations())
    tree = tiny.tree(
        out,
        prompts={"source": str(source), "eval_fraction": 0.34, **prompts},
        responses={"source": "data", "max_new_tokens": 24},
        train={"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "compile": "off"},
        evaluate={"groups": {"fidelity": {"whose": ["responses", "references"]}}, "max_new_tokens": 16},
    )
    run_pipeline(load_recipe(tree), stages=STAGES, until=verb)
    return out


def learnt(row: dict[str, Any], tokenizer: Any) -> list[str]:
    spans = row.get("spans", [[0, len(row["response_ids"])]])
    return [tokenizer.decode(row["response_ids"][start:end]) for start, end in spans]


def test_all_turns_or_the_last_one(tiny: TinyPair, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
    for loss_on, expected in (("all", ["thing.", "is."]), ("last", ["is."])):
        run = played(tiny, tmp_path / loss_on, "respond", loss_on=loss_on)
        rows = [json.loads(line) for line in (run / "responses" / "data.jsonl").read_text("utf-8").splitlines()]
        assert len(rows) == len(TOPICS)
        for row in rows:
            parts = learnt(row, tokenizer)
            assert [part.removesuffix("<|im_end|>").split()[-1] for part in parts] == expected
            assert all(part.endswith("<|im_end|>") for part in parts)
        record = json.loads((run / "stages" / "respond.json").read_text("utf-8"))
        assert record["tokens"] == sum(
            len(tokenizer(part)["input_ids"]) for row in rows for part in learnt(row, tokenizer)
        )
    manifest = json.loads((run / "stages" / "prompts.json").read_text("utf-8"))
    assert manifest["unread_columns"] == {"mood": len(TOPICS)}


def test_the_teachers_likelihood_is_that_of_the_assistants_tokens(tiny: TinyPair, tmp_path: Path) -> None:
    """Against plain transformers: hidden states on disk, batches and evaluation see the same tokens."""
    run = played(tiny, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tiny.teacher)
    total, count = 0.0, 0
    for line in (run / "responses" / "data.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["split"] != "heldout":
            continue
        ids, first = row["prompt_ids"] + row["response_ids"], len(row["prompt_ids"])
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for start, end in row["spans"]:
            for place in range(first + start, first + end):
                total -= logp[place - 1, ids[place]].item()
                count += 1
    scores = json.loads((run / "scores.json").read_text("utf-8"))
    for name in ("teacher_nll", "teacher_nll@references"):
        assert scores["after"][name]["mean"] == pytest.approx(total / count, rel=1e-4)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert steps[-1]["step"] == 4


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not(tiny: TinyPair, tmp_path: Path) -> None:
    from limbeck.types import Interrupted

    whole = played(tiny, tmp_path / "whole", "train")
    source = tmp_path / "whole.jsonl"
    tree = tiny.tree(
        tmp_path / "halved",
        prompts={"source": str(source), "eval_fraction": 0.34},
        responses={"source": "data", "max_new_tokens": 24},
        train={"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "compile": "off"},
        evaluate={"groups": {"fidelity": {"whose": ["responses", "references"]}}, "max_new_tokens": 16},
    )
    with pytest.raises(Interrupted):
        run_pipeline(load_recipe(tree), stages=STAGES, until="train", pause_at=0.5)
    run_pipeline(load_recipe(tree), stages=STAGES, until="train")
    for name in ("student/model.safetensors", "responses/data.jsonl"):
        assert (whole / name).read_bytes() == (tmp_path / "halved" / name).read_bytes()


def test_a_teacher_answers_the_last_turn_and_that_is_said(
    tiny: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_prompts(tmp_path / "p.jsonl", conversations())
    tree = tiny.tree(tmp_path / "run", prompts={"source": str(source), "eval_fraction": 0.34})
    run_pipeline(load_recipe(tree), stages=STAGES, until="respond", console=PlainConsole())
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "responses" / "teacher.jsonl").read_text("utf-8").splitlines()
    ]
    assert all("spans" not in row for row in rows)
    said = "".join(capsys.readouterr())
    assert "12 prompts are conversations" in " ".join(said.split()) and "mood" in said


def test_columns_of_other_methods_stop_the_run(tiny: TinyPair, tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "p.jsonl", [{"prompt": f"Say {i}.", "images": ["a.png"]} for i in range(9)])
    tree = tiny.tree(tmp_path / "run", prompts={"source": str(source)})
    with pytest.raises(LimbeckError, match=r"line 1: the column 'images' .*prompts.ignore_columns=\[images\]"):
        run_pipeline(load_recipe(tree), stages=STAGES, until="prompts")
    tree["prompts"]["ignore_columns"] = ["images"]
    run_pipeline(load_recipe(tree), stages=STAGES, until="prompts", update=True)
