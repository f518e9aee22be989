"""Runs that train on a store: no weights of the teacher, the same losses, and one line where the store does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from limbeck.cli import app
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.pipeline.store_capture import capture
from limbeck.pipeline.store_estimate import estimate_recipe
from limbeck.recipe.load import load_recipe
from limbeck.runtime.console import QuietConsole
from limbeck.runtime.files import read_json
from limbeck.teachers.store.codecs import CODECS
from limbeck.teachers.store.estimate import total_bytes
from limbeck.teachers.store.reader import Store
from limbeck.teachers.store.sparse import TopK
from limbeck.teachers.store.verifying import verify
from limbeck.types import LimbeckError
from tests.tiny_pair import TinyPair, questions, write_model, write_prompts

SPARSE = {"support": "topk_tail", "support_k": 16}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    folder = tmp_path_factory.mktemp("pair")
    rows = [{"prompt": text, "completion": f"An answer to {text}"} for text in questions()]
    write_model(folder / "student", layers=2, seed=5)
    return TinyPair(teacher=write_model(folder / "teacher"), prompts=write_prompts(folder / "prompts.jsonl", rows))


def tree_of(tiny: TinyPair, output: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    student = {"init": "pretrained", "layers": None, "model": str(tiny.teacher.parent / "student")}
    base = {"responses": {"source": "data"}, "evaluate": {"groups": ["fidelity"]}, "student": student}
    tree = tiny.tree(output, **base)
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return tree


def captured(tiny: TinyPair, path: Path, codec: Any = None, **sections: dict[str, Any]) -> Path:
    recipe = load_recipe(tree_of(tiny, path.parent / "capture", **sections))
    capture(recipe, path, codec, console=QuietConsole(), update=True)
    return path


@pytest.fixture(scope="module")
def whole(tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return captured(tiny, tmp_path_factory.mktemp("whole") / "store")


@pytest.fixture(scope="module")
def sparse(tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return captured(tiny, tmp_path_factory.mktemp("sparse") / "store", teacher=SPARSE)


@pytest.fixture(scope="module")
def written(tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of answers that the teacher wrote."""
    return captured(tiny, tmp_path_factory.mktemp("written") / "store", responses={"source": "teacher"})


def run(tree: dict[str, Any]) -> Path:
    return run_pipeline(load_recipe(tree), stages=STAGES, console=QuietConsole()).root


def losses(root: Path) -> list[float]:
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("form", ["whole", "sparse"])
def test_a_run_on_a_store_needs_no_weights_and_learns_the_same(tiny, form, tmp_path, request):
    section = {} if form == "whole" else SPARSE
    here = run(tree_of(tiny, tmp_path / "here", teacher=section))
    without = tmp_path / "teacher"
    shutil.copytree(tiny.teacher, without)
    (without / "model.safetensors").unlink()
    where = {"model": str(without), "where": {"name": "store", "path": str(request.getfixturevalue(form))}}
    there = run(tree_of(tiny, tmp_path / "there", teacher=section | where))
    assert losses(there) == pytest.approx(losses(here), rel=1e-5 if form == "whole" else 1e-3)
    one, two = (read_json(root / "scores.json")["after"] for root in (here, there))
    assert two["forward_kl"]["mean"] == pytest.approx(one["forward_kl"]["mean"], rel=1e-3)
    assert not (there / "signal").exists()
    # The store may lie elsewhere the next time.
    shutil.copytree(request.getfixturevalue(form), tmp_path / "moved")
    where["where"] = {"name": "store", "path": str(tmp_path / "moved")}
    before = (there / "student" / "model.safetensors").stat().st_mtime_ns
    run(tree_of(tiny, tmp_path / "there", teacher=section | where))
    assert (there / "student" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("section", [{}, SPARSE], ids=["whole", "sparse"])
def test_the_signal_of_a_run_is_a_store_for_other_runs(tiny, section, tmp_path):
    here = run(tree_of(tiny, tmp_path / "here", teacher=section))
    assert not verify(here / "signal")
    where = {"where": {"name": "store", "path": str(here / "signal")}}
    there = run(tree_of(tiny, tmp_path / "there", teacher=section | where))
    assert losses(there) == losses(here)


def test_a_signal_that_came_with_the_answers_is_a_store_without_answers(tiny, tmp_path):
    responses = {"source": "teacher"}
    here = run(tree_of(tiny, tmp_path / "here", responses=responses))
    rows = [json.loads(line) for line in (here / "responses" / "teacher.jsonl").read_text("utf-8").splitlines()]
    texts = {(*row["prompt_ids"], *row["response_ids"]) for row in rows if row["response_ids"]}
    assert not verify(here / "signal")
    assert sum(seal["responses"] for seal in Store(here / "signal").seals.values()) == len(texts)
    said = refusal(tiny, tmp_path / "there", here / "signal", responses=responses)
    assert "asks the teacher for its answers, but teacher.where=store" in said


def test_a_teacher_that_sees_more_is_captured_as_it_reads(tiny, whole, tmp_path):
    sees = {"sees": {"name": "system", "text": "Be brief."}}
    store = captured(tiny, tmp_path / "store", teacher=sees)
    where = {"where": {"name": "store", "path": str(store)}}
    here = run(tree_of(tiny, tmp_path / "here", teacher=sees))
    there = run(tree_of(tiny, tmp_path / "there", teacher=sees | where))
    assert losses(there) == pytest.approx(losses(here), rel=1e-5)
    # The same texts without what it saw are other texts, and both fit into one store.
    assert "no signal for 24 of 24" in refusal(tiny, tmp_path / "plain", store)
    assert "no signal for 24 of 24" in refusal(tiny, tmp_path / "seen", whole, teacher=sees)
    captured(tiny, store)
    run(tree_of(tiny, tmp_path / "plain", teacher=where))


def test_the_teachers_answers_are_there_without_the_teacher(tiny, written, tmp_path):
    teacher = {"responses": {"source": "teacher"}}
    here = run(tree_of(tiny, tmp_path / "here", **teacher))
    without = shutil.copytree(tiny.teacher, tmp_path / "teacher")
    (without / "model.safetensors").unlink()
    where = {"model": str(without), "where": {"name": "store", "path": str(written)}}
    there = run(tree_of(tiny, tmp_path / "there", teacher=where, **teacher))
    assert [(root / "responses" / "teacher.jsonl").read_bytes() for root in (here, there)].count(
        (here / "responses" / "teacher.jsonl").read_bytes()
    ) == 2  # fmt: skip
    assert losses(there) == pytest.approx(losses(here), rel=1e-4)


def refusal(tiny: TinyPair, output: Path, store: Path, **sections: dict[str, Any]) -> str:
    teacher = sections.pop("teacher", {})
    where = {"where": {"name": "store", "path": str(store)}} | teacher
    with pytest.raises(LimbeckError) as error:
        run(tree_of(tiny, output, teacher=where, **sections))
    assert "\n" not in str(error.value) and not (output / "student").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("store", "sections", "parts"),
    [
        ("whole", {"teacher": SPARSE}, ("keeps whole distributions", "teacher.support=full")),
        ("sparse", {}, ("16 likeliest tokens", "teacher.support=topk_tail and teacher.support_k=16")),
        ("sparse", {"teacher": SPARSE | {"support_k": 8}}, ("support_k is 8", "set it to 16")),
        ("sparse", {"teacher": SPARSE, "objective": {"temperature": 3.0}}, ("temperature 2", "the recipe's is 3")),
        ("whole", {"teacher": {"dtype": "bfloat16"}}, ("another teacher (dtype float32", "set teacher.dtype")),
        ("whole", {"responses": {"source": "teacher"}}, ("responses.source=teacher", "captured texts alone")),
        (
            "written",
            {"responses": {"source": "teacher", "temperature": 0.5}},
            ("no answer", "24 of 24", "were sampled"),
        ),
        (
            "written",
            {"responses": {"source": "teacher", "verify": {}}, "prompts": {"task": "gsm8k"}},
            ("for its answers",),
        ),
        ("whole", {"responses": {"source": "student"}}, ("captured texts alone", "in_process")),
        ("whole", {"prompts": {"template": "plain"}}, ("no signal for", "another template", "store capture")),
        ("whole", {"evaluate": {"groups": {"fidelity": {"whose": ["student"]}}}}, ("fidelity", "captured texts")),
        ("whole", {"evaluate": {"groups": ["likelihood"]}}, ("likelihood", "captured texts alone")),
    ],
)
def test_what_a_store_does_not_give_is_refused_before_anything_is_trained(
    tiny, store, sections, parts, tmp_path, request
):
    said = refusal(tiny, tmp_path / "run", request.getfixturevalue(store), **sections)
    assert all(part in said for part in parts), said


def test_a_store_of_another_teacher_or_tokenizer_is_refused(tiny, whole, tmp_path):
    other = write_model(tmp_path / "other", seed=9)
    assert "another teacher (model" in refusal(tiny, tmp_path / "a", whole, teacher={"model": str(other)})
    words = write_model(tmp_path / "words", extra=["zebra zebra zebra"] * 9)
    assert "another teacher (tokenizer" in refusal(tiny, tmp_path / "b", whole, teacher={"model": str(words)})
    assert "is no store" in refusal(tiny, tmp_path / "c", tmp_path)


def test_other_texts_are_refused_until_they_are_added(tiny, tmp_path):
    store = captured(tiny, tmp_path / "store")
    rows = [{"prompt": text, "completion": f"Another answer to {text}"} for text in questions()]
    prompts = {"source": str(write_prompts(tmp_path / "more.jsonl", rows))}
    assert "no signal for 24 of 24" in refusal(tiny, tmp_path / "run", store, prompts=prompts)
    captured(tiny, store, prompts=prompts)
    where = {"where": {"name": "store", "path": str(store)}}
    run(tree_of(tiny, tmp_path / "run", teacher=where, prompts=prompts))
    run(tree_of(tiny, tmp_path / "first", teacher=where))
    assert not verify(store)


@pytest.mark.parametrize("name", [None, *CODECS])
def test_estimates_are_what_is_written(tiny, name, tmp_path):
    codec = None if name is None else CODECS.build(name, **{"svd": {"rank": 8}}.get(name, {}))
    foreseen = estimate_recipe(load_recipe(tree_of(tiny, tmp_path / "capture")), codec, console=QuietConsole())
    assert not (tmp_path / "capture").exists() and foreseen.exact
    path = captured(tiny, tmp_path / "store", codec)
    written = sum(file.stat().st_size for file in path.iterdir())
    assert total_bytes(foreseen.parts) == pytest.approx(written, rel=0.02)


def test_answers_that_are_not_written_yet_count_as_long_as_they_may_become(tiny, tmp_path):
    tree = tree_of(tiny, tmp_path / "capture", responses={"source": "teacher", "max_new_tokens": 9})
    foreseen = estimate_recipe(load_recipe(tree), TopK(), console=QuietConsole())
    assert not foreseen.exact and sum(part.tokens for part in foreseen.parts) == 9 * 24
    recipe = load_recipe(tree)
    capture(recipe, tmp_path / "store", TopK(), console=QuietConsole())
    known = estimate_recipe(recipe, TopK(), console=QuietConsole())
    size = sum(file.stat().st_size for file in (tmp_path / "store").iterdir())
    assert known.exact and total_bytes(known.parts) == pytest.approx(size, rel=0.02)
    assert total_bytes(known.parts) < total_bytes(foreseen.parts)


def test_the_commands_say_what_they_do(tiny, tmp_path):
    import yaml

    recipe, store = tmp_path / "recipe.yaml", str(tmp_path / "store")
    recipe.write_text(yaml.safe_dump(tree_of(tiny, tmp_path / "run")), "utf-8")
    call = CliRunner()

    def printed(*words: str, code: int = 0) -> str:
        end = call.invoke(app, ["store", *words])
        assert end.exit_code == code, (end.output, end.exception)
        return end.output

    codec = "{name: topk, k: 16, bits: 8}"
    assert "bytes per token" in printed("estimate", str(recipe), "--codec", codec)
    printed("capture", str(recipe), store, "prompts.limit=20", "--codec", codec)
    shown = printed("inspect", store)
    assert all(part in shown for part in ("topk k=16 bits=8", "hidden dtype=float32", str(tiny.teacher), "chat", "2"))
    assert "2 shards are as they were written" in printed("verify", store)
    printed("merge", str(tmp_path / "merged"), store)
    assert "2 shards" in printed("verify", str(tmp_path / "merged"))
    shard = tmp_path / "store" / "000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert "000001.safetensors is damaged" in printed("verify", store, code=1)
    printed("capture", str(tmp_path / "run"), store, "--codec", codec)
    assert "2 shards" in printed("verify", store)
    for wrong in ("top", "[1]", "{name: topk, depth: 3}"):
        assert isinstance(
            call.invoke(app, ["store", "estimate", str(recipe), "--codec", wrong]).exception, LimbeckError
        )
