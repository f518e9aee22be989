"""Teacher and student with different tokens: the student learns from text, and nothing else is asked of the teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from limbeck.models.doctor import doctor
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.types import LimbeckError
from tests.limbeck_command import CommandServer
from tests.tiny_pair import CHATML, TinyPair, questions, write_model, write_prompts

ALONE = {"objective": {"name": "ce", "temperature": 1.0}, "teacher": {"cache": False}}
GROUPS = ["rouge", "nll", "diversity", "cost"]


@pytest.fixture(scope="module")
def foreigner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with other tokens and another way to open a turn."""
    folder = write_model(
        tmp_path_factory.mktemp("foreigner") / "student", layers=2, seed=3, extra=["zebra quartz " * 50]
    )
    asked = CHATML.replace("'<|im_start|>' +", "'<|im_start|>The ' +").replace(">assistant", ">The assistant")
    (folder / "chat_template.jinja").write_text(asked, "utf-8")
    return folder


def tree_of(tiny: TinyPair, student: Path, out: Path, **sections: Any) -> dict[str, Any]:
    groups: dict[str, Any] = {name: {} for name in GROUPS} | {"diversity": {"samples": 2, "prompts": 2}}
    groups["cost"] = {"prompt_tokens": 16, "new_tokens": 4, "repeats": 2}
    evaluate = {"groups": groups, "max_new_tokens": 8, "samples": 2}
    whole = (
        {"student": {"init": "pretrained", "model": str(student), "layers": None}, "evaluate": evaluate}
        | ALONE
        | sections
    )
    return tiny.tree(out, **whole)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("sft", [None, {"num_train_epochs": 1.0}])
def test_seqkd_learns_the_teachers_text_in_the_students_tokens(
    tiny: TinyPair, foreigner: Path, tmp_path: Path, sft: dict[str, Any] | None
) -> None:
    run = tmp_path / "run"
    tree = tree_of(tiny, foreigner, run) | ({"sft": sft} if sft else {})
    run_pipeline(load_recipe(tree), stages=STAGES)
    theirs, own = AutoTokenizer.from_pretrained(tiny.teacher), AutoTokenizer.from_pretrained(foreigner)
    said = {}
    for batch in sorted((run / "responses" / "batches").glob("*.jsonl")):
        for row in lines(batch):
            said[row["prompt_id"]] = (theirs.decode(row["response_ids"], skip_special_tokens=True).strip(), row["stop"])
    rows = lines(run / "responses" / "teacher.jsonl")
    assert {row["prompt_id"] for row in rows} == set(said)
    for row in rows:
        text, stop = said[row["prompt_id"]]
        assert own.decode(row["prompt_ids"]).startswith("<|im_start|>The user\n")
        assert row["author"] == "teacher" and len(row["response_ids"]) <= 12
        if row["stop"] == "eos":
            assert stop == "eos" and own.decode(row["response_ids"]) == f"{text}<|im_end|>"
        else:
            assert own.eos_token_id not in row["response_ids"]
            assert text.encode().startswith(own.decode(row["response_ids"]).rstrip("\ufffd").encode())
    assert {row["stop"] for row in rows} == {"eos", "length"}
    record = json.loads((run / "stages" / "respond.json").read_text("utf-8"))
    assert record["tokens_of"] == "student" and record["left_out"] == 0
    assert not list((run / "signal").glob("*"))

    scores = json.loads((run / "scores.json").read_text("utf-8"))
    assert scores["after"]["nll"]["mean"] < scores["before"]["nll"]["mean"]
    assert {"rouge_l", "distinct_2@T=1", "nll"} <= scores["after"].keys()
    detail = json.loads((run / "scores" / "after.nll.json").read_text("utf-8"))["detail"]
    assert detail["bytes"] > 0 and detail["bits_per_byte"] > 0
    saved = AutoTokenizer.from_pretrained(run / "student")
    assert saved.get_vocab() == own.get_vocab() and saved.chat_template == own.chat_template


def test_sft_on_data_reads_the_students_tokens_alone(tiny: TinyPair, foreigner: Path, tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "p.jsonl", [{"prompt": q, "completion": f"Well, {q}"} for q in questions()])
    sections = {"prompts": {"source": str(source)}, "responses": {"source": "data", "max_new_tokens": 40}}
    tree = tree_of(tiny, foreigner, tmp_path / "run", **sections)
    tree["evaluate"] = {"groups": {"nll": {"whose": "references"}}, "max_new_tokens": 40}
    run_pipeline(load_recipe(tree), stages=STAGES)
    own = AutoTokenizer.from_pretrained(foreigner)
    for row in lines(tmp_path / "run" / "responses" / "data.jsonl"):
        assert own.decode(row["response_ids"]).startswith("Well, ") and row["stop"] == "eos"
    scores = json.loads((tmp_path / "run" / "scores.json").read_text("utf-8"))
    assert scores["after"]["nll"]["mean"] < scores["before"]["nll"]["mean"]


def test_what_asks_for_the_teachers_distributions_is_refused_with_every_key(
    limbeck: CommandServer, tiny: TinyPair, foreigner: Path, tmp_path: Path
) -> None:
    student = f"student={{init: pretrained, model: {foreigner}}}"
    recipe = tiny.recipe(
        tmp_path / "run", sft={"objective": {"name": "fkl"}}, evaluate={"groups": ["fidelity", "rouge"]}
    )
    refused = limbeck.run("run", recipe, student, "responses.source=mixed")
    assert refused.code == 2
    keys = (
        "responses.source=teacher",
        "objective={name: ce}",
        "sft.objective={name: ce}",
        "teacher.cache=false",
        "evaluate.groups=[rouge, nll]",
    )
    for key in keys:
        assert key in refused.error_line
    assert "family" in refused.error_line and not (tmp_path / "run").exists()
    played = limbeck.run("run", recipe, student, *keys)
    assert played.code == 0, played.stderr


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("objective.name=fkl", "objective={name: ce}"),
        ("teacher.cache=true", "teacher.cache=false"),
        ("evaluate.groups=[speculation]", "evaluate.groups=[rouge, nll]"),
    ],
)
def test_each_is_refused_alone(tiny: TinyPair, foreigner: Path, tmp_path: Path, override: str, key: str) -> None:
    recipe = load_recipe(tree_of(tiny, foreigner, tmp_path / "run"), [override])
    with pytest.raises(LimbeckError, match="learns from text alone") as caught:
        run_pipeline(recipe, stages=STAGES)
    assert f"alone: set {key}, or choose" in str(caught.value)


def test_where_tokens_agree_nothing_is_read_anew(tiny: TinyPair, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_pipeline(load_recipe(tiny.tree(run, **ALONE)), stages=STAGES, until="respond")
    by_batch = {r["prompt_id"]: r for path in (run / "responses/batches").glob("*.jsonl") for r in lines(path)}
    assert all(by_batch[row["prompt_id"]] == row for row in lines(run / "responses" / "teacher.jsonl"))
    assert "tokens_of" not in json.loads((run / "stages" / "respond.json").read_text("utf-8"))


def test_another_template_of_the_student_makes_other_responses(tiny: TinyPair, foreigner: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(foreigner, student)
    tree = tree_of(tiny, student, tmp_path / "run")
    run_pipeline(load_recipe(tree), stages=STAGES, until="respond")
    (student / "chat_template.jinja").write_text(CHATML, "utf-8")
    with pytest.raises(LimbeckError, match="the inputs of its stage respond have changed"):
        run_pipeline(load_recipe(tree), stages=STAGES, until="respond")


def test_doctor_says_what_is_possible(limbeck: CommandServer, tiny: TinyPair, foreigner: Path) -> None:
    found = limbeck.run("doctor", tiny.teacher, foreigner)
    said = " ".join(found.stdout.split())
    assert "from text alone (sft, and seqkd with teacher.cache=false) the student learns" in said
    assert "rouge, diversity, judge, tasks, cost and nll measure such a pair" in said
    assert not doctor(str(tiny.teacher), str(foreigner)).distillable
