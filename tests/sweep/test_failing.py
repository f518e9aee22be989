"""What is refused before a sweep begins, and what happens to a run that fails in it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from limbeck.runtime.rundir import RunDirectory
from limbeck.sweep import workers as pool
from limbeck.sweep.tasks import Outcome, Task
from limbeck.types import LimbeckError
from tests.sweep.conftest import Play, Tree, alone, made_here
from tests.tiny_pair import TinyPair


class TestFailing:
    def test_the_others_go_on(self, played: Play, tmp_path: Path) -> None:
        done = played(tmp_path / "s", grid={"train.learning_rate": [1e-3, 1e30]})
        good, bad = done.lines
        assert (good["state"], good["error"], bad["state"]) == ("done", None, "failed")
        assert "step" in bad["error"] and "lower train.learning_rate" in bad["error"]
        assert (done.end.runs, done.end.failed) == (2, 1)
        assert done.said[-1] == "sweep small: 2 runs, 1 done, 1 failed"
        assert not any("not part of this sweep" in line for line in done.said)
        log = (done.root / "arms" / "learning_rate=1e+30" / "seed=0.log").read_text()
        assert f"failed: {bad['error']}" in log and "respond: the same as that of" in log
        fewer = played(tmp_path / "s", grid={"train.learning_rate": [1e-3]})
        said = "1 run in arms/ is not part of this sweep: arms/learning_rate=1e+30/seed=0"
        assert any(line.startswith(said) for line in fewer.said) and said in fewer.end.page.read_text("utf-8")

    @pytest.mark.parametrize(
        ("keys", "said"),
        [
            ({"grid": {"student.layers": [2, 9]}}, "arm layers=9: student.layers is 9"),
            ({"arms": {"a": {}, "b": {"objective.frist": 1}}}, "arm b: unknown key 'objective.frist'"),
            ({"arms": {"a": {}, "b": {"teacher.model": "nowhere/at-all/x"}}}, "arm b: no model 'nowhere/at-all/x'"),
            (
                {"tune": {"teacher.support_k": [5, 999]}, "set": {"teacher.support": "topk_tail"}},
                "arm base: teacher.support_k is 999",
            ),
        ],
    )
    def test_refused_before_anything_starts(self, played: Play, tmp_path: Path, keys: Tree, said: str) -> None:
        with pytest.raises(LimbeckError) as caught:
            played(tmp_path / "s", **keys)
        assert str(caught.value).startswith(said)
        assert not (tmp_path / "s" / "arms").exists()

    def test_a_directory_made_by_another_recipe(self, played: Play, tmp_path: Path) -> None:
        played(tmp_path / "s", arms={"a": {"objective.name": "fkl"}})
        with pytest.raises(LimbeckError, match=r"arm a: .*objective.name is 'fkl' there and 'rkl' here.*--update"):
            played(tmp_path / "s", arms={"a": {"objective.name": "rkl"}})
        done = played(tmp_path / "s", arms={"a": {"objective.name": "rkl"}}, update=True)
        assert done.state("a")["state"] == "done"
        assert made_here(tmp_path / "s" / "arms" / "a" / "seed=0") >= {"train", "respond"}

    def test_other_files(self, played: Play, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(LimbeckError, match="holds files that are no sweep"):
            played(tmp_path)

    def test_a_run_of_its_own(self, played: Play, tiny: TinyPair, tmp_path: Path) -> None:
        with pytest.raises(LimbeckError, match="holds files that are no sweep"):
            played(RunDirectory(alone(tiny, tmp_path / "r")).root)

    def test_under_a_launcher(self, played: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(LimbeckError, match="start `limbeck sweep` alone"):
            played(tmp_path / "s")

    @pytest.mark.parametrize(
        "more", [{}, {"tune": {"teacher.support_k": list(range(1, 101))}}, {"seeds": list(range(50))}]
    )
    def test_more_runs_than_anybody_waits_for(self, played: Play, tmp_path: Path, more: Tree) -> None:
        many = [1.0 + n / 1000 for n in range(10_000 if not more else 200)]
        started = time.monotonic()
        with pytest.raises(LimbeckError, match=r"the sweep has [\d,]+ runs; expected at most 5,000"):
            played(tmp_path / "s", grid={"objective.temperature": many}, **more)
        assert time.monotonic() - started < 5
        assert not (tmp_path / "s").exists()


def test_a_run_that_was_lost_is_told_from_one_that_failed(
    played: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(task: Task) -> Outcome:
        return Outcome(state="failed", error="its process was killed", lost="rkl" in str(task.recipe["objective"]))

    monkeypatch.setattr(pool, "perform", lose)
    done = played(tmp_path / "s", grid={"objective.name": ["fkl", "rkl"]})
    assert (done.end.runs, done.end.failed, done.end.lost) == (2, 2, 1)
