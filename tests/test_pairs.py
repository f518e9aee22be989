"""Pairs, data and settings beyond the everyday ones, each through the real command to the report it promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.limbeck_command import CommandServer, Finished
from tests.test_bad_input import refused
from tests.tiny_pair import TinyPair, write_model

CUSTOM_CODE = """\
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class TeapotConfig(LlamaConfig):
    model_type = "teapot"


class TeapotForCausalLM(LlamaForCausalLM):
    config_class = TeapotConfig


class TeapotTokenizer(PreTrainedTokenizerFast):
    pass
"""


def write_custom(folder: Path, *, layers: int = 3, seed: int = 0) -> Path:
    """A model whose code transformers does not have: it comes with the weights."""
    write_model(folder, layers=layers, seed=seed)
    (folder / "modeling_teapot.py").write_text(CUSTOM_CODE, "utf-8")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {
        "model_type": "teapot",
        "architectures": ["TeapotForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_teapot.TeapotConfig",
            "AutoModelForCausalLM": "modeling_teapot.TeapotForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    words = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    words |= {
        "tokenizer_class": "TeapotTokenizer",
        "auto_map": {"AutoTokenizer": [None, "modeling_teapot.TeapotTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(words), "utf-8")
    return folder


def played(finished: Finished, run: Path) -> dict[str, Any]:
    """A run that came to its report: its scores."""
    assert finished.code == 0, finished.stderr
    assert "Warning" not in finished.stderr and "Traceback" not in finished.stderr
    assert (run / "report.html").exists()
    scores = json.loads((run / "scores.json").read_text("utf-8"))
    assert set(scores) >= {"before", "after"}
    return scores


class TestCustomCode:
    def test_teacher(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        """A teacher with code of its own, pruned to a student that needs the same permission."""
        teacher, run = write_custom(tmp_path / "teapot"), tmp_path / "run"
        recipe = tiny.recipe(run, teacher={"model": str(teacher)}, train={"max_steps": 2})
        refused(limbeck.run("run", recipe), str(teacher), "its own Python code", "trust_remote_code=true")
        assert not run.exists()
        played(limbeck.run("run", recipe, "teacher.trust_remote_code=true"), run)
        config = json.loads((run / "student" / "config.json").read_text("utf-8"))
        assert config["architectures"] == ["TeapotForCausalLM"] and config["num_hidden_layers"] == 2
        assert (run / "student" / "modeling_teapot.py").exists()
        record = json.loads((run / "student" / "student.json").read_text("utf-8"))
        assert record["teacher_layers"] == 3

    @pytest.mark.parametrize("init", ["pretrained", "scratch"])
    def test_student(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, init: str) -> None:
        student, run = write_custom(tmp_path / "teapot", layers=2, seed=1), tmp_path / "run"
        recipe = tiny.recipe(run, train={"max_steps": 2})
        ours = f"model: {student}, init: {init}"
        refused(limbeck.run("run", recipe, f"student={{{ours}}}"), "its own Python code", "trust_remote_code=true")
        assert not run.exists()
        played(limbeck.run("run", recipe, f"student={{{ours}, trust_remote_code: true}}"), run)
        assert (run / "student" / "modeling_teapot.py").exists()

    def test_doctor(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        teacher = write_custom(tmp_path / "teapot")
        refused(limbeck.run("doctor", teacher, tiny.teacher), "its own Python code", "--trust-remote-code")
        trusted = limbeck.run("doctor", teacher, tiny.teacher, "--trust-remote-code")
        assert trusted.code == 0 and "TeapotForCausalLM" in trusted.stdout, trusted.stderr
        for side in ("teacher", "student"):
            pinned = limbeck.run("doctor", tiny.teacher, tiny.teacher, f"--{side}-revision", "v1")
            refused(pinned, "revision 'v1'", "only hub models have revisions")
