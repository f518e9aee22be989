"""Pairs, data and settings beyond the everyday ones, each through the real command to the report it promises."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.limbeck_command import ROOT, CommandServer, Finished, KillAt
from tests.models.tiny import save_gguf
from tests.pipeline.test_bad_input import refused
from tests.tiny_pair import TinyPair, poison, questions, write_model, write_prompts

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


@pytest.fixture(scope="module")
def plain(limbeck: CommandServer, tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with nothing special about it, to compare others with."""
    run = tmp_path_factory.mktemp("plain") / "run"
    played(limbeck.run("run", tiny.recipe(run)), run)
    return run


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def stage(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / "stages" / f"{name}.json").read_text("utf-8"))


def answer(number: int) -> str:
    return f"It is number {number}."


class TestData:
    """What the student learns from is what the data says."""

    @pytest.mark.parametrize("form", ["prompt", "messages", "alpaca"])
    def test_written_answers(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, form: str) -> None:
        from transformers import AutoTokenizer

        asked = questions()
        rows: dict[str, list[dict[str, Any]]] = {
            "prompt": [{"prompt": q, "completion": answer(i)} for i, q in enumerate(asked)],
            "messages": [
                {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": answer(i)}]}
                for i, q in enumerate(asked)
            ],
            "alpaca": [
                {"instruction": q, "input": "In short." if i % 2 else "", "output": answer(i)}
                for i, q in enumerate(asked)
            ],
        }
        run, source = tmp_path / "run", write_prompts(tmp_path / "p.jsonl", rows[form])
        recipe = tiny.recipe(
            run,
            prompts={"source": str(source)},
            responses={"source": "data", "max_new_tokens": 40},
            train={"max_steps": 4},
        )
        played(limbeck.run("run", recipe), run)
        tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
        responses = [json.loads(line) for line in (run / "responses" / "data.jsonl").read_text("utf-8").splitlines()]
        said = {
            tokenizer.decode(r["prompt_ids"]): tokenizer.decode(r["response_ids"], skip_special_tokens=True)
            for r in responses
        }
        assert len(said) == len(asked)
        for i, question in enumerate(asked):
            (prompt,) = (p for p in said if f"user\n{question}" in p and (form != "alpaca" or ("short" in p) == i % 2))
            assert said[prompt] == answer(i)
        assert stage(run, "teach")["tokens"] == sum(len(r["response_ids"]) for r in responses)

    def test_killed_while_judging(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        """The teacher's pass over the data: what it has judged is not judged again."""
        rows = [{"prompt": q, "completion": answer(i)} for i, q in enumerate(questions(72))]
        source = write_prompts(tmp_path / "p.jsonl", rows)
        sections: dict[str, dict[str, Any]] = {
            "prompts": {"source": str(source)},
            "responses": {"source": "data", "max_new_tokens": 40},
            "train": {"max_steps": 3},
        }
        run, whole = tmp_path / "run", tmp_path / "whole"
        recipe = tiny.recipe(run, **sections)
        killed = limbeck.run("run", recipe, killed=KillAt(run, "signal/000001.safetensors"))
        assert killed.code == -signal.SIGKILL
        first = (run / "signal" / "000000.safetensors").stat()
        assert not (run / "signal" / "000001.safetensors").exists() and not stage(run, "teach")["done"]
        played(limbeck.run("run", recipe), run)
        again = (run / "signal" / "000000.safetensors").stat()
        assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
        assert limbeck.run("train", tiny.recipe(whole, **sections)).code == 0
        for name in ("signal/000001.safetensors", "student/model.safetensors"):
            assert (run / name).read_bytes() == (whole / name).read_bytes()

    def test_datasets_folder(self, limbeck: CommandServer, tiny: TinyPair, plain: Path, tmp_path: Path) -> None:
        """The same rows as a folder of `datasets` are the same prompts."""
        from datasets import Dataset

        rows = [json.loads(line) for line in tiny.prompts.read_text("utf-8").splitlines()]
        Dataset.from_list(rows).save_to_disk(tmp_path / "folder")
        run = tmp_path / "run"
        recipe = tiny.recipe(run, prompts={"source": str(tmp_path / "folder")}, train={"max_steps": 2})
        played(limbeck.run("run", recipe), run)
        said, there = ((r / "responses" / "teacher.jsonl").read_bytes() for r in (run, plain))
        assert said == there


class TestSettings:
    def test_live_teacher(self, limbeck: CommandServer, tiny: TinyPair, plain: Path, tmp_path: Path) -> None:
        """Without the signal on disk the teacher runs beside the student, and says the same."""
        run = tmp_path / "run"
        scores = played(limbeck.run("run", tiny.recipe(run), "teacher.cache=false"), run)
        assert not (run / "signal").exists() and stage(run, "teach")["cached"] is False
        assert losses(run) == pytest.approx(losses(plain), rel=1e-4)
        there = json.loads((plain / "scores.json").read_text("utf-8"))
        kl = [s["after"]["forward_kl"]["mean"] for s in (scores, there)]
        assert kl[0] == pytest.approx(kl[1], rel=1e-3)

    def test_scratch(self, limbeck: CommandServer, tiny: TinyPair, plain: Path, tmp_path: Path) -> None:
        """Fresh weights in the teacher's architecture know nothing of it, and learn."""
        run = tmp_path / "run"
        student = "student={init: scratch, config: {num_hidden_layers: 1}}"
        train = ("train.max_steps=20", "train.num_train_epochs=20", "train.learning_rate=0.01")
        played(limbeck.run("run", tiny.recipe(run), student, *train), run)
        assert json.loads((run / "student" / "config.json").read_text("utf-8"))["num_hidden_layers"] == 1
        assert not (run / "blocks.json").exists()
        assert losses(run)[0] > 2 * losses(plain)[0]
        assert losses(run)[-1] < 0.9 * losses(run)[0]

    @pytest.mark.parametrize(
        ("override", "tolerance"), [("train.bf16=true", 0.05), ("train.gradient_checkpointing=true", 1e-5)]
    )
    def test_same_losses(
        self, limbeck: CommandServer, tiny: TinyPair, plain: Path, tmp_path: Path, override: str, tolerance: float
    ) -> None:
        from safetensors.torch import load_file

        run = tmp_path / "run"
        played(limbeck.run("run", tiny.recipe(run), override), run)
        assert losses(run) == pytest.approx(losses(plain), rel=tolerance)
        assert (losses(run) != losses(plain)) == ("bf16" in override)
        assert {str(w.dtype) for w in load_file(run / "student" / "model.safetensors").values()} == {"torch.float32"}

    def test_tracker(self, limbeck: CommandServer, tiny: TinyPair, plain: Path, tmp_path: Path) -> None:
        """A tracker gets every line of the metrics, and changes nothing else."""
        run = tmp_path / "run"
        played(limbeck.run("run", tiny.recipe(run), "train.report_to=[tensorboard]"), run)
        assert losses(run) == losses(plain)
        events = b"".join(path.read_bytes() for path in (run / "trackers").rglob("events.*"))
        # A tag in the events: its field, its length, its name.
        assert events.count(b"\n\tgrad_norm") == events.count(b"\n\x04loss") == len(losses(run)) == 12

    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
    def test_resumed_when_compiled(self, limbeck: CommandServer, tiny: TinyPair, plain: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        recipe = tiny.recipe(run, train={"compile": "on"})
        killed = limbeck.run("train", recipe, killed=KillAt(run, "checkpoints/step-000006"))
        assert killed.code == -signal.SIGKILL and len(losses(run)) == 6, killed.stderr
        finished = limbeck.run("train", recipe)
        assert finished.code == 0, finished.stderr
        # The steps after the kill too, which are nothing but the loss's rounding away from a run that never compiled.
        assert losses(run) == pytest.approx(losses(plain), rel=1e-4)


class TestModels:
    def test_gguf_teacher(self, limbeck: CommandServer, tiny: TinyPair, plain: Path, tmp_path: Path) -> None:
        """A GGUF file with the teacher's weights and tokenizer says what the teacher says."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
        model = AutoModelForCausalLM.from_pretrained(tiny.teacher)
        teacher, run = save_gguf(tmp_path / "tiny.gguf", model, tokenizer=tokenizer), tmp_path / "run"
        played(limbeck.run("run", tiny.recipe(run), f"teacher.model={teacher}", "train.max_steps=2"), run)
        said, there = (
            [json.loads(line)["response_ids"] for line in (r / "responses/teacher.jsonl").read_text().splitlines()]
            for r in (run, plain)
        )
        assert said == there
        assert losses(run)[0] == pytest.approx(losses(plain)[0], rel=1e-4)
        assert json.loads((run / "student" / "student.json").read_text("utf-8"))["teacher_layers"] == 3
        assert AutoModelForCausalLM.from_pretrained(run / "student").config.num_hidden_layers == 2

    @pytest.mark.parametrize("author", ["teacher", "data"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_damaged_teacher(
        self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, value: float, author: str
    ) -> None:
        teacher, run = poison(write_model(tmp_path / "teacher"), value), tmp_path / "run"
        rows = [{"prompt": q, "completion": answer(i)} for i, q in enumerate(questions())]
        source = write_prompts(tmp_path / "p.jsonl", rows)
        recipe = tiny.recipe(run, prompts={"source": str(source)}, responses={"source": author, "max_new_tokens": 40})
        refused(limbeck.run("run", recipe, f"teacher.model={teacher}"), "NaN or infinite", "weights")
        assert not list((run / "signal").glob("*")) and not (run / "student").exists()


class TestDoctor:
    def test_fits(self, limbeck: CommandServer, tiny: TinyPair) -> None:
        found = limbeck.run("doctor", tiny.teacher, tiny.teacher)
        assert found.code == 0 and found.stderr == ""
        assert "Can be distilled? yes: the same tokens, heads without padding" in found.stdout

    def test_padded(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        student = write_model(tmp_path / "student", head_rows=384)
        found = limbeck.run("doctor", tiny.teacher, student)
        assert found.code == 0 and found.stderr == ""
        assert "padded head rows get no mass" in found.stdout and "84 padding" in found.stdout

    def test_does_not_fit(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        student = write_model(tmp_path / "student", extra=["zebra quartz " * 50, "jumbo vizier " * 50])
        found = limbeck.run("doctor", tiny.teacher, student)
        assert found.code == 1 and found.stderr == ""
        assert "Can be distilled? not as it is: different tokens" in found.stdout
        assert "ids name different tokens" in found.stdout


class _Hub(BaseHTTPRequestHandler):
    """Knows one model, and gives none of its files."""

    def do_GET(self) -> None:
        sha = "a" * 40
        if self.path.startswith("/api/models/owner/gated"):
            names = ("config.json", "model.safetensors", "tokenizer.json")
            files = [{"type": "file", "path": name, "rfilename": name, "oid": sha, "size": 9} for name in names]
            whole = {"id": "owner/gated", "sha": sha, "siblings": files, "gated": "manual"}
            self._answer(200, files if "/tree/" in self.path else whole)
        elif self.path.startswith("/owner/gated/resolve/"):
            self._answer(403, {"error": "Access to model owner/gated is restricted"}, "GatedRepo")
        else:
            self._answer(404, {"error": "Repository not found"}, "RepoNotFound")

    do_HEAD = do_GET

    def _answer(self, status: int, body: Any, code: str | None = None) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", body["error"])
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(payload)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_hub_ids(hub: str, tiny: TinyPair, tmp_path: Path) -> None:
    """A gated model and one that is not there. Fresh processes: where the hub is, is read when they start."""
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    for name in ("HF_HUB_CACHE", "HF_TOKEN"):
        environment.pop(name, None)
    recipe = tiny.recipe(tmp_path / "run")
    commands = {
        name: subprocess.Popen(
            [sys.executable, "-m", "limbeck", "run", str(recipe), f"teacher.model={name}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("owner/gated", "owner/absent")
    }
    ended = {name: (process.communicate(timeout=120), process.returncode) for name, process in commands.items()}
    lines = {name: refused(Finished(code, *said)) for name, (said, code) in ended.items()}
    assert "owner/gated is gated; accept its terms" in lines["owner/gated"]
    assert "no such model on the hub" in lines["owner/absent"]
    assert not (tmp_path / "run").exists()
