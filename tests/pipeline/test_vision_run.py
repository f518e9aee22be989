"""Runs with images from prompts to report: one pair of tiny image-text models, played by the command."""

from __future__ import annotations

import json
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL", reason="images need Pillow: pip install 'limbeck[vision]'")

from limbeck.models.loading import load_model
from limbeck.models.vision import bind_images, require_reader
from limbeck.rollouts.io import read_responses
from tests.limbeck_command import CommandServer, KillAt
from tests.tiny_pair import write_recipe
from tests.tiny_vision import write_questions, write_vision_model


@dataclass(frozen=True)
class VisionRun:
    """A pair and questions on disk."""

    folder: Path

    @classmethod
    def write(cls, folder: Path) -> VisionRun:
        write_vision_model(folder / "teacher", "qwen2_vl", seed=1, layers=3)
        write_vision_model(folder / "student", "qwen2_vl", seed=2, patch=16, layers=1)
        write_questions(folder, 24)
        return cls(folder)

    def recipe(self, output: Path, **sections: dict[str, Any]) -> Path:
        tree: dict[str, Any] = {
            "name": "seeing",
            "output_dir": str(output),
            "teacher": {"model": str(self.folder / "teacher")},
            "student": {"model": str(self.folder / "student")},
            "prompts": {"source": str(self.folder / "questions.jsonl"), "eval_fraction": 0.25},
            "responses": {"max_new_tokens": 5, "batch_size": 8},
            "train": {
                "max_steps": 5,
                "per_device_train_batch_size": 4,
                "learning_rate": 1.0e-3,
                "save_steps": 2,
                "compile": "off",
            },
            "evaluate": {"max_new_tokens": 4, "samples": 1, "groups": ["fidelity"]},
        }
        for name, section in sections.items():
            tree[name] = {**tree.get(name, {}), **section}
        return write_recipe(output.with_suffix(".yaml"), tree)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> VisionRun:
    return VisionRun.write(tmp_path_factory.mktemp("seeing"))


def content(run: Path) -> dict[str, bytes]:
    """What a run wrote, without times and logs."""
    names = ["prompts.jsonl", "responses/teacher.jsonl", "student/model.safetensors"]
    names += [f"images/{path.name}" for path in (run / "images").iterdir()]
    return {name: (run / name).read_bytes() for name in names}


def test_a_run_ends_as_if_it_had_not_been_killed(limbeck: CommandServer, seeing: VisionRun, tmp_path: Path) -> None:
    """kill -9 while images are kept, answers written, signals kept and weights trained; the files are the same."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finished = limbeck.run("run", seeing.recipe(whole))
    assert finished.code == 0, finished.stderr
    recipe = seeing.recipe(broken)
    for name, before in (
        ("images/*", 5),
        ("responses/batches/00001.jsonl", 0),
        ("checkpoints/step-000002", 0),
        ("checkpoints/step-000004", 0),
    ):
        assert limbeck.run("run", recipe, killed=KillAt(broken, name, before)).code == -signal.SIGKILL, name
    again = limbeck.run("run", recipe)
    assert again.code == 0, again.stderr
    assert content(whole) == content(broken)
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text("utf-8").splitlines() if "loss" in line]
        for run in (whole, broken)
    ]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]

    # Each answer belongs to the image of its own prompt, whatever the order in which rows were read and batches made.
    prompts = {row["id"]: row for row in map(json.loads, (whole / "prompts.jsonl").read_text("utf-8").splitlines())}
    responses = read_responses(whole / "responses" / "teacher.jsonl")
    assert len(responses) == 24
    for response in responses:
        shown = [part["image"] for part in prompts[response.prompt_id]["messages"][0]["content"] if "image" in part]
        assert list(response.images) == shown

    # The student reads with its own processor, where an image is fewer tokens than for the teacher.
    lengths = []
    for folder in (seeing.folder / "teacher", whole / "student"):
        loaded = load_model(folder)
        bind_images(loaded.model, whole / "images")
        lengths.append(len(require_reader(loaded.model).expand(responses[0].prompt_ids, responses[0].images).ids))
    assert lengths[0] > lengths[1] >= len(responses[0].prompt_ids)


def test_another_image_is_another_run(limbeck: CommandServer, seeing: VisionRun, tmp_path: Path) -> None:
    """An edited image file is seen, and a broken one is refused with its row before anything works."""
    folder = tmp_path / "data"
    write_questions(folder, 12, seed=5)
    recipe = seeing.recipe(tmp_path / "run", prompts={"source": str(folder / "questions.jsonl")})
    assert limbeck.run("prompts", recipe).code == 0
    picture = folder / "pictures" / "5-3.png"
    data = picture.read_bytes()
    picture.write_bytes((folder / "pictures" / "5-4.png").read_bytes())
    changed = limbeck.run("prompts", recipe)
    assert changed.code == 2 and "--update" in changed.error_line
    picture.write_bytes(data[:60])
    cut = limbeck.run("prompts", recipe, "--update")
    assert cut.code == 2 and "line 4: image 1 ('pictures/5-3.png')" in cut.error_line


REFUSED: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "judge": ({"evaluate": {"groups": {"judge": {"base_url": "http://localhost:1/v1"}}}}, "a judge"),
    "pruning": ({"student": {"model": None, "init": "depth_prune", "layers": 2}}, "the pruning of blocks"),
    "both_sample": ({"responses": {"source": "speculative"}}, "a sampler of both models"),
    "template": ({"prompts": {"template": "alpaca"}}, "has images, which template 'alpaca' has no words for"),
    "fresh_tower": (
        {"student": {"init": "scratch"}},
        "student.freeze_vision=true would leave a vision tower of fresh weights",
    ),
    "too_long": ({"responses": {"max_new_tokens": 145}}, "has 17 tokens, expected at most 15"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_read_images_is_refused(
    limbeck: CommandServer, seeing: VisionRun, tmp_path: Path, name: str
) -> None:
    sections, message = REFUSED[name]
    refused = limbeck.run("run", seeing.recipe(tmp_path / "run", **sections))
    assert refused.code == 2 and message in refused.error_line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_model_without_its_processor_is_named(
    limbeck: CommandServer, seeing: VisionRun, tmp_path: Path, who: str
) -> None:
    folder = tmp_path / "blind"
    shutil.copytree(seeing.folder / who, folder, ignore=shutil.ignore_patterns("*processor_config.json"))
    refused = limbeck.run("run", seeing.recipe(tmp_path / "run", **{who: {"model": str(folder)}}))
    assert refused.code == 2 and not (tmp_path / "run").exists()
    assert f"{folder} has no processor (preprocessor_config.json is missing)" in refused.error_line


def test_a_student_of_another_family_is_named(limbeck: CommandServer, seeing: VisionRun, tmp_path: Path) -> None:
    other = write_vision_model(tmp_path / "llava", "llava", layers=1)
    refused = limbeck.run("run", seeing.recipe(tmp_path / "run", student={"model": str(other)}))
    assert refused.code == 2 and f"writes <|image_pad|> for one, the student {other} <image>)" in refused.error_line
    assert "questions.jsonl, line " in refused.error_line and "a student of the teacher's family" in refused.error_line


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_processor_of_another_size_is_refused_before_anybody_answers(
    limbeck: CommandServer, seeing: VisionRun, tmp_path: Path, who: str
) -> None:
    folders = {one: write_vision_model(tmp_path / one, "llava", layers=1) for one in ("teacher", "student")}
    path = folders[who] / "preprocessor_config.json"
    larger = {"crop_size": {"height": 64, "width": 64}, "size": {"shortest_edge": 64}}
    path.write_text(json.dumps(json.loads(path.read_text()) | larger))
    sections: dict[str, dict[str, Any]] = {one: {"model": str(folder)} for one, folder in folders.items()}
    refused = limbeck.run("run", seeing.recipe(tmp_path / "run", **sections))
    assert refused.code == 2 and f"{folders[who]}: its model fails on what its processor makes" in refused.error_line
    assert "do not belong together" in refused.error_line and not (tmp_path / "run" / "responses").exists()


def test_an_image_that_a_processor_refuses_is_named_with_its_row(
    limbeck: CommandServer, seeing: VisionRun, tmp_path: Path
) -> None:
    from PIL import Image

    source = write_questions(tmp_path / "data", 12, seed=5)
    Image.new("RGB", (500, 2)).save(tmp_path / "data" / "pictures" / "5-7.png")
    refused = limbeck.run("run", seeing.recipe(tmp_path / "run", prompts={"source": str(source)}))
    assert refused.code == 2
    assert re.search(
        r"questions\.jsonl, line 8: 'What shape\?'\): image 1 \(\w{32}\): Qwen2VLProcessor refuses the image",
        refused.error_line,
    )
    assert not (tmp_path / "run" / "responses").exists()


@pytest.mark.parametrize("source", ["data", "student", "pairs"])
def test_other_authors_see_images_too(limbeck: CommandServer, seeing: VisionRun, tmp_path: Path, source: str) -> None:
    objective = {"objective": {"name": "skl"}} if source == "pairs" else {}
    recipe = seeing.recipe(tmp_path / "run", responses={"source": source}, **objective)
    finished = limbeck.run("run", recipe)
    assert finished.code == 0, finished.stderr
    scores = json.loads((tmp_path / "run" / "scores.json").read_text("utf-8"))
    assert scores["before"]["forward_kl"]["mean"] != scores["after"]["forward_kl"]["mean"]
