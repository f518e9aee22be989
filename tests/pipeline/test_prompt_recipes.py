"""What a recipe says of its prompts, by the real command on a tiny pair."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.limbeck_command import CommandServer
from tests.prompts.chat_templates import THINK_WHEN_TELLING
from tests.tiny_pair import TinyPair, write_prompts


@pytest.fixture(scope="module")
def thinker(tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher with a chat template that has a switch for thinking."""
    folder = tmp_path_factory.mktemp("thinker") / "teacher"
    shutil.copytree(tiny.teacher, folder)
    assert (folder / "chat_template.jinja").exists()
    (folder / "chat_template.jinja").write_text(THINK_WHEN_TELLING, "utf-8")
    return folder


def asked(run: Path, author: str, teacher: Path) -> set[str]:
    """How the prompts of the responses end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    rows = [json.loads(line) for line in (run / "responses" / f"{author}.jsonl").read_text("utf-8").splitlines()]
    return {str(tokenizer.decode(row["prompt_ids"])).rpartition("assistant")[2] for row in rows}


def test_chat_options_reach_the_template(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, thinker: Path) -> None:
    """The answers of the data fit a reasoning template only without a thought; the error names the key that does it."""
    run = tmp_path / "run"
    rows = write_prompts(tmp_path / "p.jsonl", [{"prompt": f"Say {i}.", "completion": f"{i}!"} for i in range(20)])
    sections: dict[str, Any] = {"teacher": {"model": str(thinker)}, "prompts": {"source": str(rows)}}
    recipe = tiny.recipe(run, **sections, responses={"source": "data"})
    refused = limbeck.run("respond", recipe)
    assert refused.code == 2 and "prompts.chat_options={enable_thinking: false}" in refused.error_line
    off = "prompts.chat_options={enable_thinking: false}"
    played = limbeck.run("respond", recipe, off, "--update")
    assert played.code == 0, played.stderr
    assert asked(run, "data", thinker) == {"\n<think>\n\n</think>\n\n"}

    # They are an input of the responses, not of the prompts.
    back = limbeck.run("respond", recipe, "responses.source=teacher", "prompts.chat_options={}", "--update")
    assert back.code == 0 and "prompts: done earlier" in back.stderr, back.stderr
    assert asked(run, "teacher", thinker) == {"\n"}
    assert limbeck.run("respond", recipe, "responses.source=teacher", off).code == 2
    whole = limbeck.run("run", recipe, "responses.source=teacher", off, "train.max_steps=2", "--update")
    assert whole.code == 0, whole.stderr
    assert asked(run, "teacher", thinker) == {"\n<think>\n\n</think>\n\n"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["prompts.chat_options={enable_thinkin: false}"], ("'enable_thinkin'", "no variable of the chat template")),
        (["prompts.chat_options={add_generation_prompt: false}"], ("'add_generation_prompt'", "leave it out")),
        (["prompts.chat_options={a: 1}", "prompts.template=plain"], ("'plain'", "prompts.template=chat")),
        (["prompts.chat_options=[a]"], ("prompts.chat_options", "['a']")),
    ],
)
def test_chat_options_without_effect_are_refused(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, thinker: Path, overrides: list[str], words: tuple[str, ...]
) -> None:
    recipe = tiny.recipe(tmp_path / "run", teacher={"model": str(thinker)})
    finished = limbeck.run("respond", recipe, *overrides)
    assert finished.code == 2
    for word in words:
        assert word in finished.error_line


def test_without_a_network_a_hub_id_is_refused_at_once_and_quietly(tiny: TinyPair, tmp_path: Path) -> None:
    """In a process of its own: the libraries read at their import whether they may use the network."""
    recipe = tiny.recipe(tmp_path / "run", prompts={"source": "nobody/nothing"})
    command = [sys.executable, "-m", "limbeck", "prompts", str(recipe)]
    away = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    took: list[float] = []
    for source, said in (
        ("nobody/nothing", ("nobody/nothing is neither", "the hub cannot be reached")),
        (str(tmp_path / "none.jsonl"), ("does not exist",)),
    ):
        began = time.monotonic()
        each = [*command, f"prompts.source={source}", f"output_dir={tmp_path / str(len(took))}"]
        done = subprocess.run(each, env=os.environ | away, capture_output=True, text=True, check=False)
        took.append(time.monotonic() - began)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert all(part in done.stderr for part in said), done.stderr
    # Most of it is importing torch and its kin, which a file that is missing takes too.
    assert took[0] < 2 * took[1] + 5
