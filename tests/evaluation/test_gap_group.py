"""What a student took in of what its teacher alone sees, and what other prompts lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.models.loading import load_model
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.prompts.templates import encode_responses
from limbeck.recipe.load import load_recipe
from limbeck.types import LimbeckError, Prompt
from tests.limbeck_command import CommandServer
from tests.tiny_pair import TinyPair, write_prompts

OTHERS = [{"prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}."} for i in range(6)]


def tree_of(tiny: TinyPair, run: Path, others: Path | None) -> dict[str, Any]:
    tree = tiny.tree(run, student={"init": "pretrained", "layers": None, "model": str(tiny.teacher)})
    tree["teacher"] = {"model": "base", "sees": {"name": "system", "text": "Be short."}}
    tree["objective"] = {"name": "fkl"}
    tree["evaluate"] = {"groups": {"fidelity": {}, "gap": {"others": None if others is None else str(others)}}}
    return tree


def surprise(folder: Path) -> list[float]:
    """Nats per token of the other answers, one after the other, by transformers' own logits."""
    loaded = load_model(folder)
    model: Any = loaded.model
    prompts = [Prompt(id=str(i), text=row["prompt"], completion=row["completion"]) for i, row in enumerate(OTHERS)]
    found = []
    for response in encode_responses(prompts, loaded.tokenizer):
        ids = torch.tensor([[*response.prompt_ids, *response.response_ids]])
        with torch.no_grad():
            logp_TV = model(ids).logits[0].double().log_softmax(-1)
        start = len(response.prompt_ids)
        own = logp_TV[start - 1 : -1].gather(1, ids[0, start:, None])
        found.append(float(-own.mean()))
    return found


def test_the_share_of_the_gap_and_what_other_answers_lost(tiny: TinyPair, tmp_path: Path) -> None:
    run, others = tmp_path / "run", write_prompts(tmp_path / "others.jsonl", OTHERS)
    run_pipeline(load_recipe(tree_of(tiny, run, others)), stages=STAGES)
    scores = json.loads((run / "scores.json").read_text("utf-8"))
    kl = {part: scores[part]["forward_kl"]["mean"] for part in ("before", "after")}
    found = scores["after"]["gap_recovered"]
    assert found["mean"] == pytest.approx(1 - kl["after"] / kl["before"], rel=1e-6) and found["mean"] > 0.02
    assert found["low"] < found["mean"] < found["high"]
    rows = [json.loads(line) for line in (run / "scores/after.gap@others.jsonl").read_text("utf-8").splitlines()]
    lost = [now - then for then, now in zip(surprise(tiny.teacher), surprise(run / "student"), strict=True)]
    assert sorted(row["nll_lost"] for row in rows) == pytest.approx(sorted(lost), abs=1e-4)
    assert scores["after"]["nll_lost@others"]["n"] == len(OTHERS)
    assert "Gap to the teacher recovered" in (run / "report.html").read_text("utf-8")


def test_other_prompts_without_answers_are_refused_before_any_stage(tiny: TinyPair, tmp_path: Path) -> None:
    for path, said in ((tiny.prompts, "has no"), (tmp_path / "absent.jsonl", "evaluate.groups.gap.others")):
        with pytest.raises(LimbeckError, match=said) as caught:
            run_pipeline(load_recipe(tree_of(tiny, tmp_path / "run", path)), stages=STAGES)
        assert "\n" not in str(caught.value) and not (tmp_path / "run/responses").exists()


def test_an_evaluation_on_its_own_has_no_student_before(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    named = ("--teacher", tiny.teacher, "--prompts", tiny.prompts, "evaluate.groups=[gap]")
    finished = limbeck.run("evaluate", tiny.teacher, *named, f"output_dir={tmp_path}/alone")
    assert finished.code == 2 and "no student before" in finished.error_line
