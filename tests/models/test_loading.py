"""Loading by directory and GGUF file; every way a local model can be wrong gets one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
)
from transformers.utils import logging

from limbeck.models.gguf import gguf_config, gguf_tensors, gguf_tokenizer
from limbeck.models.gguf_header import Header, complete
from limbeck.models.heads import head_of
from limbeck.models.loading import load_model, load_tokenizer
from limbeck.models.skeleton import skeleton_of, stored_ending
from limbeck.models.sources import resolve
from limbeck.types import LimbeckError

from .tiny import DEPTH, REAL, save_gguf, save_tiny, tiny_model, tiny_tokenizer

IDS_BT = torch.tensor([[5, 6, 7, 8, 9, 3]])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "llama")


def test_a_directory(llama: Path) -> None:
    loaded = load_model(llama)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS_BT).logits, tiny_model()(IDS_BT).logits)
    assert loaded.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert not loaded.model.training
    record = loaded.provenance.record()
    assert record["kind"] == "directory"
    assert record["location"] == str(llama)
    assert record["architecture"] == "LlamaForCausalLM"
    assert record["parameters"] == sum(p.numel() for p in tiny_model().parameters())
    json.dumps(record)


def test_dtype_and_attention_are_followed(llama: Path) -> None:
    model = load_model(llama, dtype="bfloat16", attn_implementation="eager").model
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_dropout_is_off_in_configuration_and_modules(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        model = load_model(save_tiny(tmp_path / family, family)).model.train()
        dropouts = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        assert set(dropouts) <= {0.0}
        with torch.no_grad():
            assert torch.equal(model(IDS_BT).logits, model(IDS_BT).logits)
    assert load_model(tmp_path / "llama").model.config.attention_dropout == 0.0


def test_the_fingerprint_is_of_the_content(llama: Path, tmp_path: Path) -> None:
    first = load_model(llama).provenance
    llama.rename(tmp_path / "moved")
    moved = load_model(tmp_path / "moved").provenance
    assert (moved.fingerprint, moved.tokenizer_fingerprint) == (first.fingerprint, first.tokenizer_fingerprint)
    weights = load_file(tmp_path / "moved" / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    changed = load_model(tmp_path / "moved").provenance
    assert changed.fingerprint != first.fingerprint
    assert changed.tokenizer_fingerprint == first.tokenizer_fingerprint


def test_padding_of_the_last_call_is_not_part_of_a_tokenizer(llama: Path) -> None:
    from limbeck.models.fingerprints import tokenizer_fingerprint

    tokenizer = load_tokenizer(llama)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["w1", "w1 w2"], padding=True, truncation=True, max_length=1)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.chat_template = "other"
    assert tokenizer_fingerprint(tokenizer) != before


def test_loading_is_quiet_and_leaves_the_settings(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(llama)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_gguf_file_equals_the_model_it_was_made_from_and_can_be_saved(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    original = tiny_model()
    loaded = load_model(save_gguf(tmp_path / "tiny.gguf", original))
    assert capfd.readouterr() == ("", "")
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS_BT).logits, original(IDS_BT).logits, rtol=1e-4, atol=1e-5)
    assert loaded.provenance.kind == "gguf"
    loaded.model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(again(IDS_BT).logits, loaded.model(IDS_BT).logits)


def test_what_a_gguf_file_says_is_read_once_and_again_where_it_was_written_anew(tmp_path: Path) -> None:
    model = tiny_model()
    file = save_gguf(tmp_path / "tiny.gguf", model)
    tokenizer, config = gguf_tokenizer(file), gguf_config(file)
    tokenizer.eos_token = "<s>"
    config.num_hidden_layers = 7
    assert gguf_tokenizer(file).eos_token == "</s>"
    assert gguf_config(file).num_hidden_layers == DEPTH
    model.config.rms_norm_eps = 0.25
    save_gguf(file, model)
    assert gguf_config(file).rms_norm_eps == 0.25


def refused(name: str | Path, expected: str) -> None:
    with pytest.raises(LimbeckError, match=expected) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_not_there() -> None:
    refused("./nowhere/at/all", "no such directory or file")


def test_a_misspelt_asset() -> None:
    refused("smollm2-135m-instuct", r"did you mean smollm2-135m-instruct\?")


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    refused(tmp_path, "no config.json; give a directory written by save_pretrained")


def test_an_adapter_directory(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "LoRA adapter; merge it")


def test_a_folder_with_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "give the file some.gguf")


def test_pickled_weights_are_refused(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    refused(llama, r"only pickled weights \(pytorch_model.bin\)")


def test_no_weights(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    refused(llama, "no .safetensors weights")


def test_a_configuration_of_another_model_is_found_without_weights(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] * 2}))
    with pytest.raises(LimbeckError, match=r"config.json makes \S*mlp\S* \[.*model.safetensors has \[.*of one model"):
        skeleton_of(resolve(str(llama)))


def test_weights_cut_short(llama: Path) -> None:
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(llama, "cannot be loaded")


def test_weights_that_do_not_fill_the_model(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    refused(llama, "lacks 1 of its weights .model.layers.1.mlp.up_proj.weight")


def test_weights_of_another_size(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    refused(llama, "cannot be loaded")


def test_an_unknown_architecture(llama: Path) -> None:
    (llama / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    refused(llama, "config.json cannot be read")


def test_a_field_of_the_wrong_type(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    refused(llama, "config.json cannot be read: .*'hidden_size'.*expected int, got str")


def test_an_attention_the_architecture_has_not(tmp_path: Path) -> None:
    save_tiny(tmp_path, "gemma2")
    refused(tmp_path, "does not support an attention implementation.*; set attn_implementation=eager")
    load_model(tmp_path, attn_implementation="eager")


def test_broken_json(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    refused(llama, "config.json cannot be read")


def test_custom_code_is_not_run(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    code = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (llama / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": code}))
    (llama / "mine.py").write_text("raise SystemExit('this code ran')")
    refused(llama, "trust_remote_code=true")


def test_an_encoder(tmp_path: Path) -> None:
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "intermediate_size": 48}
    BertForMaskedLM(BertConfig(vocab_size=48, **sizes)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    refused(tmp_path, "BertForMaskedLM, not a causal language model")


def test_no_tokenizer(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    refused(tmp_path, "has no tokenizer")


def test_a_broken_tokenizer(llama: Path) -> None:
    (llama / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nothing"}}')
    refused(llama, "tokenizer cannot be read")


def test_a_gguf_architecture_nobody_knows(tmp_path: Path) -> None:
    model = tiny_model()
    refused(save_gguf(tmp_path / "odd.gguf", model, architecture="nosucharch"), "cannot be converted: .*nosucharch")


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "notes.gguf").write_text("hello")
    refused(tmp_path / "notes.gguf", "no GGUF file")


def test_a_damaged_gguf(tmp_path: Path) -> None:
    (tmp_path / "half.gguf").write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\xff" * 40)
    refused(tmp_path / "half.gguf", "cannot be converted")


def test_a_dtype_that_is_none(llama: Path) -> None:
    with pytest.raises(LimbeckError, match="'int4' is not one of float32, bfloat16, float16"):
        load_model(llama, dtype="int4")


def test_a_revision_of_a_local_model(llama: Path) -> None:
    with pytest.raises(LimbeckError, match="only hub models have revisions"):
        load_model(llama, revision="main")


def test_a_gguf_file_that_lacks_weights(tmp_path: Path) -> None:
    """They would be random ones."""
    lacking = save_gguf(tmp_path / "less.gguf", tiny_model(), without=("blk.0.ffn_up.weight", "blk.1.attn_norm.weight"))
    refused(lacking, r"lacks 2 of the model's weights \(model\.layers\.0\.mlp\.up_proj\.weight, \.\.\.\)")


def test_a_gguf_file_with_weights_that_have_no_place(tmp_path: Path) -> None:
    """The converted model would be without them: biases, in an architecture whose configuration knows none there."""
    biases = {"blk.0.attn_q.bias": np.ones(32, dtype=np.float32)}
    more = save_gguf(tmp_path / "more.gguf", tiny_model(), beside=biases)
    refused(more, r"has 1 weights for which LlamaForCausalLM has no place \(blk\.0\.attn_q\.bias, \.\.\.\)")


def test_a_part_of_a_split_gguf_file_and_one_with_experts(tmp_path: Path) -> None:
    part = save_gguf(tmp_path / "m-00001-of-00002.gguf", tiny_model(), fields={"split.count": 2})
    refused(part, "one of the 2 files of a split model, expected a whole one; join them: llama-gguf-split --merge")
    experts = save_gguf(tmp_path / "experts.gguf", tiny_model(), fields={"llama.expert_count": 4})
    refused(experts, "has 4 experts a layer, which transformers cannot convert from GGUF files of llama; use")


def test_the_scaled_rope_of_a_gguf_file(tmp_path: Path) -> None:
    scaling = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    path = save_gguf(tmp_path / "yarn.gguf", tiny_model(), fields=scaling)
    rope, window = {"rope_theta": 10000.0, "factor": 4.0}, tiny_model().config.max_position_embeddings
    yarn = rope | {"rope_type": "yarn", "original_max_position_embeddings": window}
    assert gguf_config(path).rope_parameters == yarn
    found = load_model(path).model
    original = LlamaForCausalLM(LlamaConfig(**tiny_model().config.to_dict() | {"rope_parameters": yarn}))
    original.load_state_dict(found.state_dict())
    with torch.no_grad():
        assert torch.equal(found(IDS_BT).logits, original.eval()(IDS_BT).logits)
    told = save_gguf(path, tiny_model(), fields=scaling | {"llama.rope.scaling.original_context_length": 8})
    assert gguf_config(told).rope_parameters == yarn | {"original_max_position_embeddings": 8}
    linear = save_gguf(path, tiny_model(), fields={"llama.rope.scale_linear": 4.0})
    assert gguf_config(linear).rope_parameters == rope | {"rope_type": "linear"}
    none = save_gguf(path, tiny_model(), fields=scaling | {"llama.rope.scaling.type": "none"})
    assert gguf_config(none).rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}


@pytest.mark.parametrize(
    ("fields", "tensors", "what"),
    [
        ({"type": "longrope"}, (), "longrope"),
        ({"type": "yarn", "factor": 4.0, "yarn_log_multiplier": 0.1}, (), "yarn_log_multiplier"),
        ({}, ("rope_factors_long.weight", "rope_factors_short.weight"), "rope_factors_long.weight"),
    ],
)
def test_a_rope_that_is_not_converted(fields: dict[str, Any], tensors: tuple[str, ...], what: str) -> None:
    told = {f"rope.scaling.{name}": value for name, value in fields.items()}
    with pytest.raises(
        LimbeckError, match=rf"scales its rope in a way that .* of phi3 \({what}\), expected one factor"
    ):
        complete(Phi3Config(), Header(Path("phi.gguf"), "phi3", told, frozenset(tensors)))


def test_the_rope_and_the_attention_scale_of_gemma() -> None:
    """As llama.cpp has them: of the largest models the scale is of the width, and long windows are of some layers."""

    def completed(config: Any, **fields: Any) -> Any:
        told = {f"rope.scaling.{name}": value for name, value in fields.items()}
        complete(config, Header(Path("gemma.gguf"), config.model_type, told, frozenset()))
        return config

    shape: dict[str, Any] = {"hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128}
    assert completed(Gemma2Config(num_hidden_layers=46, **shape)).query_pre_attn_scalar == 144
    assert completed(Gemma2Config(num_hidden_layers=42, **shape)).query_pre_attn_scalar == 128
    config = completed(Gemma3TextConfig(num_hidden_layers=62, **shape), type="linear", factor=8.0)
    assert config.query_pre_attn_scalar == 144
    assert config.rope_parameters["full_attention"] == {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"


@pytest.mark.parametrize("tied", [False, True])
def test_the_last_norm_and_the_head_of_a_gguf_file_are_read_alone(tmp_path: Path, tied: bool) -> None:
    """As the whole model has them; a head that is tied to the embeddings has no tensor of its own there."""
    original = tiny_model()
    with torch.no_grad():
        original.model.norm.weight.copy_(torch.linspace(0.5, 2, len(original.model.norm.weight)))
    path = save_gguf(tmp_path / "tiny.gguf", original, tied=tied)
    loaded = load_model(path).model
    source = resolve(str(path))
    norm, head = stored_ending(source, skeleton_of(source), REAL, torch.float32)
    whole = head_of(loaded, REAL, verify=False)
    assert torch.equal(head.weight_VD, whole.weight_VD) and head.vocab_size == REAL
    assert torch.equal(norm.weight, loaded.model.norm.weight)  # type: ignore[arg-type]
    assert tied == torch.equal(head.weight_VD, loaded.model.embed_tokens.weight)
    assert set(gguf_tensors(path, ["output_norm.weight", "nothing"])) == {"output_norm.weight"}
