"""Recipes in which a small model drafts the teacher's answers, through the real command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.limbeck_command import CommandServer
from tests.pipeline.test_bad_input import refused
from tests.tiny_pair import TinyPair, write_model


def said(run: Path) -> list[list[int]]:
    lines = (run / "responses" / "teacher.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["response_ids"] for line in lines]


def manifest(run: Path) -> dict[str, Any]:
    path = run / "stages" / "respond.json"
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block fewer than the teacher, weights of its own, a padded head."""
    return write_model(tmp_path_factory.mktemp("draft") / "model", layers=2, seed=5, head_rows=320)


def test_greedy_answers_are_the_teachers_and_the_draft_is_counted(
    limbeck: CommandServer, tiny: TinyPair, draft: Path, tmp_path: Path
) -> None:
    greedy = {"temperature": 0.0}
    alone = limbeck.run("respond", tiny.recipe(tmp_path / "alone", responses=greedy))
    drafted = limbeck.run(
        "respond", tiny.recipe(tmp_path / "drafted", responses=greedy | {"draft": {"model": str(draft)}})
    )
    assert alone.code == 0 and drafted.code == 0, drafted.stderr
    assert said(tmp_path / "drafted") == said(tmp_path / "alone")
    record = manifest(tmp_path / "drafted")
    counts = record["draft"]
    assert (counts["model"], counts["tokens"]) == (str(draft), 4)
    assert 0 < counts["rounds"] <= record["tokens"]
    assert counts["drafted"] >= counts["accepted"] + counts["rejected"] > 0
    assert "draft" not in manifest(tmp_path / "alone")


def test_a_run_trains_on_drafted_answers_and_their_captured_signal(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path
) -> None:
    first, run = tmp_path / "first", tmp_path / "run"
    assert limbeck.run("train", tiny.recipe(first, train={"max_steps": 2})).code == 0
    section = {"draft": {"model": str(first / "student"), "tokens": 3}}
    finished = limbeck.run("run", tiny.recipe(run, responses=section, train={"max_steps": 2}))
    assert finished.code == 0, finished.stderr
    assert manifest(run)["draft"]["accepted"] > 0
    assert list((run / "signal").glob("0*.safetensors")) and (run / "report.html").exists()


def test_what_cannot_be_drafted_is_refused_before_anything_is_written(
    limbeck: CommandServer, tiny: TinyPair, draft: Path, tmp_path: Path
) -> None:
    run, section = tmp_path / "run", {"draft": {"model": str(draft)}}
    strange = write_model(tmp_path / "strange", extra=["zebra quartz " * 50, "jumbo vizier " * 50])
    refused(
        limbeck.run("run", tiny.recipe(run, responses={"draft": {"model": str(strange)}})),
        "responses.draft.model",
        "ids name different tokens",
    )
    refused(
        limbeck.run("run", tiny.recipe(run, responses=section | {"source": "data"})), "responses.draft", "of the data"
    )
    server = {"server": {"base_url": "http://localhost:9/v1"}}
    refused(limbeck.run("run", tiny.recipe(run, responses=section | server)), "responses.draft", "responses.server")
    refused(
        limbeck.run("run", tiny.recipe(run, responses={"draft": {"model": str(draft), "tokens": 0}})),
        "responses.draft.tokens",
    )
    refused(limbeck.run("run", tiny.recipe(run, responses={"draft": {"model": str(tmp_path / "no")}})), "no")
    assert not run.exists()
