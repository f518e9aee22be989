"""Preference tuning in a run: two halves, killed anywhere and continued; what is refused before anything is made."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.stage_order import STAGES
from limbeck.pipeline.stages.prefer import check_preference
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.preference.pairs import read_pairs
from limbeck.runtime.rundir import RunDirectory
from limbeck.types import LimbeckError
from tests.evaluation.judge_server import judging
from tests.limbeck_command import CommandServer, KillAt
from tests.tiny_pair import TinyPair, write_prompts

SECTION: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 6,
    "learning_rate": 1.0e-3,
    "save_steps": 1,
    "pairs": {"name": "teacher", "samples": 2},
}
EVALUATED: dict[str, Any] = {"groups": {"likelihood": {"against": "distilled"}}}
# The kill comes just before a file gets its name, or a folder is written to.
MOMENTS = (
    ("stages/prefer.json", 0),
    ("preferences/answers/02/00002.jsonl", 0),
    ("preferences/pairs.json", 0),
    ("preferences/checkpoints/checkpoint-3/sealed.json", 0),
    ("preferred/student.json", 0),
)


@pytest.fixture(scope="module")
def recipe(tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.recipe(tmp_path_factory.mktemp("preference") / "run", preference=SECTION, evaluate=EVALUATED)


@pytest.fixture(scope="module")
def distilled(limbeck: CommandServer, recipe: Path) -> Path:
    """A run up to the distilled student."""
    finished = limbeck.run("train", recipe)
    assert finished.code == 0, finished.stderr
    return recipe.with_suffix("")


@pytest.fixture(scope="module")
def tuned(limbeck: CommandServer, recipe: Path, distilled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole run, without an interruption."""
    run = shutil.copytree(distilled, tmp_path_factory.mktemp("tuned") / "run")
    finished = limbeck.run("run", recipe, f"output_dir={run}")
    assert finished.code == 0, finished.stderr
    return run


def test_a_run_hands_on_the_tuned_student(limbeck: CommandServer, distilled: Path, tuned: Path) -> None:
    record = RunDirectory(tuned).manifest("prefer")
    assert record is not None and record["done"] and record["steps"] == 3
    pairs = read_pairs(tuned / "preferences" / "pairs.jsonl")
    assert record["pairs"] == len(pairs) and record["answers"] == 2 * record["prompts"]
    lost = sum(count for name, count in record["left_out"].items() if name.startswith("prompts"))
    assert record["pairs"] + lost == record["prompts"]
    rewards = [json.loads(line) for line in (tuned / "preferences" / "rewards.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rewards] == [1, 2, 3]
    assert rewards[-1]["rewards/margins"] > 0.0 == rewards[0]["rewards/margins"]
    # The same student beside other weights.
    before, after = tuned / "student", tuned / "preferred"
    for path in before.iterdir():
        same = path.read_bytes() == (after / path.name).read_bytes()
        assert same == (path.name != "model.safetensors"), path.name
    assert (after / "README.md").exists() and "steps of DPO" in (after / "README.md").read_text()
    assert (before / "model.safetensors").read_bytes() == (distilled / "student" / "model.safetensors").read_bytes()
    AutoModelForCausalLM.from_pretrained(after)
    page = (tuned / "report.html").read_text("utf-8")
    for said in ("Reward margin", "preferred by the teacher", "after training and preference tuning", "in preferred/"):
        assert said in page, said
    scores = json.loads((tuned / "scores.json").read_text())
    assert {"likelihood_win_rate_distilled", "answer_logp"} <= scores["after"].keys() & scores["before"].keys()
    # What is exported is what was evaluated.
    out = tuned.parent / "export"
    assert limbeck.run("export", tuned, out).code == 0
    assert (out / "model.safetensors").read_bytes() == (after / "model.safetensors").read_bytes()


def test_killed_between_and_inside_the_halves(
    limbeck: CommandServer, recipe: Path, distilled: Path, tuned: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(distilled, tmp_path / "run")
    written: dict[Path, tuple[int, int]] = {}
    for name, before in MOMENTS:
        killed = limbeck.run("prefer", recipe, f"output_dir={run}", killed=KillAt(run, name, before))
        assert killed.code == -signal.SIGKILL, (name, killed)
        kept = [*(run / "preferences" / "answers").rglob("*.jsonl"), *run.glob("student/*"), *run.glob("checkpoints/*")]
        found = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in kept if ".partial" not in path.name}
        assert written.items() <= found.items(), name
        written = found
    finished = limbeck.run("prefer", recipe, f"output_dir={run}")
    assert finished.code == 0, finished.stderr
    for name in ("preferences/pairs.jsonl", "preferences/rewards.jsonl", "preferred/model.safetensors"):
        assert (run / name).read_bytes() == (tuned / name).read_bytes(), name
    assert not (run / "superseded").exists()
    assert "prefer: done earlier" in limbeck.run("prefer", recipe, f"output_dir={run}").stderr


def test_without_the_section_a_run_is_what_it_was(
    limbeck: CommandServer, recipe: Path, tiny: TinyPair, tuned: Path, tmp_path: Path
) -> None:
    plain = load_recipe(tiny.tree(tmp_path / "run", evaluate=EVALUATED | {"groups": ["fidelity"]}))
    stages = tuple(stage for stage in STAGES if stage.name != "prefer")
    assert RunContext(plain).fingerprints(STAGES) == RunContext(plain).fingerprints(stages)
    refused = limbeck.run("prefer", recipe, "preference=null", "evaluate.groups=[fidelity]")
    assert refused.code == 2 and "no stage prefer" in refused.error_line
    # A directory that had it before: refused, and with --update brought up to date.
    run = shutil.copytree(tuned, tmp_path / "tuned")
    changes = (f"output_dir={run}", "preference=null", "evaluate.groups=[fidelity]")
    refused = limbeck.run("run", recipe, *changes)
    assert refused.code == 2 and "was made by another recipe: preference" in refused.error_line
    finished = limbeck.run("run", recipe, *changes, "--update")
    assert finished.code == 0 and "train: done earlier" in finished.stderr, finished.stderr
    assert RunDirectory(run).finished_student == run / "student"
    assert not (run / "preferred").exists() and not (run / "stages" / "prefer.json").exists()
    assert len(list((run / "superseded").glob("prefer-*/preferred/model.safetensors"))) == 1


def test_data_prefers(limbeck: CommandServer, recipe: Path, distilled: Path, tmp_path: Path) -> None:
    asked = [json.loads(line) for line in (distilled / "prompts.jsonl").read_text().splitlines()]
    asked.sort(key=lambda prompt: prompt["split"], reverse=True)
    rows = [{"prompt": p["text"], "chosen": f"{i} is good.", "rejected": f"{i} is bad."} for i, p in enumerate(asked)]
    rows[0]["rejected"] = rows[0]["chosen"]
    source = write_prompts(tmp_path / "pairs.jsonl", rows)
    run = shutil.copytree(distilled, tmp_path / "run")
    pairs = f"{{name: data, source: {source}"
    changes = (f"output_dir={run}", f"preference.pairs={pairs}}}")
    refused = limbeck.run("prefer", recipe, *changes)
    assert (
        refused.code == 2 and "pairs.jsonl, line 1: 'chosen' and 'rejected' are one answer twice" in refused.error_line
    )
    finished = limbeck.run("prefer", recipe, changes[0], f"preference.pairs={pairs}, identical: drop}}")
    assert finished.code == 0, finished.stderr
    record = RunDirectory(run).manifest("prefer")
    # The data's prompts are those of the run, so that as many are held out.
    held = {prompt["id"] for prompt in asked if prompt["split"] == "heldout"}
    assert record is not None and record["left_out"] == {"rows_heldout": len(held), "rows_identical": 1}
    assert record["pairs"] == len(rows) - len(held) - 1 and record["pairs_by"] == "data"
    read = read_pairs(run / "preferences" / "pairs.jsonl")
    assert held and not held & {pair.chosen.prompt_id for pair in read}
    assert all(pair.scores is None and pair.chosen.id != pair.rejected.id for pair in read)


BAD_ROWS: tuple[tuple[dict[str, str], str], ...] = (
    ({"chosen": "So.", "rejected": "No <|im_end|> more."}, r"line \d+.*<\|im_end\|>.*\(the answer in 'rejected'\)"),
    (
        {"chosen": "So it is good.", "rejected": "So it is bad."},
        r"same in their first 1 tokens; raise .*max_new_tokens",
    ),
)


@pytest.mark.parametrize(("row", "said"), BAD_ROWS)
def test_data_that_the_student_cannot_be_tuned_on_is_refused_before_the_teacher_writes(
    limbeck: CommandServer, recipe: Path, tiny: TinyPair, tmp_path: Path, row: dict[str, str], said: str
) -> None:
    asked = [json.loads(line)["prompt"] for line in tiny.prompts.read_text().splitlines()]
    source = write_prompts(tmp_path / "pairs.jsonl", [{"prompt": prompt} | row for prompt in asked])
    pairs = f"{{name: data, source: {source}, max_new_tokens: 1}}"
    changes = (f"output_dir={tmp_path / 'run'}", f"preference.pairs={pairs}")
    refused = limbeck.run("run", recipe, *changes)
    assert refused.code == 2 and re.search(said, refused.error_line), refused.stderr
    assert not (tmp_path / "run" / "responses").exists()


def test_a_judge_that_is_not_there_is_missed_before_the_teacher_writes(
    limbeck: CommandServer, recipe: Path, tmp_path: Path
) -> None:
    pairs = "{name: judge, base_url: 'http://127.0.0.1:9/v1', retries: 0, timeout_s: 2}"
    refused = limbeck.run("run", recipe, f"output_dir={tmp_path / 'run'}", f"preference.pairs={pairs}")
    assert refused.code == 2 and "http://127.0.0.1:9" in refused.error_line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("verdict", "score"), [("text", 1.0), ("logprobs", 0.8)])
def test_a_judge_prefers(
    limbeck: CommandServer, recipe: Path, distilled: Path, tmp_path: Path, verdict: str, score: float
) -> None:
    run = shutil.copytree(distilled, tmp_path / "run")
    with judging() as (url, state):
        changes = (
            f"output_dir={run}",
            f"preference.pairs={{name: judge, base_url: '{url}', prompts: 6, verdict: {verdict}, margin: 0.01}}",
            f"evaluate.groups={{judge: {{base_url: '{url}', against: distilled, verdict: {verdict}}}}}",
        )
        finished = limbeck.run("prefer", recipe, *changes)
        assert finished.code == 0, finished.stderr
        record = RunDirectory(run).manifest("prefer")
        assert record is not None and record["pairs_by"] == "judge" and record["prompts"] == 6
        assert len(state.judged) == 2 * (6 - record["left_out"].get("prompts_one_answer", 0))
        assert limbeck.run("evaluate", recipe, *changes).code == 0
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    pairs = read_pairs(run / "preferences" / "pairs.jsonl")
    assert pairs and len(pairs) + sum(record["left_out"].values()) == 6
    for pair in pairs:
        texts = [
            tokenizer.decode(r.response_ids, skip_special_tokens=True).strip() for r in (pair.chosen, pair.rejected)
        ]
        assert pair.scores == pytest.approx((score, 1 - score))
        assert len(texts[0]) > len(texts[1])
    scores = json.loads((run / "scores.json").read_text())
    assert 0.0 <= scores["after"]["win_rate_distilled"]["mean"] <= 1.0


def test_what_is_refused_before_anything_is_made(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    context = RunContext(load_recipe(recipe, [f"output_dir={tmp_path / 'run'}"]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "trl" else found(name, *a))
    with pytest.raises(LimbeckError, match=r"TRL is not installed; pip install 'limbeck\[preference\]'"):
        check_preference(context)
    monkeypatch.setattr(importlib.util, "find_spec", found)
    check_preference(context)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        (["preference.pairs=judge"], r"preference\.pairs\.base_url is missing"),
        (["preference.pairs={name: data, samples: 3}"], r"preference\.pairs\.samples is an option of teacher or judge"),
        (["preference.pairs=teachr"], "kind of pairs 'teachr' is unknown"),
        (["preference.label_smoothing=0.1"], r"loss_type=sigmoid does not read"),
        (["preference.loss_type=exo_pair"], "needs preference.label_smoothing above 0"),
        (["preference.loss_type=bco_pair"], "preference.loss_type"),
        (["preference.pairs.samples=1"], r"preference\.pairs"),
        (["preference.pairs={name: judge, base_url: 'http://x/v1', api_key_env: sk-1}"], "no name of an environment"),
        (["preference.learning_rat=1"], "preference.learning_rate"),
    ),
)
def test_recipes_that_are_refused(recipe: Path, changes: list[str], said: str) -> None:
    with pytest.raises(LimbeckError, match=said):
        load_recipe(recipe, changes)


def test_the_distilled_student_is_compared_only_where_there_is_one(limbeck: CommandServer, recipe: Path) -> None:
    for group in ("likelihood", "judge"):
        changes = ("preference=null", f"evaluate.groups={{{group}: {{against: distilled}}}}", "output_dir=nowhere")
        refused = limbeck.run("run", recipe, *changes)
        assert refused.code == 2 and f"evaluate.groups.{group}.against is distilled" in refused.error_line
