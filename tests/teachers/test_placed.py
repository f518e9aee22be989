"""A teacher whose blocks are spread over memory and disk says and writes what the whole one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.models.placing import device_map, room
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.collate import collate
from limbeck.runtime.files import read_json
from limbeck.teachers.base import TeacherModel
from limbeck.teachers.in_process import InProcess, InProcessTeacher
from limbeck.teachers.placed import Placed, PlacedTeacher
from limbeck.types import LimbeckError
from tests.tiny_pair import TinyPair, write_model, write_prompts
from tests.training.play import tiny_responses

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("placed") / "teacher", layers=4)


def opened(where: Any, folder: Path, **options: Any) -> Any:
    return where.open(TeacherModel(model=str(folder), **options), device=CPU, progress=None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_on_disk_change_no_bit_of_the_signal(folder: Path, dtype: str) -> None:
    whole: InProcessTeacher = opened(InProcess(), folder, dtype=dtype)
    size = sum(p.numel() for p in whole.skeleton.parameters()) * torch.tensor([], dtype=getattr(torch, dtype)).itemsize
    teacher: PlacedTeacher = opened(Placed(memory={"cpu": f"{size * 2 // 3072}KiB"}), folder, dtype=dtype)
    batch = collate(tiny_responses(), [3, 8, 1], pad_id=0)
    expected, found = whole.signal(batch), teacher.signal(batch)
    assert torch.equal(found.hidden_ND, expected.hidden_ND)  # type: ignore[union-attr]
    assert torch.equal(found.head.weight_VD, expected.head.weight_VD)  # type: ignore[union-attr]
    places = [weight.device.type for weight in teacher._model().model.parameters()]
    assert "meta" in places and "cpu" in places, "some of it is in memory, and some is not"
    # Once more, and after it was let go of: what was read from disk does not stay.
    assert torch.equal(teacher.signal(batch).hidden_ND, expected.hidden_ND)  # type: ignore[union-attr]
    assert [weight.device.type for weight in teacher._model().model.parameters()] == places
    teacher.release()
    assert not teacher.loaded and teacher.fingerprint == whole.fingerprint


PAIRS = {"objective": {"name": "skl"}, "contrast": {"student": {"name": "srkl"}, "beta": "linear"}}


def play(tmp_path: Path, folder: Path, *, some: int, **sections: Any) -> list[Path]:
    """Runs beside the whole teacher and beside one with so many of its bytes in memory, which end alike."""
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i} and {i}."} for i in range(16)]
    pair = TinyPair(teacher=folder, prompts=write_prompts(tmp_path / "prompts.jsonl", rows))
    student = write_model(tmp_path / "student", layers=2, seed=1)
    runs = []
    for where in ("in_process", {"name": "placed", "memory": {"cpu": f"{some}KiB"}}):
        keys = {
            "teacher": {"where": where},
            "student": {"model": str(student), "init": "pretrained", "layers": None},
            "train": {"max_steps": 2},
        }
        tree = pair.tree(tmp_path / str(len(runs)), **keys | sections)
        runs.append(run_pipeline(load_recipe(tree), stages=STAGES).root)
    names = [path.relative_to(runs[0]) for path in runs[0].glob("responses/*.arrow")]
    for name in (Path("student/model.safetensors"), Path("scores.json"), *names):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes(), name
    assert names
    return runs


def test_a_run_beside_a_placed_teacher_is_the_run_beside_a_whole_one(tmp_path: Path, folder: Path) -> None:
    groups = {"groups": ["fidelity", "nll"]}
    runs = play(tmp_path, folder, some=1, responses={"source": "data"}, evaluate=groups)
    name = "signal/000000.safetensors"
    assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()


@pytest.mark.parametrize(
    "sections",
    [
        {"evaluate": {"groups": ["fidelity", "rouge"]}},
        {"responses": {"source": "pairs"}, **PAIRS, "train": {"num_train_epochs": 2, "max_steps": 8}},
        {"responses": {"source": "speculative"}},
        {"responses": {"source": {"name": "student", "teacher_share": 0.5}}},
    ],
    ids=["teacher", "pairs", "speculative", "teacher_share"],
)
def test_a_placed_teacher_writes_what_the_whole_one_does(
    tmp_path: Path, folder: Path, sections: dict[str, Any]
) -> None:
    play(tmp_path, folder, some=60, **sections)


def test_a_small_model_drafts_for_a_placed_teacher(tmp_path: Path, folder: Path) -> None:
    draft = write_model(tmp_path / "draft", layers=1, seed=3)
    runs = play(tmp_path, folder, some=60, responses={"draft": {"model": str(draft)}})
    assert "draft" in read_json(runs[1] / "stages" / "respond.json")


def test_blocks_go_in_order_to_the_first_device_with_room(folder: Path) -> None:
    skeleton = opened(InProcess(), folder).skeleton
    block = sum(p.numel() for p in skeleton.model.layers[0].parameters()) * 4
    outside = sum(p.numel() for p in skeleton.parameters()) * 4 - 4 * block
    places = device_map(skeleton, {0: outside + 2 * block, 1: block, "cpu": block - 1}, 4)
    assert [places[f"model.layers.{i}"] for i in range(4)] == [0, 0, 1, "disk"]
    rest = {name: place for name, place in places.items() if "layers" not in name}
    assert rest.keys() == {"model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"}
    assert set(rest.values()) == {0}
    with pytest.raises(LimbeckError, match=r"embeddings, last norm and head take 0\.00 GiB, and 0 has 0\.00"):
        device_map(skeleton, {0: outside - 1, "cpu": 100 * block}, 4)


def test_blocks_that_come_and_go_have_room_where_all_that_is_free_is_taken(folder: Path) -> None:
    """None is kept for them where all fit, or where a limit was given: the rest of the device is theirs then."""
    skeleton = opened(InProcess(), folder).skeleton
    block = sum(p.numel() for p in skeleton.model.layers[0].parameters()) * 4
    outside = sum(p.numel() for p in skeleton.parameters()) * 4 - 4 * block

    def places(free: int, other: str | int = "cpu", **options: bool) -> list[int | str]:
        found = device_map(skeleton, {0: free, other: 100 * block}, 4, **options)
        return [found[f"model.layers.{i}"] for i in range(4)]

    three = outside + 3 * block
    assert places(three) == [0, 0, 0, "cpu"]
    free = three * 10 // 9
    assert places(free, all_free=True) == [0, "cpu", "cpu", "cpu"]
    assert places(three, 1, all_free=True) == [0, 0, 0, 1], "blocks on another accelerator stay there"
    assert places(outside + 4 * block, all_free=True) == [0] * 4
    assert places(outside + block, all_free=True) == ["cpu"] * 4


def test_room_that_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(LimbeckError, match=r"memory names cuda:9, expected one of .*cpu"):
        room({"cuda:9": "1GiB"}, CPU)
    with pytest.raises(LimbeckError, match=r"memory\.cpu is 'much', expected an amount such as 70GiB"):
        room({"cpu": "much"}, CPU)
    assert room({"cpu": "1GiB"}, CPU) == {"cpu": 2**30}


@pytest.mark.parametrize(
    "sections",
    [{"student": {"init": "depth_prune", "layers": 2}}, {"evaluate": {"groups": ["cost"]}}],
    ids=["student", "cost"],
)
def test_what_asks_for_its_weights_is_refused_before_any_are_read(
    tmp_path: Path, folder: Path, sections: dict[str, Any]
) -> None:
    pair = TinyPair(teacher=folder, prompts=write_prompts(tmp_path / "prompts.jsonl"))
    own = {"student": {"model": str(folder), "init": "pretrained", "layers": None}}
    tree = pair.tree(tmp_path / "run", **own | sections | {"teacher": {"where": "placed"}})
    with pytest.raises(LimbeckError, match=r"its weights, but teacher\.where=placed gives distributions and answers"):
        run_pipeline(load_recipe(tree), stages=STAGES)
    assert not (tmp_path / "run" / "responses").exists()
