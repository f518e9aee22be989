"""A sweep gives what separate runs give, bit for bit, and does what they have in common once."""

from __future__ import annotations

from pathlib import Path

import pytest

from limbeck.sweep.runner import run_sweep
from tests.sweep.conftest import Play, Played, alone, made_here, recipe_tree, require_same_bits
from tests.tiny_pair import TinyPair

ALL_METRICS = {"groups": ["fidelity", "rouge"]}
GRID = {"objective.name": ["fkl", "rkl"]}


@pytest.fixture(scope="module")
def grid(played: Play, tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Played:
    recipe = recipe_tree(tiny, evaluate=ALL_METRICS)
    return played(tmp_path_factory.mktemp("grid") / "s", recipe=recipe, grid=GRID, seeds=[0, 1])


class TestSharing:
    @pytest.mark.parametrize(("name", "seed"), [("fkl", 0), ("rkl", 1)])
    def test_same_bits_as_separate_runs(
        self, grid: Played, tiny: TinyPair, tmp_path: Path, name: str, seed: int
    ) -> None:
        separate = alone(tiny, tmp_path / "r", f"objective.name={name}", f"train.seed={seed}", evaluate=ALL_METRICS)
        require_same_bits(grid.root / "arms" / f"name={name}" / f"seed={seed}", separate)

    def test_teachers_work_is_done_once(self, grid: Played) -> None:
        runs = [grid.root / line["directory"] for line in grid.lines]
        assert len(runs) == 4 and {line["state"] for line in grid.lines} == {"done"}
        own = {"train", "evaluate", "report"}
        assert [made_here(run) for run in runs] == [own | {"prompts", "respond", "teach"}] + [own] * 3
        for name in ("signal/000000.safetensors", "responses/teacher.jsonl", "prompts.jsonl", "blocks.json"):
            assert all((run / name).samefile(runs[0] / name) for run in runs), name
        answers = [next((run / "scores" / "answers").glob("teacher-*.jsonl")) for run in runs]
        assert all(path.samefile(answers[0]) for path in answers)
        before = [(run / "scores" / "before.fidelity.json") for run in runs]
        assert all(path.samefile(before[0]) for path in before)
        after = [(run / "scores" / "after.fidelity.jsonl").read_bytes() for run in runs]
        assert len(set(after)) == 4

    def test_again_is_nothing(self, grid: Played, tiny: TinyPair, played: Play) -> None:
        before = {path: path.stat().st_mtime_ns for path in (grid.root / "arms").rglob("*") if path.is_file()}
        again = played(grid.root, recipe=recipe_tree(tiny, evaluate=ALL_METRICS), grid=GRID, seeds=[0, 1])
        assert again.end == grid.end and again.lines == grid.lines
        assert {path: path.stat().st_mtime_ns for path in (grid.root / "arms").rglob("*") if path.is_file()} == before

    def test_its_directory_is_enough(self, grid: Played, tmp_path: Path) -> None:
        assert run_sweep(grid.root).runs == 4

    def test_other_teachers_work_is_done_apart(self, played: Play, tmp_path: Path) -> None:
        done = played(tmp_path / "s", grid={"responses.seed": [0, 1], "objective.name": ["fkl", "rkl"]})
        assert [("respond" in made_here(done.root / line["directory"])) for line in done.lines] == [True, False] * 2
        # One of each kind goes first.
        finished = [line.partition(", seed")[0] for line in done.said if ": done" in line]
        assert finished[:2] == ["seed=0,name=fkl", "seed=1,name=fkl"]

    def test_fresh_students_differ_by_seed(self, played: Play, tiny: TinyPair, tmp_path: Path) -> None:
        """What begins otherwise before training is not shared."""
        student = {"init": "scratch", "layers": None}
        done = played(tmp_path / "s", recipe=recipe_tree(tiny, student=student), seeds=[0, 1])
        one, two = (done.root / line["directory"] for line in done.lines)
        assert (one / "scores/before.fidelity.jsonl").read_bytes() != (
            two / "scores/before.fidelity.jsonl"
        ).read_bytes()
        require_same_bits(two, alone(tiny, tmp_path / "r", "train.seed=1", student=student))

    def test_more_seeds_later(self, played: Play, tmp_path: Path) -> None:
        played(tmp_path / "s", seeds=[0])
        more = played(tmp_path / "s", seeds=[0, 1])
        assert [line["state"] for line in more.lines] == ["done", "done"]
        assert [made_here(more.root / line["directory"]) >= {"respond"} for line in more.lines] == [True, False]
