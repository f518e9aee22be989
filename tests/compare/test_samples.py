"""Answers of several arms to the same prompts: found by the prompt's id, each with the id of its response."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from limbeck.compare.page import write_comparison
from limbeck.types import AFTER_TRAINING, Author, Response
from tests.compare.compare_runs import write_arm_run


def address(prompt: str, author: Author) -> dict[str, Any]:
    response = Response(
        prompt_id=prompt, author=author, prompt_ids=(1,), response_ids=(2,), stop="eos", round=AFTER_TRAINING
    )
    return {"id": response.id, "author": author, "round": AFTER_TRAINING}


def line(prompt: str, text: str, after: str) -> str:
    responses = {"teacher": address(prompt, "teacher"), "after": address(prompt, "student")}
    sample = {"prompt_id": prompt, "prompt": text, "teacher": f"T {prompt}", "after": after, "responses": responses}
    return json.dumps(sample) + "\n"


def test_prompts_of_the_same_text_stay_apart_and_answers_are_addressed(tmp_path: Path) -> None:
    """Two prompts may read the same and differ in their tools; only their ids tell."""
    runs = [write_arm_run(tmp_path / name, objective=name, kl=kl) for name, kl in (("fkl", 0.5), ("rkl", 0.9))]
    for run in runs:
        text = "".join(line(prompt, "What is the time?", f"{run.name} {prompt}") for prompt in ("p1", "p2"))
        (run / "samples.jsonl").write_text(text, "utf-8")
    page = write_comparison(runs, tmp_path / "compare.html", title="x").read_text("utf-8")
    assert all(f"{run.name} {prompt}" in page and f"T {prompt}" in page for run in runs for prompt in ("p1", "p2"))
    for prompt in ("p1", "p2"):
        assert page.count(f'data-response="{address(prompt, "student")["id"]}"') == 2
        assert page.count(f'data-response="{address(prompt, "teacher")["id"]}"') == 1
