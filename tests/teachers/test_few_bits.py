"""A teacher whose linear layers are in few bits: what is rounded, what is not, and what a run makes of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from limbeck.models.few_bits import FORMATS
from limbeck.ops import onednn
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.collate import collate
from limbeck.teachers.base import TeacherModel
from limbeck.teachers.in_process import InProcess, InProcessTeacher
from limbeck.teachers.parts import rows_of_batch
from limbeck.types import LimbeckError
from tests.tiny_pair import TinyPair, write_model, write_prompts
from tests.training.play import tiny_responses

INSTALLED = [bits for bits, one in FORMATS.items() if importlib.util.find_spec(one.library)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Wide enough that a row of weights holds more than one block of scales.
    return write_model(tmp_path_factory.mktemp("bits") / "teacher", layers=3, width=64)


@pytest.fixture(params=FORMATS, ids=lambda bits: FORMATS[bits].name)
def bits(request: pytest.FixtureRequest) -> int:
    if request.param not in INSTALLED:
        pytest.skip(f"{FORMATS[request.param].library} is not installed")
    return request.param


def opened(folder: Path, **options: Any) -> InProcessTeacher:
    return InProcess().open(TeacherModel(model=str(folder), **options), device=torch.device("cpu"), progress=None)


def rounded(weight_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """A matrix as the library keeps it, as numbers."""
    if bits == 8:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # type: ignore[import-not-found]

        alone: Any = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
        alone.weight.data = weight_OI.clone()
        quantize_(alone, Int8WeightOnlyConfig())
        return alone.weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # type: ignore[import-not-found]

    return dequantize_4bit(*quantize_4bit(weight_OI.clone(), quant_type="nf4"))


def require_nearest(found_OI: torch.Tensor, weight_OI: torch.Tensor, bits: int) -> None:
    """To 8 bits by the largest of each row, to 4 by the nearest of sixteen values times the largest of 64 weights."""
    if bits == 8:
        step_O1 = weight_OI.abs().amax(1, keepdim=True) / 127.5
        assert bool(((found_OI - weight_OI).abs() <= 0.51 * step_O1).all())
        return
    from bitsandbytes.functional import get_4bit_type  # type: ignore[import-not-found]

    values_V, blocks_NB = get_4bit_type("nf4", device="cpu"), weight_OI.reshape(-1, 64)
    scale_N1 = blocks_NB.abs().amax(1, keepdim=True)
    nearest_NB = (blocks_NB[..., None] / scale_N1[..., None] - values_V).abs().argmin(-1)
    torch.testing.assert_close(found_OI, (values_V[nearest_NB] * scale_N1).reshape(weight_OI.shape))


def test_it_says_what_the_rounded_teacher_says(folder: Path, bits: int) -> None:
    whole, teacher = opened(folder), opened(folder, bits=bits)
    batch = collate(tiny_responses(), [3, 8, 1], pad_id=0)
    found, plain = teacher.signal(batch), whole.signal(batch)
    assert torch.equal(found.head.weight_VD, plain.head.weight_VD), "the head is whole"  # type: ignore[union-attr]
    few, model = teacher.weights().model.model, whole.weights().model.model
    assert torch.equal(few.norm.weight, model.norm.weight)
    with torch.no_grad():
        for module in model.layers.modules():
            if isinstance(module, nn.Linear):
                rounded_OI = rounded(module.weight, bits)
                require_nearest(rounded_OI, module.weight, bits)
                module.weight.copy_(rounded_OI)
    expected_ND, found_ND = whole.signal(batch).hidden_ND, found.hidden_ND  # type: ignore[union-attr]
    gap = (found_ND - expected_ND).norm() / expected_ND.norm()
    # On a CPU bitsandbytes multiplies in 16 bits.
    assert gap < (1e-5 if bits == 8 else 0.05), gap
    assert (plain.hidden_ND - expected_ND).norm() / expected_ND.norm() > 0.05  # type: ignore[union-attr]


def test_what_is_not_rounded_is_in_the_precision_of_the_teacher(folder: Path, bits: int) -> None:
    model = opened(folder, bits=bits, dtype="bfloat16").weights().model
    left = [model.lm_head.weight, model.model.norm.weight, model.model.embed_tokens.weight]
    assert {weight.dtype for weight in left} == {torch.bfloat16} and {type(one) for one in left} == {nn.Parameter}


def test_what_it_says_of_a_response_does_not_depend_on_those_beside_it(folder: Path, bits: int) -> None:
    teacher = opened(folder, bits=bits)
    batch = collate(tiny_responses(), [3, 8, 1], pad_id=0)
    together_ND = teacher.signal(batch).hidden_ND  # type: ignore[union-attr]
    alone = [teacher.signal(rows_of_batch(batch, [row])).hidden_ND for row in range(3)]  # type: ignore[union-attr]
    torch.testing.assert_close(torch.cat(alone), together_ND, rtol=1e-5, atol=1e-5)


def test_its_weights_take_what_the_plan_says(folder: Path, bits: int) -> None:
    model = opened(folder, bits=bits).weights().model
    linears = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    kept = sum(_bytes_kept(module) for module in linears)
    numbers = sum(module.in_features * module.out_features for module in linears)
    # Of a row so short as these, int8's scale and zero point count.
    assert FORMATS[bits].bytes <= kept / numbers <= FORMATS[bits].bytes + 8 / 64


def _bytes_kept(module: nn.Linear) -> int:
    """Bytes of a weight and its scales."""
    weight: Any = module.weight
    if hasattr(weight, "__tensor_flatten__"):
        parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    else:
        parts = [weight, weight.quant_state.absmax]
    return sum(part.numel() * part.element_size() for part in parts)


def test_a_run_with_it_writes_by_it_and_cuts_its_student_out_of_the_whole_one(
    tmp_path: Path, folder: Path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the kernels of a CPU on which oneDNN is ahead.
    monkeypatch.setattr(onednn, "preferred", onednn.available)
    pair = TinyPair(teacher=folder, prompts=write_prompts(tmp_path / "prompts.jsonl"))
    sections = {
        "student": {"init": "depth_prune", "layers": 2},
        "train": {"max_steps": 2, "compile": "off"},
        "evaluate": {"groups": ["fidelity"]},
    }
    recipe = load_recipe(pair.tree(tmp_path / "run", **sections, teacher={"bits": bits}))
    run = run_pipeline(recipe, stages=STAGES).root
    scores = json.loads((run / "scores.json").read_text())
    assert scores["after"]
    whole = run_pipeline(load_recipe(pair.tree(tmp_path / "whole", **sections)), stages=STAGES).root
    answers = [(root / "responses" / "teacher.jsonl").read_bytes() for root in (run, whole)]
    assert answers[0] != answers[1], "the rounded teacher writes"
    assert opened(folder, bits=bits).fingerprint != opened(folder).fingerprint


def test_a_library_that_is_missing_is_named_before_anything_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for bits, one in FORMATS.items():
        with pytest.raises(LimbeckError, match=rf"teacher\.bits={bits} needs {one.library}.*limbeck\[bits\]"):
            opened(folder, bits=bits).reach()


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"bits": 8, "where": "placed"}, r"teacher\.where=placed does not; remove teacher\.bits"),
        ({"bits": 8, "model": "base"}, r"teacher\.model=base is the student; remove teacher\.bits"),
        ({"bits": 5}, r"teacher\.bits"),
    ],
)
def test_bits_that_cannot_be(tmp_path: Path, folder: Path, teacher: dict[str, Any], said: str) -> None:
    pair = TinyPair(teacher=folder, prompts=write_prompts(tmp_path / "prompts.jsonl"))
    student = {"init": "pretrained", "model": str(folder), "layers": None}
    with pytest.raises(LimbeckError, match=said):
        load_recipe(pair.tree(tmp_path / "run", teacher=teacher, student=student))
