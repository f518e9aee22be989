"""Students in few bits: what is trained is what the blocks stand for, and gradients pass as if nothing were rounded."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.models.heads import head_of
from limbeck.models.loading import LoadedModel, load_model
from limbeck.models.quantization import FORMATS, dequantise, quantise
from limbeck.models.quantization.files import BLOCKS_FILE, read_blocks, save_blocks
from limbeck.models.quantization.importance import importance_of
from limbeck.ops import onednn
from limbeck.rollouts.collate import collate
from limbeck.student.adapters import LoraSpec
from limbeck.student.build import Student, StudentSpec, build_student
from limbeck.student.quantizing import QuantizeSpec
from limbeck.student.saving import merged_state, save_student
from limbeck.types import LimbeckError
from tests.models.tiny import save_tiny
from tests.training.play import VOCAB, play, settings, stop_after, tiny_model, tiny_responses, weights
from tests.training.play import identical as same_weights

IDS_BT = torch.tensor([[5, 6, 7, 8, 9, 3], [9, 4, 4, 30, 2, 1]])


def write(folder: Path, *, tied: bool = True, width: int = 32) -> LoadedModel:
    from tests.tiny_pair import write_model

    write_model(folder, width=width)
    loaded = load_model(folder)
    model = tiny_model(3, tied=tied, width=width)
    model.save_pretrained(folder)
    return LoadedModel(model=model, tokenizer=loaded.tokenizer, provenance=load_model(folder).provenance)


def student_of(teacher: LoadedModel, **changes: Any) -> Student:
    lora = changes.pop("lora", None)
    checkpointing = changes.pop("gradient_checkpointing", False)
    spec = StudentSpec(
        init="teacher", quantize=QuantizeSpec(**changes), lora=lora, gradient_checkpointing=checkpointing
    )
    return build_student(spec, teacher=teacher)


def rounded(model: nn.Module, format: str, embeddings: str | None) -> nn.Module:
    """The naive line: a plain model whose weights are quantised and dequantised one after the other."""
    plain: Any = copy.deepcopy(model)
    ends = {id(plain.get_input_embeddings().weight), id(plain.get_output_embeddings().weight)}
    with torch.no_grad():
        for weight in plain.parameters():
            chosen = embeddings if id(weight) in ends else format
            if weight.ndim == 2 and chosen is not None:
                known = FORMATS.build(chosen)
                weight.copy_(dequantise(known, quantise(known, weight)))
    return plain


def gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        yield name, parameter.grad


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS_BT).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("format", "embeddings"), [("q4_0", "q8_0"), ("q8_0", None), ("int4_g32", "q4_0"), ("q5_0", "int4_g32")]
)
def test_it_computes_with_the_rounded_weights(tmp_path: Path, tied: bool, format: str, embeddings: str | None) -> None:
    teacher = write(tmp_path / "teacher", tied=tied)
    student = student_of(teacher, format=format, embeddings=embeddings)
    plain = rounded(teacher.model, format, embeddings)
    # Once under each mode: what one of them keeps must serve the others.
    with torch.inference_mode():
        assert torch.equal(logits(student.model), logits(plain))
    ours, theirs = logits(student.model), logits(plain)
    assert torch.equal(ours, theirs)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    found = {name.replace("parametrizations.weight.original", "weight"): g for name, g in gradients(student.model)}
    assert same_weights(found, dict(gradients(plain)))


def test_grids_chosen_by_importance(tmp_path: Path) -> None:
    teacher = write(tmp_path / "teacher")
    responses = tiny_responses(6)
    batch = collate(dict(enumerate(responses)), range(len(responses)), pad_id=0)
    spec = QuantizeSpec(format="q4_0", grid="importance")
    student = build_student(StudentSpec(init="teacher", quantize=spec), teacher=teacher, calibration=[batch])
    importance = importance_of(teacher.model, [batch], device=torch.device("cpu"))
    assert student.quantization is not None
    packed, known = student.quantization.packed(student.model), FORMATS.build("q4_0")
    changed = 0
    for name, importance_I in importance.items():
        if packed.formats.get(name) != "q4_0":
            continue
        weight = teacher.model.get_parameter(name)
        chosen = dequantise(known, packed.blocks[name])
        plain = dequantise(known, quantise(known, weight))
        ours, theirs = (((w - weight).square() * importance_I).sum() for w in (chosen, plain))
        # Importance enters rounded to bfloat16, so a block may lose what that is worth.
        assert ours <= theirs * 1.001, name
        changed += not torch.equal(chosen, plain)
        # What is computed with is what the blocks stand for.
        module: Any = student.model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(module.weight, chosen)
    assert changed > 10


def test_k_quants_of_wide_rows(tmp_path: Path) -> None:
    teacher = write(tmp_path / "teacher", width=256)
    student = student_of(teacher, format="q4_k", embeddings="q6_k")
    assert torch.equal(logits(student.model), logits(rounded(teacher.model, "q4_k", "q6_k")))


def test_updates_move_the_floats_and_the_rounded_weights_follow(tmp_path: Path) -> None:
    student = student_of(write(tmp_path / "teacher"), format="q4_0")
    model: Any = student.model
    layer = model.model.layers[0].mlp.up_proj
    before, float_before = layer.weight.detach().clone(), layer.parametrizations["weight"].original.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)
    for _ in range(3):
        logits(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    original = layer.parametrizations["weight"].original
    assert not torch.equal(original, float_before) and not torch.equal(layer.weight, before)
    assert student.quantization is not None
    packed = student.quantization.packed(student.model)
    for name, chosen in packed.formats.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(module.weight, dequantise(FORMATS.build(chosen), packed.blocks[name])), name
    assert (
        model.lm_head.parametrizations["weight"].original
        is model.model.embed_tokens.parametrizations["weight"].original
    )
    assert torch.equal(head_of(model, VOCAB).weight_VD, model.model.embed_tokens.weight)


def test_recomputed_activations_give_the_same_gradients(tmp_path: Path) -> None:
    teacher = write(tmp_path / "teacher")
    plain, recomputed = (student_of(teacher, format="q4_0", gradient_checkpointing=on) for on in (False, True))
    for student in (plain, recomputed):
        student.model.train()
        with onednn.linears():
            logits(student.model).square().mean().backward()
    assert same_weights(dict(gradients(plain.model)), dict(gradients(recomputed.model)))


def test_saved_weights_are_those_that_were_trained(tmp_path: Path) -> None:
    student = student_of(write(tmp_path / "teacher"), format="q4_0")
    play(student.model, tmp_path / "training", settings(learning_rate=0.01))
    trained = logits(student.model.eval())
    folder = save_student(student.model, student.tokenizer, tmp_path / "student", quantization=student.quantization)
    assert torch.equal(logits(load_model(folder).model), trained)
    saved, blocks = load_file(folder / "model.safetensors"), read_blocks(folder)
    assert blocks is not None and blocks.trained == "straight_through"
    assert set(blocks.formats) == {name for name, weight in saved.items() if weight.ndim == 2}
    for name, chosen in blocks.formats.items():
        assert torch.equal(saved[name], dequantise(FORMATS.build(chosen), blocks.blocks[name]))
    assert "lm_head.weight" not in saved
    assert not [name for name in saved if "grid" in name or "parametrizations" in name]


def test_a_training_that_was_stopped_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    teacher, ends = write(tmp_path / "teacher"), []
    for name in ("straight", "stopped"):
        student = student_of(teacher, format="q4_0")
        if name == "stopped":
            with pytest.raises(Exception, match="after step 2"):
                play(student.model, tmp_path / name, settings(learning_rate=0.01), should_stop=stop_after(2))
            student = student_of(teacher, format="q4_0")
        ends.append(weights(play(student.model, tmp_path / name, settings(learning_rate=0.01))))
    assert same_weights(*ends)
    assert not same_weights(ends[0], weights(student_of(teacher, format="q4_0").model))


def test_adapters_on_frozen_blocks(tmp_path: Path) -> None:
    teacher = write(tmp_path / "teacher")
    student = student_of(teacher, format="int4_g32", embeddings=None, weights="frozen", lora=LoraSpec(r=2))
    plain = rounded(teacher.model, "int4_g32", None)
    assert torch.equal(logits(student.model), logits(plain))
    play(student.model, tmp_path / "training", settings(learning_rate=0.01))
    folder = save_student(student.model, student.tokenizer, tmp_path / "student", quantization=student.quantization)
    saved, blocks = load_file(folder / "model.safetensors"), read_blocks(folder)
    assert blocks is not None and blocks.trained == "frozen"
    moved = 0
    for name, weight in plain.state_dict().items():
        if name in blocks.blocks:
            base = dequantise(FORMATS.build("int4_g32"), blocks.blocks[name])
            assert torch.equal(base, weight)
            moved += not torch.equal(saved[name], base)
    assert moved == len(blocks.blocks)
    torch.testing.assert_close(logits(load_model(folder).model), logits(student.model.eval()), rtol=1e-4, atol=1e-4)
    assert json.loads((folder / "quantized/adapter_config.json").read_text("utf-8"))["r"] == 2
    assert (folder / "quantized/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "q4"}, "quantisation format 'q4' is unknown (nearest: 'q4_k')"),
        ({"format": "q4_k"}, "are no multiple of the 256 of a block of q4_k; set student.quantize.fallback=q5_0"),
        ({"format": "nf4"}, "of a block of nf4; set student.quantize.fallback=q4_0"),
        ({"format": "q4_0", "embeddings": "q6_k"}, "set student.quantize.embeddings to one of q4_0"),
        ({"format": "q4_0", "lora": LoraSpec()}, "set student.quantize.weights=frozen, or remove student.lora"),
        ({"format": "q4_0", "weights": "frozen"}, "leaves nothing to train; add student.lora={r: 16}"),
    ],
)
def test_what_cannot_be(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(LimbeckError) as error:
        student_of(write(tmp_path / "teacher"), **changes)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_matrices_outside_of_linear_layers_are_refused(tmp_path: Path, family: str) -> None:
    teacher = load_model(save_tiny(tmp_path / "teacher", family))
    with pytest.raises(LimbeckError, match="only linear layers and token embeddings can be quantised"):
        student_of(teacher, format="q4_0", fallback="q8_0")


def test_weights_beyond_the_scales_are_refused(tmp_path: Path) -> None:
    teacher = write(tmp_path / "teacher")
    with torch.no_grad():
        teacher.model.get_submodule("model.layers.0.mlp.up_proj").weight[0, 0] = 1e6  # type: ignore[operator]
    teacher.model.save_pretrained(tmp_path / "teacher")
    with pytest.raises(LimbeckError, match="beyond the scales of q4_0"):
        student_of(teacher, format="q4_0")


def test_blocks_are_the_same_file_each_time_and_those_of_earlier_versions_are_read(tmp_path: Path) -> None:
    student = student_of(write(tmp_path / "teacher"), format="q8_0")
    assert student.quantization is not None
    blocks, files = student.quantization.packed(student.model), set[bytes]()
    for number in range(8):
        save_blocks(tmp_path / str(number), blocks)
        files.add((tmp_path / str(number) / BLOCKS_FILE).read_bytes())
    assert len(files) == 1
    before = {"trained": blocks.trained, "formats": json.dumps(dict(blocks.formats))}
    save_file(dict(blocks.blocks), tmp_path / "0" / BLOCKS_FILE, metadata=before)
    one, two = (read_blocks(tmp_path / name) for name in "01")
    assert one is not None and two is not None
    assert (one.trained, one.formats) == (two.trained, two.formats) == (blocks.trained, blocks.formats)


def test_damaged_blocks_are_noticed(tmp_path: Path) -> None:
    student = student_of(write(tmp_path / "teacher"), format="q8_0")
    folder = save_student(student.model, student.tokenizer, tmp_path / "student", quantization=student.quantization)
    assert merged_state(student.model).keys() == load_model(folder).model.state_dict().keys()
    (folder / BLOCKS_FILE).write_bytes((folder / BLOCKS_FILE).read_bytes()[:-40])
    with pytest.raises(LimbeckError, match=r"blocks.safetensors is damaged"):
        read_blocks(folder)
