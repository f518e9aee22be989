"""The command line: what each verb does, what goes to standard output, what a person sees."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from limbeck.objectives import OBJECTIVES
from limbeck.recipe.load import known_keys, load_recipe, shipped_recipes
from tests.limbeck_command import ROOT, CommandServer
from tests.tiny_pair import TinyPair

VERBS = ("prompts", "respond", "teach", "train", "evaluate", "report")
STAGES = ("prompts", "respond", "teach", "train", "evaluate", "report")


class TestLookingUp:
    def test_version(self, limbeck: CommandServer) -> None:
        finished = limbeck.run("--version")
        assert (finished.code, finished.stdout, finished.stderr) == (0, f"limbeck {version('limbeck')}\n", "")

    def test_help(self, limbeck: CommandServer) -> None:
        finished = limbeck.run("--help")
        assert finished.code == 0 and finished.stderr == ""
        for verb in ("run", *VERBS, "objectives", "sources", "doctor", "init", "schema"):
            assert re.search(rf"^  {verb} ", finished.stdout, re.MULTILINE), verb

    def test_objectives(self, limbeck: CommandServer) -> None:
        finished = limbeck.run("objectives")
        assert finished.code == 0
        listed = [line.split()[0] for line in finished.stdout.splitlines() if not line.startswith(" ")]
        assert listed == list(OBJECTIVES)

    def test_devices_need_no_recipe(self, limbeck: CommandServer) -> None:
        found = limbeck.run("plan", "--list")
        assert found.code == 0 and "H100" in found.stdout and found.stderr == ""

    def test_schema(self, limbeck: CommandServer) -> None:
        finished = limbeck.run("schema")
        schema = json.loads(finished.stdout)
        assert finished.code == 0 and finished.stderr == ""
        for key in set(known_keys()) - {"objective.options"}:
            section, definition = key.split("."), schema
            for part in section:
                entry = definition["properties"][part]
                names = [one["$ref"] for one in (entry, *entry.get("anyOf", ())) if "$ref" in one]
                definition = schema["$defs"][names[0].rpartition("/")[2]] if names else entry
        assert set(schema["$defs"]["ObjectiveSection"]["properties"]["name"]["enum"]) == set(OBJECTIVES)

    def test_quickly(self) -> None:
        """`import limbeck` and the help page need none of the heavy libraries."""
        code = (
            "import sys, limbeck, limbeck.cli; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "[]\n"


class TestRecipes:
    @pytest.mark.parametrize("name", shipped_recipes())
    def test_print_config_round_trip(self, limbeck: CommandServer, tmp_path: Path, name: str) -> None:
        printed = limbeck.run("run", name, "train.learning_rate=2e-5", "--print-config")
        assert printed.code == 0 and printed.stderr == ""
        path = tmp_path / "printed.yaml"
        path.write_text(printed.stdout, "utf-8")
        again = limbeck.run("run", path, "--print-config")
        assert again.stdout == printed.stdout
        assert load_recipe(path) == load_recipe(name, ["train.learning_rate=2e-5"])
        assert load_recipe(path).train.learning_rate == 2e-5

    def test_init(self, limbeck: CommandServer, tmp_path: Path) -> None:
        written = limbeck.run("init", "mine.yaml", cwd=tmp_path)
        assert written.code == 0 and "limbeck run mine.yaml" in written.stdout
        assert load_recipe(tmp_path / "mine.yaml", ["name=quickstart"]) == load_recipe("quickstart")
        before = (tmp_path / "mine.yaml").read_bytes()
        again = limbeck.run("init", "mine.yaml", cwd=tmp_path)
        assert again.code == 2 and "mine.yaml exists" in again.error_line
        assert (tmp_path / "mine.yaml").read_bytes() == before
        copied = limbeck.run("init", "copy.yaml", "--from", "mine.yaml", cwd=tmp_path)
        assert copied.code == 0 and (tmp_path / "copy.yaml").read_bytes() == before
        unknown = limbeck.run("init", "other.yaml", "--from", "quickstrat", cwd=tmp_path)
        assert unknown.code == 2 and "'quickstart'" in unknown.error_line


class TestRuns:
    def test_stage_by_stage(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        """Each verb plays up to its stage and reuses what is there; `run` does the rest."""
        run = tmp_path / "run"
        recipe = tiny.recipe(run, train={"max_steps": 3})
        too_early = limbeck.run("report", recipe)
        assert too_early.code == 2 and "no run directory yet" in too_early.error_line
        for number, verb in enumerate(VERBS[:-1], start=1):
            finished = limbeck.run(verb, recipe)
            assert finished.code == 0, finished.stderr
            assert finished.stdout == f"{run}\n"
            done = {path.stem for path in (run / "stages").iterdir()}
            assert done == set(STAGES[:number])
            assert finished.stderr.count("done earlier") == number - 1
            half = limbeck.run("report", recipe)
            assert (half.code, half.stdout) == (0, f"{run / 'report.html'}\n"), half.stderr
        whole = limbeck.run("run", recipe)
        assert whole.code == 0 and whole.stdout == f"{run / 'report.html'}\n"
        assert whole.stderr.count("done earlier") == len(STAGES) - 1

    def test_words(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        """Standard error carries limbeck's own lines and no library's; a run directory is a recipe, also when moved."""
        run = tmp_path / "run"
        finished = limbeck.run("run", tiny.recipe(run))
        assert finished.code == 0 and finished.stdout == f"{run / 'report.html'}\n"
        first, *lines = finished.stderr.splitlines()
        step = "4 responses per step (4 per device x 1 accumulated x 1 process)"
        assert first == f"launch: 1 process, wrapper none; {step}"
        for line in lines:
            assert re.match(rf"({'|'.join(STAGES)}): |depth pruning \d", line), line
        moved = run.rename(tmp_path / "moved")
        again = limbeck.run("run", moved)
        assert again.code == 0 and again.stdout == f"{moved / 'report.html'}\n"
        assert again.stderr.count("done earlier") == len(STAGES)
        assert yaml.safe_load((moved / "recipe.resolved.yaml").read_text())["output_dir"] == str(moved)
        more = limbeck.run("run", moved, "train.save_steps=5", "train.logging_steps=2")
        assert more.code == 0, more.stderr

    def test_debug(self, limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
        recipe = tiny.recipe(tmp_path / "run")
        finished = limbeck.run("run", recipe, "teacher.model=./nowhere", "--debug")
        assert finished.code == 1
        assert "Traceback" in finished.stderr and "LimbeckError: no model './nowhere'" in finished.stderr

    def test_terminal(self, tiny: TinyPair, tmp_path: Path) -> None:
        """The installed command in a terminal: a bar with tokens a second and time left, and nothing broken."""
        run = tmp_path / "run"
        ours, theirs = pty.openpty()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "120"}
        process = subprocess.Popen(
            [sys.executable, "-m", "limbeck", "run", str(tiny.recipe(run))],
            cwd=ROOT,
            env=environment,
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=theirs,
        )
        os.close(theirs)
        shown = b""
        try:
            while block := os.read(ours, 1 << 16):
                shown += block
        except OSError:
            # How a terminal says that its other side has gone.
            pass
        os.close(ours)
        printed, _ = process.communicate(timeout=60)
        text = shown.decode()
        assert process.returncode == 0, text
        assert printed.decode() == f"{run / 'report.html'}\n"
        assert "tokens/s" in text and "step 12/12" in text and re.search(r"\d:\d\d:\d\d", text)
        assert "Traceback" not in text and "Warning" not in text

    def test_reader_gone(self) -> None:
        """`limbeck objectives | head -1` ends quietly."""
        shell = f"{sys.executable} -m limbeck objectives | head -n 1"
        done = subprocess.run(shell, shell=True, capture_output=True, text=True, cwd=ROOT, check=True)
        assert len(done.stdout.splitlines()) == 1 and done.stderr == ""
