"""Model folders whose files lie, hang, or change the model without a word: one line, before anything is loaded."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.models.loading import load_model, load_tokenizer, source_config
from limbeck.models.skeleton import skeleton_of
from limbeck.models.sources import Source, resolve
from limbeck.models.vocabulary import describe_vocabulary
from limbeck.prompts.templates import end_token_ids
from limbeck.student.build import StudentSpec, fresh_model
from limbeck.types import LimbeckError
from tests.tiny_pair import write_model

FRESH = StudentSpec(init="scratch")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | fields), "utf-8")


def refused(folder: Path) -> str:
    said = []
    for door in (describe_vocabulary, load_model):
        with pytest.raises(LimbeckError) as caught:
            door(folder)
        assert "\n" not in str(caught.value)
        said.append(str(caught.value))
    return said[0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"architectures": 5}, "architectures is '5', expected a list of class names"),
        ({"vocab_size": 0}, "vocab_size is '0', expected a whole number from 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is '0'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is '1000000000', expected a whole number from 1 to 10000"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is '1000000000'"),
        ({"text_config": {"a": 1}}, "its config.json cannot be read"),
        ({"hidden_size": "wide"}, "config.json cannot be read"),
        ({"max_position_embeddings": -5}, "max_position_embeddings is '-5', expected a whole number from 1"),
        ({"model_type": 3}, "model_type is '3', expected a text"),
        ({"dtype": 5}, "dtype is '5', expected a text"),
        ({"dtype": "zzz"}, "config.json: dtype is 'zzz', expected a type of torch, such as float32"),
        ({"torch_dtype": [1]}, "torch_dtype is '[1]', expected a text"),
        ({"architectures": ["é\n"]}, "is a é, not a causal language model"),
    ],
)
def test_sizes_that_no_model_has(folder: Path, fields: dict[str, Any], said: str) -> None:
    change(folder / "config.json", **fields)
    assert said in refused(folder)


@pytest.mark.parametrize("value", ["32", None, 33])
def test_a_size_that_the_tokenizer_stumbles_over_is_one_of_the_configuration(folder: Path, value: Any) -> None:
    change(folder / "config.json", hidden_size=value)
    with pytest.raises(LimbeckError, match=r"its config\.json cannot be read: .*hidden.size"):
        load_tokenizer(folder)


@pytest.mark.parametrize("door", [skeleton_of, lambda source: fresh_model(source_config(source), FRESH)])
@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"hidden_act": "zzz"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "zzz", "rope_theta": 1}}, "rope_parameters.rope_type"),
    ],
)
def test_a_name_that_no_library_knows_is_said_with_its_key_and_file(
    folder: Path, door: Callable[[Source], object], fields: dict[str, Any], key: str
) -> None:
    change(folder / "config.json", **fields)
    with pytest.raises(LimbeckError) as caught:
        door(resolve(folder))
    assert str(caught.value) == (
        f"no model can be built from {folder / 'config.json'}: {key} is 'zzz', which transformers does not know; "
        "correct it, or download the file again"
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"vocab_size": 444}, "config.json says vocab_size 444, and its weights are of"),
        ({"num_hidden_layers": 9}, "config.json says num_hidden_layers 9, and its weights are of 3"),
        ({"intermediate_size": 48}, "its weights have other shapes than config.json says"),
    ],
)
def test_a_configuration_that_lies_about_the_weights(folder: Path, fields: dict[str, Any], said: str) -> None:
    change(folder / "config.json", **fields)
    with pytest.raises(LimbeckError, match=said):
        load_model(folder)


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": 1}', b'{"a": {"shape": "x", "dtype": "F32"}}', b"\xff"])
def test_damaged_headers(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "is damaged or no safetensors file; download it again" in refused(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_pipes_are_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    said = refused(folder)
    assert "is a pipe, socket or device" in said or "has no config.json" in said


def test_an_adapter_beside_the_weights(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}', "utf-8")
    assert "beside whole weights, which transformers would put onto them without a word" in refused(folder)


def test_a_window_that_is_text(folder: Path) -> None:
    change(folder / "tokenizer_config.json", model_max_length="long")
    assert "model_max_length is 'long', expected a number" in refused(folder)


def test_ids_far_beyond_the_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text("utf-8"))
    told["model"]["vocab"]["zzz"] = 10**8
    path.write_text(json.dumps(told), "utf-8")
    assert "tokens with ids up to 100000000, expected few gaps" in refused(folder)


@pytest.mark.parametrize(
    "template",
    ["{{ 1 // 0 }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ range(10**9) | list }}", "{{ '\\ud800' }}"],
)
def test_chat_templates_that_end_badly(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    with pytest.raises(LimbeckError, match=r"the chat template of .*(refuses the turns user|is no Unicode text)"):
        end_token_ids(load_tokenizer(folder), "chat")
