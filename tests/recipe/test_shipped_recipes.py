"""Every shipped recipe plays to its end on a tiny pair: only sizes are changed, never who writes or what is judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.evaluation.sandbox import jail
from limbeck.recipe.load import shipped_recipes
from tests.limbeck_command import CommandServer
from tests.tiny_pair import TinyPair, write_model, write_prompts
from tests.tiny_vision import write_questions, write_vision_model

SMALL = (
    "student.init=depth_prune",
    "student.layers=2",
    "prompts.eval_fraction=0.25",
    "responses.max_new_tokens=8",
    "responses.batch_size=8",
    "train.max_steps=4",
    "train.warmup_steps=0",
    "train.compile=off",
    "evaluate.max_new_tokens=6",
    "evaluate.samples=1",
)

# What is measured of a draft, after training alone.
OF_DRAFTS = {
    "draft_acceptance", "tokens_per_pass", "speculative_speedup", "expected_speedup", "draft_cost", "best_draft_tokens",
    "break_even_acceptance",
}  # fmt: skip


# The papers' own begin as models of other sizes: test_paper_recipes.
PLAYED = [name for name in shipped_recipes() if not name.startswith("papers/")]
# Problems in the fields of the data sets that these name.
PROBLEMS: dict[str, Callable[[str, int], dict[str, object]]] = {
    "math": lambda text, i: {"question": text, "answer": f"So.\n#### {i}"},
    "code": lambda text, i: {"text": text, "code": f"def f():\n    return {i}", "test_list": [f"assert f() == {i}"]},
}


# What the teachers of self-distillation see beside the prompt.
ITSELF: dict[str, Callable[[str, int], dict[str, object]]] = {
    "context-distillation": lambda text, i: {"prompt": text},
    "sdft": lambda text, i: {"prompt": text, "privileged_context": f"Say {i}."},
    "opsd": PROBLEMS["math"],
}


@pytest.mark.parametrize("name", PLAYED)
def test_a_shipped_recipe_plays_to_its_end(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, name: str) -> None:
    run, prompts = tmp_path / "run", tiny.prompts
    if name == "sft" or name.startswith("lab/"):
        # Their data sets have answers.
        rows = [json.loads(line) for line in prompts.read_text("utf-8").splitlines()]
        prompts = tmp_path / "answered.jsonl"
        answered = [{"prompt": row["prompt"], "completion": f"It is {i}."} for i, row in enumerate(rows)]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in answered), "utf-8")
    # Alpaca's wording alone has more tokens than the tiny window.
    teacher = write_model(tmp_path / "wide", window=512) if name.startswith("lab/") else tiny.teacher
    places = (f"output_dir={run}", f"teacher.model={teacher}", f"prompts.source={prompts}")
    # What the laboratory's students begin as is another run, or far larger than the tiny pair.
    pruned = name in ("lab/kd", "lab/task", "lab/smol", "lab/smol-student")
    init = "{init: depth_prune, layers: 2}" if pruned else "{init: scratch}"
    lab = (f"student={init}", "evaluate.prompts=4") if name.startswith("lab/") else ()
    whole = ("student={init: teacher, quantize: {format: q4_0, grid: importance}}",) if name == "recover" else ()
    if name in PROBLEMS:
        if name == "code" and jail.missing():
            pytest.skip(f"this machine has no {jail.missing()}")
        texts = [json.loads(line)["prompt"] for line in tiny.prompts.read_text("utf-8").splitlines()]
        prompts = tmp_path / "problems.jsonl"
        prompts.write_text("".join(json.dumps(PROBLEMS[name](t, i)) + "\n" for i, t in enumerate(texts)), "utf-8")
        teacher = write_model(tmp_path / "wide", window=512)
        places = (f"output_dir={run}", f"teacher.model={teacher}", f"prompts.source={prompts}")
        # A random teacher is never right.
        lab = ("prompts.dataset_config=null", "prompts.limit=null", "responses.verify.unverified=keep")
        lab += ("evaluate.groups.tasks.max_new_tokens=8",)
    if name == "vision":
        pytest.importorskip("PIL", reason="images need Pillow: pip install 'limbeck[vision]'")
        teacher = write_vision_model(tmp_path / "teacher", "qwen2_vl", seed=1)
        student = write_vision_model(tmp_path / "student", "qwen2_vl", seed=2, patch=16)
        questions = write_questions(tmp_path, 16)
        places = (f"output_dir={run}", f"teacher.model={teacher}", f"prompts.source={questions}")
        lab = (f"student.model={student}", "student.init=pretrained", "student.layers=null")
    if name == "pretrain":
        rows = [json.loads(line) for line in tiny.prompts.read_text("utf-8").splitlines()]
        prompts = write_prompts(tmp_path / "text.jsonl", [{"text": row["prompt"]} for row in rows])
        places = (f"output_dir={run}", f"teacher.model={tiny.teacher}", f"prompts.source={prompts}")
    small = SMALL
    if name in ITSELF:
        # The teacher is the student's start, so that it cannot be cut out of another model.
        rows = [json.loads(line) for line in tiny.prompts.read_text("utf-8").splitlines()]
        prompts = tmp_path / "hints.jsonl"
        write_prompts(prompts, [ITSELF[name](row["prompt"], i) for i, row in enumerate(rows)])
        student = write_model(tmp_path / "wide", window=512)
        places = (f"output_dir={run}", f"student.model={student}", f"prompts.source={prompts}")
        small = tuple(key for key in SMALL if not key.startswith("student."))
        lab = ("prompts.dataset_config=null", "prompts.limit=null") if name == "opsd" else ()
    if name.startswith("lab/task"):
        # A program makes its problems, and its student begins from nothing.
        places, small = (f"output_dir={run}",), tuple(key for key in SMALL if not key.startswith("student."))
        lab = ("prompts.generate.count=200", "responses.max_new_tokens=48", "train.per_device_train_batch_size=8")
        if name == "lab/task":
            places, lab = (f"output_dir={run}", f"teacher.model={teacher}"), (f"student={init}", *lab)
    if name.startswith("lab/smol"):
        lab += ("prompts.heldout=null",)
    if name == "lab/smol-teacher":
        small, lab = tuple(key for key in SMALL if not key.startswith("student.")), ("prompts.heldout=null",)
        lab += (f"student.model={teacher}", "evaluate.prompts=4")
    finished = limbeck.run("run", name, *places, *small, *lab, *whole)
    assert finished.code == 0, finished.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines][-1] == 4
    assert (run / "student" / "model.safetensors").exists()
    assert (run / "report.html").exists()
    before, after = (json.loads((run / "scores.json").read_text("utf-8"))[side] for side in ("before", "after"))
    drafting = {metric for metric in after if metric.partition("@")[0] in OF_DRAFTS}
    assert bool(drafting) == (name == "draft")
    # What was lost and brought back is of the two students together.
    together = {"recover": after.keys() - before.keys()}.get(name, {m for m in after if m.startswith("gap_")})
    assert before.keys() == after.keys() - together - drafting
    assert "forward_kl" not in before or before["forward_kl"] != after["forward_kl"]


ONCE = "the student's responses were written once"


@pytest.mark.parametrize(
    ("name", "never"),
    [("distillm2", []), ("dpkd", [ONCE]), ("skd", []), ("minillm", []), ("imitkd", []), ("gkd", [])],
)
def test_every_mechanism_of_an_on_policy_recipe_acts(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, name: str, never: list[str]
) -> None:
    """In as many epochs as it says; distillm, whose buffer wants more prompts, has a test of its own."""
    places = (f"output_dir={tmp_path}/run", f"teacher.model={tiny.teacher}", f"prompts.source={tiny.prompts}")
    small = [key for key in SMALL if not key.startswith("train.max_steps")]
    plain = ("sft=null", "train.learning_rate=1e-3", "train.eval_steps=null")
    finished = limbeck.run("train", name, *places, *small, *plain)
    assert finished.code == 0, finished.stderr
    said = json.loads((tmp_path / "run/stages/train.json").read_text("utf-8"))["never_acted"]
    assert [sentence.split(",")[0] for sentence in said] == never
