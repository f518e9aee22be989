"""Models that are read by slices are what from_pretrained makes of the same files, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, MixtralConfig
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from limbeck.models.loading import load_model
from limbeck.models.slices import is_unread, read_parts, stand_ins
from limbeck.models.vision import reader_of
from limbeck.rollouts.collate import collate
from limbeck.student.adapters import LoraSpec
from limbeck.student.build import StudentSpec, build_student
from limbeck.student.saving import save_student
from limbeck.student.width import WidthSpec
from limbeck.types import Response
from tests.models.tiny import _SIZES, FAMILIES, save_tiny, tiny_tokenizer
from tests.tiny_vision import FAMILIES as VISION
from tests.tiny_vision import write_vision_model

CPU = torch.device("cpu")
MORE: dict[str, Any] = {
    "gemma3": lambda: Gemma3TextConfig(**_SIZES, head_dim=8, sliding_window=4),
    "gemma": lambda: GemmaConfig(**_SIZES, head_dim=8),
    "tied": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "untied": lambda: GPT2Config(
        vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=False
    ),
}


def require_same(found: nn.Module, expected: nn.Module) -> None:
    """Every weight and buffer has the same name, precision and bits, and is trained or not; ties are the same."""
    for kind in ("named_parameters", "named_buffers"):
        pairs = zip(*(getattr(one, kind)(remove_duplicate=False) for one in (found, expected)), strict=True)
        for (name, ours), (other, theirs) in pairs:
            assert (name, ours.dtype, ours.requires_grad) == (other, theirs.dtype, theirs.requires_grad)
            assert torch.equal(ours, theirs), name
    assert len(list(found.parameters())) == len(list(expected.parameters()))


def save_family(folder: Path, family: str) -> None:
    """A model of a family and its tokenizer."""
    if family in FAMILIES:
        save_tiny(folder, family)
    else:
        AutoModelForCausalLM.from_config(MORE[family]()).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_it_is_what_from_pretrained_makes(family: str, dtype: str, tmp_path: Path) -> None:
    save_family(tmp_path, family)
    expected = load_model(tmp_path, dtype=dtype, attn_implementation="eager")
    found = load_model(tmp_path, dtype=dtype, attn_implementation="eager", unread=True)
    assert is_unread(found.model) and all(weight.is_meta for weight in found.model.parameters())
    assert found.provenance == expected.provenance
    read_parts(found.model, CPU)
    assert not is_unread(found.model)
    require_same(found.model, expected.model)
    assert found.model.config.to_dict() == expected.model.config.to_dict()
    assert found.model.generation_config.to_dict() == expected.model.generation_config.to_dict()  # type: ignore[union-attr]
    ids_BT = torch.tensor([[1, 5, 9, 3]])
    assert torch.equal(found.model(ids_BT).logits, expected.model(ids_BT).logits)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_on_it_are_those_on_the_whole_model(family: str, dtype: str, tmp_path: Path) -> None:
    spec = StudentSpec(model=str(save_tiny(tmp_path, family)), dtype=dtype, lora=LoraSpec(r=2), seed=3)
    expected, found = build_student(spec), build_student(spec, unread=True)
    assert (found.parameters, found.trainable) == (expected.parameters, expected.trainable)
    drawn = {name: weight for name, weight in found.model.named_parameters() if "lora_" in name}
    assert drawn and not any(weight.is_meta for weight in drawn.values())
    read_parts(found.model, CPU)
    require_same(found.model, expected.model)


def write_other(folder: Path, family: str) -> None:
    """A model that transformers saves otherwise than it is in memory."""
    if family == "mixtral":
        sizes = {**_SIZES, "num_local_experts": 4}
        AutoModelForCausalLM.from_config(MixtralConfig(**sizes)).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    else:
        write_vision_model(folder, family)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["mixtral", *VISION])
def test_what_transformers_saves_otherwise_is_written_for_slices(family: str, tmp_path: Path) -> None:
    """Experts that it fuses on reading, and models that read images: as they are in memory."""
    original, written = tmp_path / "original", tmp_path / "written"
    write_other(original, family)
    expected = load_model(original)
    assert not is_unread(load_model(original, unread=True).model)
    save_student(expected.model, expected.tokenizer, written, for_slices=True)
    found = load_model(written, unread=True).model
    assert is_unread(found) and all(weight.is_meta for weight in found.parameters())
    read_parts(found, CPU)
    require_same(found, expected.model)
    require_same(load_model(written).model, expected.model)
    assert (reader_of(found) is None) == (reader_of(expected.model) is None)


def test_a_cut_student_is_saved_under_the_names_of_the_files_it_comes_from(tmp_path: Path) -> None:
    """Experts one by one, and not as one tensor."""
    write_other(tmp_path / "original", "mixtral")
    spec = StudentSpec(model=str(tmp_path / "original"), init="depth_prune", keep=(1,))
    student = build_student(spec)
    save_student(student.model, student.tokenizer, tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("original", "cut"))
    assert len(cut) < len(whole) and cut.keys() <= whole.keys()
    require_same(load_model(tmp_path / "cut").model, student.model)


def test_a_decoder_alone_is_read_by_the_names_of_the_model(tmp_path: Path) -> None:
    save_tiny(tmp_path, "gpt2")
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): weight for name, weight in weights.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    found = load_model(tmp_path, unread=True).model
    assert is_unread(found)
    read_parts(found, CPU)
    require_same(found, load_model(tmp_path).model)


@pytest.mark.parametrize("change", ["renamed", "stored twice"])
def test_what_slices_do_not_tell_is_read_whole(change: str, tmp_path: Path) -> None:
    """Tied weights that are stored twice transformers compares; old names of norms it renames."""
    save_tiny(tmp_path, "qwen3")
    weights = load_file(tmp_path / "model.safetensors")
    if change == "renamed":
        weights = {name.replace("input_layernorm.weight", "input_layernorm.gamma"): w for name, w in weights.items()}
        weights = {name.replace("layernorm.gamma", "LayerNorm.gamma"): w for name, w in weights.items()}
    else:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    if change == "stored twice":
        found = load_model(tmp_path, unread=True).model
        assert not is_unread(found)
        require_same(found, load_model(tmp_path).model)
    else:
        with pytest.raises(Exception, match="lacks 5 of its weights"):
            load_model(tmp_path, unread=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_blocks_that_are_given_are_left_out_unseen(family: str, dtype: str, tmp_path: Path) -> None:
    """The student is that whose weights were read first, and cut and checked then."""
    save_family(tmp_path, family)
    depth = AutoConfig.from_pretrained(tmp_path).num_hidden_layers
    keep = tuple(range(1, depth))
    spec = StudentSpec(model=str(tmp_path), init="depth_prune", keep=keep, dtype=dtype, attn_implementation="eager")
    expected, found = build_student(spec), build_student(spec, unread=True)
    assert is_unread(found.model) and all(weight.is_meta for weight in found.model.parameters())
    assert (found.parameters, found.trainable, found.source) == (
        expected.parameters,
        expected.trainable,
        expected.source,
    )
    read_parts(found.model, CPU)
    require_same(found.model, expected.model)
    ours, theirs = found.model, expected.model
    assert _without_path(ours) == _without_path(theirs)
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()  # type: ignore[operator, union-attr]


def _without_path(model: Any) -> dict[str, Any]:
    """The configuration, but for where it was read from, which is not saved."""
    return {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}


def test_blocks_that_a_cut_would_build_otherwise_are_read_and_computed_with(tmp_path: Path) -> None:
    """Of a class that makes every second block of another kind by its place, as its attributes show."""
    spec = StudentSpec(model=str(save_tiny(tmp_path)), init="depth_prune", keep=(0, 2))
    assert is_unread(build_student(spec, unread=True).model)
    made = LlamaDecoderLayer.__init__

    def by_its_place(self: LlamaDecoderLayer, config: LlamaConfig, layer_idx: int) -> None:
        made(self, config, layer_idx)
        self.kind = ("full", "sliding")[layer_idx % 2]  # type: ignore[assignment]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaDecoderLayer, "__init__", by_its_place)
        assert not is_unread(build_student(spec, unread=True).model)


def test_students_whose_weights_are_measured_are_read_at_once(tmp_path: Path) -> None:
    spec = StudentSpec(model=str(save_tiny(tmp_path)), init="width_prune", width=WidthSpec(intermediate_size=32))
    answer = Response(prompt_id="", author="data", prompt_ids=(1, 5), response_ids=(3, 4, 5, 2), stop="eos")
    batch = collate([answer], [0], pad_id=0)
    assert not is_unread(build_student(spec, unread=True, calibration=[batch]).model)


def test_a_stand_in_is_no_number_and_leaves_nothing_behind(tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path), unread=True).model
    before = dict(model.named_parameters())
    with stand_ins(model):
        assert all(weight.isnan().all() for weight in model.parameters())
        model.requires_grad_(False)
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] and not after[name].requires_grad for name in before)
