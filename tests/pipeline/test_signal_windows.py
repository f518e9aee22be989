"""A training whose signal is on disk a few steps at a time: the same losses, never more on disk, nothing twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.signal_windows import SignalWindows
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.runtime.rundir import RunDirectory
from limbeck.types import Interrupted, LimbeckError, Response
from tests.tiny_pair import TinyPair, questions, write_prompts

ROWS = [{"prompt": text, "completion": f"An answer to {text}" * (1 + i % 3)} for i, text in enumerate(questions(40))]
# Some 100 KiB are the whole signal.
LIMIT = 16 * 2**10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    pair = TinyPair.write(tmp_path_factory.mktemp("pair"))
    write_prompts(pair.prompts, ROWS)
    return pair


def tree_of(tiny: TinyPair, output: Path, *, limit: float | None = LIMIT, **sections: Any) -> dict[str, Any]:
    teacher = sections.pop("teacher", {}) | ({} if limit is None else {"cache_limit_gib": limit / 2**30})
    base = {"responses": {"source": "data"}, "evaluate": {"groups": {"fidelity": {}}}, "teacher": teacher}
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section}
    tree = tiny.tree(output, **base)
    tree["train"] |= {"max_steps": 14, "logging_steps": 1} | sections.get("train", {})
    return tree


def losses_of(run: RunDirectory) -> list[tuple[float, ...]]:
    rows = [json.loads(line) for line in run.metrics.read_text("utf-8").splitlines()]
    return [(row["loss"], row.get("eval_loss", 0.0)) for row in rows if "loss" in row]


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes below the folder of windows, whenever one was written; what is kept aside is not of the limit."""
    found: list[int] = []
    write = SignalWindows._write

    def measured(self: SignalWindows, folder: Path, responses: Sequence[Response], world: Any) -> Any:
        paths = write(self, folder, responses, world)
        found.append(sum(path.stat().st_size for path in self.folder.glob("[0-9]*/*")))
        return paths

    monkeypatch.setattr(SignalWindows, "_write", measured)
    return found


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"teacher": {"support": "topk_tail", "support_k": 9}, "objective": {"name": "rkl"}},
        {"teacher": {"support": "sampled", "support_k": 9}},
        {"train": {"eval_steps": 4, "eval_size": 8, "learning_rate": "auto"}},
        {"sft": {"num_train_epochs": 1, "objective": {"name": "fkl"}}},
    ],
    ids=["hidden", "topk", "sampled", "aside", "sft"],
)
def test_losses_and_scores_are_those_of_the_whole_signal(
    tiny: TinyPair, tmp_path: Path, sizes: list[int], sections: dict[str, Any]
) -> None:
    whole = run_pipeline(load_recipe(tree_of(tiny, tmp_path / "whole", limit=None, **sections)), stages=STAGES)
    limit = sum(path.stat().st_size for path in whole.signal.glob("0*.safetensors")) // 3
    assert not sizes
    some = run_pipeline(load_recipe(tree_of(tiny, tmp_path / "some", limit=limit, **sections)), stages=STAGES)
    assert len(sizes) > 3 and max(sizes) <= limit
    expected = losses_of(whole)
    assert len(expected) == 14
    for found, there in zip(losses_of(some), expected, strict=True):
        assert found == pytest.approx(there, rel=1e-6, abs=1e-7)
    scores = [json.loads((run.root / "scores.json").read_text("utf-8"))["after"]["forward_kl"] for run in (whole, some)]
    assert scores[1]["mean"] == pytest.approx(scores[0]["mean"], rel=1e-5)
    assert not some.signal_windows.exists(), "nothing is left of it"


def test_what_was_scored_before_a_stop_is_not_scored_again(
    tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that stops in the middle of a window goes on with the files of that window."""
    straight = run_pipeline(load_recipe(tree_of(tiny, tmp_path / "straight")), stages=STAGES)
    recipe = load_recipe(tree_of(tiny, tmp_path / "stopped"))
    with pytest.raises(Interrupted):
        run_pipeline(recipe, stages=STAGES, pause_at=3 / 14)
    run = RunDirectory(tmp_path / "stopped")
    before = {path: path.stat().st_ino for path in run.signal_windows.rglob("*.safetensors")}
    assert before
    # One half of a window that was killed, and a file of a window of another size.
    first, scored = min(before), []
    first.write_bytes(b"not a shard")
    score = SignalWindows._score

    def counted(self: SignalWindows, path: Path, responses: Sequence[Response]) -> None:
        scored.append(path)
        kept = [path for path in before if path.exists() and path != first]
        assert [path.stat().st_ino for path in kept] == [before[path] for path in kept]
        score(self, path, responses)

    monkeypatch.setattr(SignalWindows, "_score", counted)
    run_pipeline(recipe, stages=STAGES)
    again = {path.with_suffix(".safetensors") for path in scored} & before.keys()
    assert again == {first}
    assert losses_of(run) == losses_of(straight)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"teacher": {"cache": False}}, "teacher.cache is false, so that nothing is kept; leave it out"),
        ({"responses": {"source": "student"}}, "responses.source=student writes during training"),
        (
            {"teacher": {"support": "topk_tail", "student_k": 3}},
            "teacher.student_k keeps what the student chose before training",
        ),
    ],
)
def test_where_a_limit_means_nothing_it_is_refused(
    tiny: TinyPair, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(LimbeckError) as error:
        run_pipeline(load_recipe(tree_of(tiny, tmp_path / "run", **sections)), stages=STAGES)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_limit_below_one_step_is_refused(tiny: TinyPair, tmp_path: Path) -> None:
    with pytest.raises(LimbeckError, match=r"the signal of step 1 alone takes .* GiB; raise it"):
        run_pipeline(load_recipe(tree_of(tiny, tmp_path / "run", limit=5000)), stages=STAGES)
