"""Students that write, through the real command: what only prompts and models can show, and what an update redoes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.limbeck_command import CommandServer
from tests.pipeline.test_bad_input import refused
from tests.tiny_pair import TinyPair, mute_end, questions, silence, write_model, write_prompts

RECIPES = Path(__file__).resolve().parents[2] / "limbeck" / "recipe" / "shipped"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


class TestOnTheWay:
    """What only the prompts, or the models, can show."""

    def test_rounds_inside_an_epoch(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        """Known before the teacher has answered anything; whole epochs are taken, of the last one with its states."""
        run = tmp_path / "run"
        recipe = tiny.recipe(run, responses={"source": "pairs"})
        finished = limbeck.run("run", recipe, "responses.source.refresh=4")
        refused(finished, "responses.source.refresh is 4 steps", "an epoch of pairs has 9", "refresh=epoch")
        assert not (run / "responses").exists()
        twice = limbeck.run("train", recipe, "responses.source.refresh=18", "train.max_steps=19", "--update")
        assert twice.code == 0, twice.stderr
        assert sorted(path.name for path in (run / "rounds").glob("0*")) == ["000", "001"]
        assert {path.parts[-3] for path in (run / "rounds").glob("*/*/*.safetensors")} == {"001"}

    def test_buffer_with_its_prompts(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        """The first look knows the answers alone; one with the prompts comes when they are there."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        recipe = tiny.recipe(tmp_path / "run", responses={"source": {"name": "replay", "capacity": memory // 800}})
        finished = limbeck.run("run", recipe)
        refused(finished, f"a buffer of {memory // 800} responses", "lower responses.source.capacity")
        assert (tmp_path / "run" / "responses" / "teacher.jsonl").exists()

    @pytest.mark.parametrize("author", ["student", "mixed", "replay", "speculative", "pairs"])
    def test_fewer_prompts_than_a_batch(
        self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, author: str
    ) -> None:
        run, source = tmp_path / "run", write_prompts(tmp_path / "p.jsonl", [{"prompt": q} for q in questions(6)])
        responses = {"source": {"name": author} | ({"share": 0.9} if author in ("mixed", "replay") else {})}
        train = {"per_device_train_batch_size": 16, "max_steps": 2}
        recipe = tiny.recipe(run, prompts={"source": str(source)}, responses=responses, train=train)
        finished = limbeck.run("train", recipe)
        assert finished.code == 0, finished.stderr
        prompts = [json.loads(line) for line in (run / "prompts.jsonl").read_text("utf-8").splitlines()]
        count = sum(p["split"] == "train" for p in prompts)
        assert count < 6
        assert next(line["responses/count"] for line in metrics(run) if "responses/count" in line) == count

    @pytest.mark.parametrize("init", ["pretrained", "scratch", "keep"])
    def test_students_that_need_no_answers(
        self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, init: str
    ) -> None:
        """Where the student writes everything and nothing is to be measured before, the teacher answers no prompt."""
        run = tmp_path / "run"
        section: dict[str, Any] = {"init": init, "layers": None}
        if init == "pretrained":
            section["model"] = str(write_model(tmp_path / "student", layers=2, seed=1))
        if init == "keep":
            section |= {"init": "depth_prune", "keep": [0, 2]}
        recipe = tiny.recipe(run, student=section, responses={"source": "student"}, train={"max_steps": 2})
        finished = limbeck.run("run", recipe)
        assert finished.code == 0, finished.stderr
        answers = [json.loads(line) for line in (run / "responses/teacher.jsonl").read_text("utf-8").splitlines()]
        assert {answer["split"] for answer in answers} == {"heldout"}
        assert (run / "report.html").exists()

    def test_student_that_never_ends(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        """It runs, is warned of by name, and the report says how much was cut off."""
        run, student = tmp_path / "run", mute_end(write_model(tmp_path / "student", layers=2, seed=1))
        section = {"model": str(student), "init": "pretrained", "layers": None}
        # Without a step that teaches it to end.
        train = {"max_steps": 24, "learning_rate": 1e-9, "per_device_train_batch_size": 8}
        recipe = tiny.recipe(run, student=section, responses={"source": "student", "max_new_tokens": 6}, train=train)
        finished = limbeck.run("run", recipe)
        assert finished.code == 0, finished.stderr
        warned = [line for line in finished.stderr.splitlines() if "truncation:" in line]
        assert len(warned) == 1 and "100% of the student's responses end at max_new_tokens" in warned[0]
        assert "raise responses.max_new_tokens" in warned[0]
        lines = metrics(run)
        assert all(line["responses/truncated"] == 1 for line in lines)
        assert [line["warnings"] for line in lines if "warnings" in line] == [["truncation"]]
        assert "truncation" in (run / "report.html").read_text("utf-8")

    def test_student_that_says_nothing(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        """Responses that are the end alone are trained on, and warned of."""
        run, student = tmp_path / "run", silence(write_model(tmp_path / "student", layers=2, seed=1))
        section = {"model": str(student), "init": "pretrained", "layers": None}
        train = {"max_steps": 24, "learning_rate": 1e-9, "per_device_train_batch_size": 8}
        recipe = tiny.recipe(run, student=section, responses={"source": "student"}, train=train)
        finished = limbeck.run("run", recipe)
        assert finished.code == 0, finished.stderr
        warned = [line for line in finished.stderr.splitlines() if "empty:" in line]
        assert len(warned) == 1 and "100% of the student's responses are empty" in warned[0]
        assert all(line["responses/empty"] == 1 and line["responses/length"] == 1 for line in metrics(run))

    def test_teacher_that_says_nothing(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        teacher = silence(write_model(tmp_path / "teacher"))
        recipe = tiny.recipe(tmp_path / "run", teacher={"model": str(teacher)}, responses={"source": "pairs"})
        refused(limbeck.run("run", recipe), "all train responses are empty", "prompts.template")

    @pytest.mark.parametrize("author", ["student", "pairs"])
    def test_ruined_while_training(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, author: str) -> None:
        """The step is named, not the sampler that found the numbers that are none; nothing ruined is kept."""
        run = tmp_path / "run"
        recipe = tiny.recipe(run, responses={"source": author})
        finished = limbeck.run("run", recipe, "train.learning_rate=1e30")
        refused(finished, "step ", "the start", "lower train.learning_rate and add --update")
        assert not list((run / "checkpoints").glob("step-*")) and not (run / "student").exists()
        mended = limbeck.run("train", recipe, "train.max_steps=2", "--update")
        assert mended.code == 0 and "respond: done earlier" in mended.stderr


class TestStale:
    """Responses of a student that has moved on, weighed with the log-probabilities they were drawn with."""

    def test_opd_over_an_epoch(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        run = tmp_path / "run"
        own = {"name": "student", "refresh": "epoch"}
        recipe = tiny.recipe(
            run,
            responses={"source": own},
            objective={"name": "opd", "temperature": 1.0},
            contrast={"rule": {"name": "importance", "importance": "prefix"}},
            train={"max_steps": 12, "learning_rate": 3e-3},
        )
        finished = limbeck.run("train", recipe)
        assert finished.code == 0, finished.stderr
        weights = [line["weight/student"] for line in metrics(run)]
        rounds = sorted((run / "rounds").glob("0*/student/*.jsonl"))
        assert rounds and all(json.loads(line)["logp"] for p in rounds for line in p.read_text("utf-8").splitlines())
        assert weights[0] == pytest.approx(1, abs=1e-3), "the current student wrote them"
        assert max(abs(weight - 1) for weight in weights) > 0.01


class TestMechanisms:
    """What was asked for and never happened is said on the console's last lines, in the manifest and in the report."""

    def test_a_student_that_never_wrote(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        """DistiLLM from a share of 0, the held-out loss falling: skew KL on the teacher's answers by another name."""
        run = tmp_path / "run"
        responses = {"source": {"name": "replay", "share": 0.0, "tolerance": 9.0, "validate_steps": 2}}
        recipe = tiny.recipe(run, responses=responses, train={"max_steps": 5})
        finished = limbeck.run("run", recipe)
        assert finished.code == 0, finished.stderr
        last = metrics(run)[-1]
        total, held = int(last["so_far/responses"]), last["buffer"]
        assert last["so_far/student"] == last["so_far/replayed"] == last["so_far/growths"] == held == 0
        assert last["so_far/validations"] == 2 and last["heldout_loss"] > 0
        never = json.loads((run / "stages" / "train.json").read_text("utf-8"))["never_acted"]
        assert [sentence.split(";")[0] for sentence in never][:2] == [
            f"the student wrote 0 of {total} responses: its share of the steps is 0",
            "the buffer replayed 0 responses: it is drawn from once it is full and held 0 at the end",
        ]
        assert never[2].startswith("the share never grew from 0: the held-out loss ")
        assert finished.stderr.splitlines()[-3:] == [f"warning: {sentence}" for sentence in never]
        page = (run / "report.html").read_text("utf-8")
        assert "What never acted" in page and f"The student wrote 0 of {total} responses that were trained on" in page
        # Whoever looks again is told again.
        assert limbeck.run("run", recipe).stderr.splitlines()[-3:] == finished.stderr.splitlines()[-3:]

    def test_the_shipped_distillm_on_a_tiny_pair(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        """Both of its mechanisms act at its own number of steps."""
        run = tmp_path / "run"
        own = yaml.safe_load((RECIPES / "distillm.yaml").read_text("utf-8"))
        source = write_prompts(tmp_path / "p.jsonl", [{"prompt": q} for q in questions(320)])
        recipe = tiny.recipe(
            run,
            prompts={"source": str(source), "eval_fraction": 0.1},
            responses=own["responses"] | {"max_new_tokens": 6},
            train={key: own["train"][key] for key in ("num_train_epochs", "per_device_train_batch_size", "seed")}
            | {"max_steps": None, "save_steps": 100},
        )
        finished = limbeck.run("train", recipe)
        assert finished.code == 0, finished.stderr
        lines = metrics(run)
        assert sum("responses/count" in line for line in lines) >= 0.2 * len(lines)
        assert lines[-1]["so_far/student"] >= 0.2 * lines[-1]["so_far/responses"]
        assert lines[-1]["so_far/replayed"] > 0 and lines[-1]["so_far/validations"] >= 8
        said = [line for line in finished.stderr.splitlines() if "its share grew" in line]
        assert len(said) == 1 and "of them out of the buffer" in said[0]

    def test_a_teacher_that_replaced_no_token(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        responses = {"source": {"name": "speculative", "teacher_top_k": 100_000}}
        recipe = tiny.recipe(tmp_path / "run", responses=responses, train={"max_steps": 2})
        finished = limbeck.run("train", recipe)
        assert finished.code == 0, finished.stderr
        tokens = int(metrics(tmp_path / "run")[-1]["so_far/replaceable"])
        assert finished.stderr.splitlines()[-1] == (
            f"warning: the teacher replaced 0 of the student's {tokens:,} tokens; lower "
            "responses.source.teacher_top_k, or raise responses.source.teacher_share"
        )
        narrow = limbeck.run("train", recipe, "responses.source.teacher_top_k=1", "--update")
        assert narrow.code == 0 and "warning: the teacher replaced" not in narrow.stderr
        assert metrics(tmp_path / "run")[-1]["so_far/replaced"] > 0


class TestUpdates:
    """What was there before training is not made again when only the way of training changes."""

    def test_the_student_alone_is_redone(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        run = tmp_path / "run"
        recipe = tiny.recipe(run, responses={"source": "pairs"}, train={"max_steps": 2})
        assert limbeck.run("train", recipe).code == 0
        before = (run / "responses" / "teacher.jsonl").stat()
        first = (run / "rounds" / "000" / "student" / "00000.jsonl").read_bytes()
        change = "responses.source.temperature=0.5"
        refused(limbeck.run("train", recipe, change), "responses.source.temperature", "--update")
        updated = limbeck.run("train", recipe, change, "--update")
        assert updated.code == 0, updated.stderr
        for name in ("prompts", "respond", "teach"):
            assert f"{name}: done earlier" in updated.stderr
        after = (run / "responses" / "teacher.jsonl").stat()
        assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
        (aside,) = (run / "superseded").iterdir()
        assert (aside / "rounds" / "000" / "student" / "00000.jsonl").read_bytes() == first
        assert (run / "rounds" / "000" / "student" / "00000.jsonl").read_bytes() != first

    def test_a_first_stage_asks_for_more_of_the_signal(
        self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path
    ) -> None:
        """Of the data's answers the teacher has judged the held-out ones alone, until somebody trains on the others."""
        run = tmp_path / "run"
        source = write_prompts(tmp_path / "p.jsonl", [{"prompt": q, "completion": f"{q} Yes."} for q in questions()])
        recipe = tiny.recipe(
            run,
            prompts={"source": str(source)},
            responses={"source": "pairs", "initial_author": "data", "max_new_tokens": 40},
            train={"max_steps": 2},
        )
        assert limbeck.run("train", recipe).code == 0
        more = limbeck.run("train", recipe, "sft.objective={name: fkl}", "--update")
        assert more.code == 0, more.stderr
        assert "respond: done earlier" in more.stderr and "teach: done earlier" not in more.stderr
        assert (run / "metrics.sft.jsonl").exists()
