"""Bad input gets one line (got, expected, remedy) and exit code 2 from the real command; nothing finished is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.limbeck_command import CommandServer, Finished
from tests.tiny_pair import TinyPair, poison, silence, write_model, write_prompts, write_recipe


def refused(finished: Finished, *words: str) -> str:
    """Exit code 2 and one line that holds all words."""
    assert finished.code == 2, finished.stderr
    assert finished.stdout == ""
    for word in words:
        assert word in finished.error_line
    return finished.error_line


class TestRecipes:
    """Mistakes in the recipe itself: nothing is written."""

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("train.learning_rat=1e-4", ("'train.learning_rat'", "did you mean 'train.learning_rate'?")),
            ("trian.max_steps=3", ("'trian'", "did you mean 'train'?")),
            ("learning_rate=1", ("'learning_rate'", "did you mean 'train.learning_rate'?")),
            ("train.max_steps=many", ("train.max_steps", "'many'", "integer")),
            ("train.learning_rate=-1", ("train.learning_rate", "-1", "greater than 0")),
            ("train.max_steps=1.5", ("train.max_steps", "1.5")),
            ("student=7", ("student", "7", "expected a section")),
            ("train.max_steps", ("has no value", "train.max_steps=20")),
            ("teacher.model=[", ("not valid YAML",)),
            ("objective.name=fkll", ("'fkll'", "'fkl'")),
            ("objective.bet=0.1", ("'objective.bet'", "no options")),
            ("objective.temprature=1", ("'objective.temprature'", "did you mean 'objective.temperature'?")),
            ("objective.temperature_scale=tau3", ("temperature_scale", "tau3")),
            ("train.report_to=tensorboard", ("'tensorboard'", "a list, such as train.report_to=[tensorboard]")),
            ("train.report_to=[wandbb]", ("'wandbb'", "installed here")),
            ("student.layers=9", ("student.layers is 9", "3 blocks", "2 to 2")),
            ("responses.max_new_tokens=500", ("500", "128", "lower it")),
            ("student.lora={target_modules: [q_proj, nope]}", ("'nope'", "down_proj", "v_proj")),
            ("student.lora={target_modules: [kproj]}", ("'kproj'", "did you mean k_proj?")),
            ("student.lora={target_modules: [lm_head]}", ("'lm_head'", "layers are down_proj, gate_proj, k_proj, o_")),
            ("student={init: scratch, config: {hidden_act: nothing}}", ("no model can be built", "nothing")),
            ("student={init: teacher, model: x}", ("a copy of the teacher", "student.model", "init=pretrained")),
            ("student.quantize={format: q4}", ("'q4' is unknown", "q4_0, q5_0, q8_0, q4_k, q6_k, int4_g32, nf4")),
            ("student.quantize={format: q4_k}", ("32 weights", "the 256 of a block", "student.quantize.fallback=q5_0")),
            ("student={init: scratch, quantize: {format: q4_0}}", ("begins with none", "student.init=teacher")),
            ("student={init: teacher, lora: {}, quantize: {format: q4_0}}", ("straight_through", "weights=frozen")),
            ("student={init: teacher, quantize: {format: q4_0, weights: frozen}}", ("student.lora={r: 16}",)),
            ("student={init: teacher, dtype: bfloat16, quantize: {format: q4_0}}", ("student.dtype=float32",)),
        ],
    )
    def test_override(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, override: str, words: Any) -> None:
        run = tmp_path / "run"
        finished = limbeck.run("run", tiny.recipe(run), override)
        refused(finished, *words)
        assert len(finished.stderr.splitlines()) == 1
        assert not run.exists()

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("teacher: {model: x\nstudent: [", ("not valid YAML", "line 2")),
            ("", ("holds nothing",)),
            ("- a\n- b\n", ("holds list", "expected sections")),
            ("student: {init: depth_prune, layers: 2}\n", ("teacher is missing",)),
            ("teacher: {model: a}\nteacher: {model: b}\n", ("'teacher' stands twice",)),
            ("teacher: {model: 3}\n", ("teacher.model", "3", "string")),
        ],
    )
    def test_file(self, limbeck: CommandServer, tmp_path: Path, text: str, words: Any) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, "utf-8")
        refused(limbeck.run("run", path, cwd=tmp_path), *words)
        assert list(tmp_path.iterdir()) == [path]

    def test_absent(self, limbeck: CommandServer) -> None:
        refused(limbeck.run("run", "quickstar"), "no recipe 'quickstar'", "did you mean 'quickstart'?")

    def test_command_line(self, limbeck: CommandServer) -> None:
        refused(limbeck.run("rum", "quickstart"), "rum", "limbeck --help")
        refused(limbeck.run("run", "quickstart", "--updat"), "--updat", "limbeck run --help")
        refused(limbeck.run("run"), "RECIPE", "limbeck run --help")


class TestModels:
    """No model is loaded, and no directory begun, for a pair that cannot work."""

    def model_refused(self, limbeck: CommandServer, tiny: TinyPair, run: Path, override: str, *words: str) -> None:
        recipe = tiny.recipe(run)
        refused(limbeck.run("run", recipe, override), *words)
        assert not run.exists()

    def test_no_such_path(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        self.model_refused(limbeck, tiny, tmp_path / "a", "teacher.model=./no/such/model", "no model './no/such/model'")
        self.model_refused(limbeck, tiny, tmp_path / "b", "student={model: /no/such}", "no model '/no/such'")

    def test_directory_without_model(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        self.model_refused(limbeck, tiny, tmp_path / "a", f"teacher.model={empty}", "no config.json", "save_pretrained")

    def test_weights_missing(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        student = tmp_path / "student"
        shutil.copytree(tiny.teacher, student, ignore=shutil.ignore_patterns("*.safetensors"))
        self.model_refused(limbeck, tiny, tmp_path / "a", f"student={{model: {student}}}", "no .safetensors weights")

    def test_absent_hub_id(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        self.model_refused(
            limbeck, tiny, tmp_path / "a", "teacher.model=no-such/model", "no-such/model", "HF_HUB_OFFLINE", "connect"
        )

    def test_gguf_that_is_none(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        path.write_bytes(b"not a model")
        self.model_refused(limbeck, tiny, tmp_path / "a", f"teacher.model={path}", str(path), "no GGUF file")

    def test_other_tokenizer(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        student = write_model(tmp_path / "student", extra=["zebra quartz " * 50, "jumbo vizier " * 50])
        self.model_refused(
            limbeck, tiny, tmp_path / "a", f"student={{model: {student}}}", "different tokens", "ids name", "family"
        )

    def test_padded_head(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        """The same tokenizer under a wider head is a pair like any other."""
        student, run = write_model(tmp_path / "student", head_rows=384, layers=2, seed=1), tmp_path / "run"
        recipe = tiny.recipe(run)
        finished = limbeck.run("run", recipe, f"student={{model: {student}}}", "train.max_steps=2")
        assert finished.code == 0, finished.stderr
        assert json.loads((run / "student" / "config.json").read_text())["vocab_size"] == 384

    def test_no_chat_template(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        teacher = write_model(tmp_path / "teacher", chat=False)
        recipe = tiny.recipe(tmp_path / "run")
        refused(
            limbeck.run("run", recipe, f"teacher.model={teacher}", "prompts.template=chat"), "chat template", "plain"
        )

    def test_nan_in_teacher(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        teacher, run = poison(write_model(tmp_path / "teacher")), tmp_path / "run"
        refused(limbeck.run("run", tiny.recipe(run), f"teacher.model={teacher}"), "NaN", "weights")
        assert not (run / "stages" / "teach.json").exists()
        assert (run / "prompts.jsonl").exists()

    def test_nan_in_student(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        student, run = poison(write_model(tmp_path / "student", layers=2)), tmp_path / "run"
        finished = limbeck.run("run", tiny.recipe(run), f"student={{model: {student}}}")
        refused(finished, "step 1", "nan", "the start")
        assert not (run / "student").exists()
        assert (run / "responses" / "teacher.jsonl").exists()

    @pytest.mark.parametrize("steps", [1, 12])
    def test_nan_while_training(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, steps: int) -> None:
        """A learning rate beyond all measure: the step is named, and no ruined student is kept or handed on."""
        run = tmp_path / "run"
        beyond = ("train.learning_rate=1e30", "train.save_steps=1", f"train.max_steps={steps}")
        finished = limbeck.run("run", tiny.recipe(run), *beyond)
        refused(finished, "step 1:", "the start", "lower train.learning_rate and add --update")
        assert not list((run / "checkpoints").glob("step-*"))
        assert not (run / "student").exists()
        mended = limbeck.run("run", tiny.recipe(run), "train.max_steps=2", "--update")
        assert mended.code == 0, mended.stderr
        assert (run / "student" / "model.safetensors").exists()


class TestPrompts:
    def prompts_refused(self, limbeck: CommandServer, tiny: TinyPair, path: Path, *words: str, **more: Any) -> None:
        recipe = tiny.recipe(path.with_name("run"), prompts={"source": str(path)}, **more)
        refused(limbeck.run("run", recipe), *words)

    def test_empty(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        path = write_prompts(tmp_path / "p.jsonl", [])
        self.prompts_refused(limbeck, tiny, path, str(path), "no rows", "at least two prompts")

    def test_absent(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        self.prompts_refused(limbeck, tiny, tmp_path / "p.jsonl", "does not exist")

    def test_malformed_line(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        path = write_prompts(tmp_path / "p.jsonl")
        lines = path.read_text().splitlines()
        lines[6] = '{"prompt": "half a'
        path.write_text("\n".join(lines))
        self.prompts_refused(limbeck, tiny, path, f"{path}, line 7", "malformed JSON")

    def test_too_long(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        rows = [{"prompt": f"Say {i}."} for i in range(20)] + [{"prompt": "word " * 200}]
        path = write_prompts(tmp_path / "p.jsonl", rows)
        named = f"({path}, line 21: 'word word "
        self.prompts_refused(limbeck, tiny, path, named, "tokens, expected at most 116", "prompts.too_long")
        recipe = tiny.recipe(tmp_path / "run", prompts={"source": str(path), "too_long": "drop"})
        dropped = limbeck.run("respond", recipe, "--update")
        assert dropped.code == 0 and "1 prompts are longer than 116 tokens" in dropped.stderr
        recipe = tiny.recipe(tmp_path / "run", prompts={"source": str(path), "max_prompt_length": 60})
        refused(limbeck.run("respond", recipe, "--update"), "at most 60 (prompts.max_prompt_length)", "too_long")

    def test_window_of_the_student(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        """A response that fits the teacher must fit the student too."""
        student = write_model(tmp_path / "student", window=48, layers=2)
        rows = [{"prompt": f"Say {i}."} for i in range(20)] + [{"prompt": "b d " * 12}]
        path = write_prompts(tmp_path / "p.jsonl", rows)
        recipe = tiny.recipe(tmp_path / "run", prompts={"source": str(path)})
        refused(limbeck.run("run", recipe, f"student={{model: {student}}}"), "expected at most 36", "window 48")

    def test_empty_responses(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        """A teacher that ends every answer at once has nothing to teach."""
        teacher = silence(write_model(tmp_path / "teacher"))
        recipe = tiny.recipe(tmp_path / "run", teacher={"model": str(teacher)})
        refused(limbeck.run("run", recipe), "all train responses are empty", "prompts.template")
        assert not (tmp_path / "run" / "signal").exists()

    def test_empty_completions(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        path = write_prompts(tmp_path / "p.jsonl", [{"prompt": f"Say {i}.", "completion": ""} for i in range(20)])
        self.prompts_refused(limbeck, tiny, path, "completion", responses={"source": "data"})

    def test_no_completions(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        path = write_prompts(tmp_path / "p.jsonl")
        named = (f"({path}, line ", "has no completion", "responses.source=teacher")
        self.prompts_refused(limbeck, tiny, path, *named, responses={"source": "data"})


class TestRunDirectory:
    def test_other_recipe(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        """Refused with the keys that differ; --update redoes what depends on them and keeps the old results."""
        run = tmp_path / "run"
        recipe = tiny.recipe(run, train={"max_steps": 2})
        assert limbeck.run("run", recipe).code == 0
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
        finished = limbeck.run("run", recipe, "train.learning_rate=0.5", "train.save_steps=7")
        line = refused(finished, "train.learning_rate is 0.001 there and 0.5 here", "--update", "output_dir=")
        assert "save_steps" not in line
        assert before == {path: path.read_bytes() for path in before}
        assert limbeck.run("train", recipe, "train.learning_rate=0.5").code == 2
        updated = limbeck.run("train", recipe, "train.learning_rate=0.5", "--update")
        assert updated.code == 0 and "respond: done earlier" in updated.stderr
        aside = {path.name.partition("-")[0]: path for path in (run / "superseded").iterdir()}
        # What came after the student would otherwise pass for scores of the new one.
        assert set(aside) == {"train", "evaluate", "report"}
        old = before[run / "student" / "model.safetensors"]
        assert (aside["train"] / "student" / "model.safetensors").read_bytes() == old
        assert (aside["train"] / "train.json").read_bytes() == before[run / "stages" / "train.json"]
        assert (aside["evaluate"] / "scores.json").read_bytes() == before[run / "scores.json"]
        assert (run / "student" / "model.safetensors").read_bytes() != old
        assert not (run / "scores.json").exists()

    def test_changed_data(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        path = write_prompts(tmp_path / "p.jsonl")
        recipe = tiny.recipe(tmp_path / "run", prompts={"source": str(path)})
        assert limbeck.run("prompts", recipe).code == 0
        write_prompts(path, [{"prompt": f"Say {i}."} for i in range(20)])
        refused(limbeck.run("prompts", recipe), "the inputs of its stage prompts have changed", "--update")

    def test_foreign_files(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        run = tmp_path / "run"
        run.mkdir()
        (run / "thesis.txt").write_text("years of work")
        refused(limbeck.run("run", tiny.recipe(run)), "files that are no run of limbeck", "output_dir=")
        assert [path.name for path in run.iterdir()] == ["thesis.txt"]

    def test_is_a_file(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        run = tmp_path / "run"
        run.write_text("")
        refused(limbeck.run("run", tiny.recipe(run)), "is a file", "output_dir=")

    def test_unwritable(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        recipe = write_recipe(tmp_path / "r.yaml", tiny.tree(tmp_path / "file" / "run"))
        refused(limbeck.run("run", recipe), "Not a directory", "output_dir=")

    def test_read_only(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        """A directory nobody may write to, root included."""
        recipe = write_recipe(tmp_path / "r.yaml", tiny.tree(Path("/proc/limbeck-run")))
        if not Path("/proc/self").exists():
            pytest.skip("needs /proc")
        refused(limbeck.run("run", recipe), "/proc/limbeck-run", "output_dir=")

    def test_full_disk(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        """First the prompts do not fit, then a shard of the responses, then the checkpoint; then there is room."""
        run, whole = tmp_path / "run", tmp_path / "whole"
        recipe = tiny.recipe(run)
        size = (tiny.teacher / "model.safetensors").stat().st_size
        seen = []
        for limit in (1500, 8_000, size // 2):
            finished = limbeck.run("run", recipe, file_limit=limit)
            refused(
                finished, f"cannot use {run}/", "File too large", "free some space", "the same command then continues"
            )
            assert not [path for path in run.rglob("*.partial") if path.is_dir()]
            seen.append({path.stem for path in (run / "stages").glob("*.json") if json.loads(path.read_text())["done"]})
        assert seen[0] <= seen[1] <= seen[2] and "respond" in seen[2] and "train" not in seen[2]
        assert limbeck.run("run", recipe).code == 0
        assert limbeck.run("train", tiny.recipe(whole)).code == 0
        assert (run / "student/model.safetensors").read_bytes() == (whole / "student/model.safetensors").read_bytes()

    def test_two_at_once(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        run = tmp_path / "run"
        recipe = tiny.recipe(run, train={"max_steps": 400, "num_train_epochs": 100.0})
        first = limbeck.start("run", recipe)
        assert first.wait_until(lambda: (run / "stages" / "respond.json").exists())
        for verb in ("run", "report"):
            refused(limbeck.run(verb, recipe), f"in use by another run (process {first.pid})", "output_dir=")
        assert not first.ended()
        first.kill()
        # The lock died with the process.
        assert limbeck.run("respond", recipe).code == 0
