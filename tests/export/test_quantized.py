"""Exports of quantised students: the file holds the blocks that were trained, and llama.cpp computes with them."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, quants
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck import run as play
from limbeck.export import export_model
from limbeck.export.gguf_model import in_pairs, llama_cpp_name, rotated_heads
from limbeck.models.loading import load_model
from limbeck.models.quantization import FORMATS, dequantise, quantise
from limbeck.types import LimbeckError
from tests.export.test_export import calm, llama_cpp
from tests.tiny_pair import TinyPair, questions, write_model

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp comes with xllamacpp: extra dev"
)
TRAIN = {"max_steps": 3, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """A tiny pair whose rounding moves logits as little as that of trained models."""
    pair = TinyPair.write(tmp_path_factory.mktemp("pair"))
    calm(pair.teacher, 0.4)
    return pair


def trained(pair: TinyPair, run: Path, quantize: dict[str, Any], **student: Any) -> Path:
    tree = pair.tree(run, train=TRAIN)
    tree["student"] = {"init": "teacher", "quantize": quantize, **student}
    tree["evaluate"] = {"groups": ["fidelity"]}
    play(tree)
    return run


@pytest.fixture(scope="module")
def straight(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(pair, tmp_path_factory.mktemp("runs") / "straight", {"format": "q4_0"})


@pytest.fixture(scope="module")
def adapted(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    quantize = {"format": "q4_0", "weights": "frozen"}
    return trained(pair, tmp_path_factory.mktemp("runs") / "adapted", quantize, lora={"r": 2})


def read_back(file: Path) -> dict[str, tuple[str, Tensor]]:
    """Type and weights of each tensor, by the gguf package alone."""
    found = {}
    for tensor in GGUFReader(str(file)).tensors:
        weight = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())
        found[str(tensor.name)] = (tensor.tensor_type.name, weight)
    return found


def logprobs(ask: Callable[..., Any], ids: list[int], vocabulary: int) -> Tensor:
    """llama.cpp's log-probabilities of the token after some ids."""
    body = {"prompt": ids, "n_predict": 1, "temperature": 1.0, "n_probs": vocabulary, "ignore_eos": True}
    answer = ask("completion", **body, seed=0)
    (found,) = answer["completion_probabilities"]
    every = torch.full((vocabulary,), torch.nan)
    for entry in found["top_logprobs"]:
        every[entry["id"]] = entry["logprob"]
    return every


def as_llama_cpp(model: nn.Module) -> nn.Module:
    """What llama.cpp computes: beside blocks it rounds activations too, to q8_0."""
    known = FORMATS.build("q8_0")

    def rounded(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        flat = inputs[0].reshape(-1, inputs[0].shape[-1])
        return (dequantise(known, quantise(known, flat)).view(inputs[0].shape),)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(rounded)
    return model


@torch.no_grad()
def our_logprobs(model: Any, ids: list[int], vocabulary: int) -> Tensor:
    return model(torch.tensor([ids])).logits[0, -1, :vocabulary].log_softmax(-1)


def test_the_file_holds_the_weights_that_were_trained(straight: Path, tmp_path: Path) -> None:
    done = export_model(str(straight), tmp_path / "out", format="gguf")
    assert done.file.name == "straight-Q4_0.gguf" and done.dtype == "q4_0" and done.difference == 0
    assert "as they were trained" in done.said and "as they were trained" in (done.folder / "README.md").read_text()
    file = read_back(done.file)
    model: Any = load_model(straight / "student").model
    assert sum(tensor.n_bytes for tensor in GGUFReader(str(done.file)).tensors) < 0.2 * 4 * model.num_parameters()
    rotated = rotated_heads(model.config)
    for name, weight in model.named_parameters():
        theirs = llama_cpp_name(model.config, name)
        heads = rotated.get(theirs.split(".")[-2])
        kind, found = file.pop(theirs)
        assert torch.equal(found, weight if heads is None else in_pairs(weight, heads)), name
        assert kind == ("F32" if weight.ndim == 1 else "Q8_0" if "embed" in name else "Q4_0")
    assert not file


@needs_llama_cpp
def test_llama_cpp_computes_what_was_trained(pair: TinyPair, straight: Path, tmp_path: Path) -> None:
    """As far apart as the rounding of its activations explains; the weights before training are much farther."""
    source: Any = load_model(straight / "student")
    before: Any = load_model(export_model(str(pair.teacher), tmp_path / "p", format="gguf", dtype="q4_0").file).model
    done = export_model(str(straight), tmp_path / "out", format="gguf")
    vocabulary = len(source.tokenizer)
    prompts = [source.tokenizer(text)["input_ids"] for text in questions(6)]
    with llama_cpp(done.file) as ask:
        theirs = torch.stack([logprobs(ask, ids, vocabulary) for ids in prompts])
    exact, untrained = (
        torch.stack([our_logprobs(m, ids, vocabulary) for ids in prompts]) for m in (source.model, before)
    )
    rounded = torch.stack([our_logprobs(as_llama_cpp(source.model), ids, vocabulary) for ids in prompts])
    gap, explained, learned = ((one - exact).square().mean().sqrt() for one in (theirs, rounded, untrained))
    assert gap < 1.5 * explained and gap < 0.1 * learned


def test_adapters_ship_beside_their_blocks(pair: TinyPair, adapted: Path, tmp_path: Path) -> None:
    done = export_model(str(adapted), tmp_path / "out", format="gguf")
    assert done.adapter is not None and done.adapter.name == "adapted-Q4_0-lora.gguf"
    said = (done.folder / "Modelfile").read_text("utf-8").splitlines()
    assert said[:2] == ["FROM ./adapted-Q4_0.gguf", "ADAPTER ./adapted-Q4_0-lora.gguf"]
    assert f"with its adapters in {done.adapter.name}" in done.said
    # The base is the teacher, quantised; what was learned is in the adapters alone.
    base, teacher = load_model(done.file).model.state_dict(), load_model(pair.teacher).model.state_dict()
    merged = load_file(adapted / "student/model.safetensors")
    factors, known = read_back(done.adapter), FORMATS.build("q4_0")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(base[name], dequantise(known, quantise(known, teacher[name])))
    a_RI, b_OR = (factors[f"blk.1.ffn_down.weight.lora_{side}"][1] for side in "ab")
    torch.testing.assert_close(base[name] + 32 / 2 * b_OR @ a_RI, merged[name])
    assert not torch.equal(base[name], merged[name])


@needs_llama_cpp
def test_llama_cpp_adds_the_adapters(adapted: Path, tmp_path: Path) -> None:
    done = export_model(str(adapted), tmp_path / "out", format="gguf")
    source: Any = load_model(adapted / "student")
    vocabulary, ids = len(source.tokenizer), source.tokenizer(questions(1)[0])["input_ids"]
    with llama_cpp(done.file, adapter=done.adapter) as ask:
        with_them = logprobs(ask, ids, vocabulary)
    with llama_cpp(done.file) as ask:
        without = logprobs(ask, ids, vocabulary)
    ours = our_logprobs(source.model, ids, vocabulary)
    assert (with_them - ours).abs().max() < 0.5 * (without - ours).abs().max()
    assert (with_them - ours).abs().max() < 0.1


def changed(run: Path, folder: Path) -> Path:
    """A copy of a student with a weight that was changed after training."""
    shutil.copytree(run / "student", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_what_cannot_be_exported(pair: TinyPair, straight: Path, adapted: Path, tmp_path: Path) -> None:
    for run, said in ((straight, "not what its block stands for"), (adapted, "its block and its adapter make of it")):
        folder = changed(run, tmp_path / run.name)
        with pytest.raises(LimbeckError, match=f"up_proj.weight is .*{said}.*delete the folder quantized"):
            export_model(str(folder), tmp_path / "out", format="gguf")
    nowhere = trained(pair, tmp_path / "int4", {"format": "int4_g32"})
    with pytest.raises(LimbeckError, match=r"int4_g32, which GGUF files do not hold; .*--dtype, one of q4_0"):
        export_model(str(nowhere), tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()
    lines: list[str] = []
    export_model(str(nowhere), tmp_path / "out", format="gguf", dtype="q4_0", say=lines.append)
    assert "export: the student was trained as int4_g32; q4_0 rounds its weights again" in lines


@pytest.mark.parametrize(("dtype", "stands_in"), [("q4_0", None), ("q4_k", "q5_0"), ("q6_k", "q8_0")])
def test_any_model_is_rounded(tmp_path: Path, dtype: str, stands_in: str | None) -> None:
    """A width of 256 on one side of each layer and of 512 on the other; embeddings in q8_0; a head of 288."""
    lines: list[str] = []
    wide = calm(write_model(tmp_path / "wide", width=256, layers=1), 0.2)
    done = export_model(str(wide), tmp_path / "out", format="gguf", dtype=dtype, say=lines.append)
    kinds = {name: kind for name, (kind, _) in read_back(done.file).items()}
    assert kinds["blk.0.ffn_down.weight"] == dtype.upper() and kinds["token_embd.weight"] == "Q8_0"
    assert 0 < done.difference < 0.5 and "the rounded one bit for bit" in done.said
    assert not any("do not divide" in line for line in lines)
    if stands_in is not None:
        narrow = calm(write_model(tmp_path / "narrow"), 0.2)
        done = export_model(str(narrow), tmp_path / "stood in", format="gguf", dtype=dtype, say=lines.append)
        assert f"export: 21 matrices are in {stands_in}, since blocks of {dtype} do not divide their rows" in lines
        assert read_back(done.file)["blk.0.ffn_down.weight"][0] == stands_in.upper()
