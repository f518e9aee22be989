"""What an export reads of a folder, and what it must not: links out of it, pickles, adapters whose files are junk."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from limbeck.export import export_model
from limbeck.models.loading import load_model, load_tokenizer
from limbeck.models.sources import resolve
from limbeck.models.vocabulary import describe_vocabulary
from limbeck.types import LimbeckError
from tests.tiny_pair import write_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "base")


def adapter(folder: Path, base: Path, **changes: Any) -> Path:
    folder.mkdir()
    told = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(told | changes), "utf-8")
    weights = {}
    for block in range(3):
        name = f"base_model.model.model.layers.{block}.self_attn.q_proj"
        weights |= {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.zeros(32, 2)}
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def refused(source: Path, out: Path) -> str:
    with pytest.raises(LimbeckError) as caught:
        export_model(str(source), out)
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*")), "nothing is left"
    return str(caught.value)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    """A model that somebody else made, with a licence that is the reader's own private key."""
    folder, key = write_model(tmp_path / "model"), tmp_path / "id_rsa"
    key.write_text("-----BEGIN PRIVATE KEY-----", "utf-8")
    for name in ("LICENSE", "NOTICE.md", "README.md"):
        (folder / name).symlink_to(key)
    (folder / "terms.txt").write_text("Do what is right.", "utf-8")
    (folder / "COPYING").symlink_to("terms.txt")
    done = export_model(str(folder), tmp_path / "out")
    assert not [path for path in done.folder.rglob("*") if b"PRIVATE KEY" in path.read_bytes()]
    assert (done.folder / "COPYING").read_text("utf-8") == "Do what is right.", "a link within the folder is its own"
    assert not (done.folder / "LICENSE").exists()


CARRIED = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "vocab.txt", "tokenizer_config.json")


@pytest.mark.parametrize("name", CARRIED)
def test_a_text_that_a_student_would_carry_on_is_no_link_out_of_the_folder(name: str, tmp_path: Path) -> None:
    """Not of a model, nor of a run's student, of an adapter or of a GGUF file that lies beside it."""
    folder, key = write_model(tmp_path / "run/student"), tmp_path / "id_rsa"
    gguf = export_model(str(folder), tmp_path / "file", format="gguf").file
    key.write_text("-----BEGIN PRIVATE KEY-----", "utf-8")
    (tmp_path / "run/recipe.resolved.yaml").write_text("name: run\n", "utf-8")
    own = adapter(tmp_path / "adapter", write_model(tmp_path / "base"))
    places = {folder: (folder, tmp_path / "run"), own: (own,)}
    if name != "vocab.txt":
        places[gguf.parent] = (gguf,)
    for place, sources in places.items():
        path = place / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(key)
        for source in sources:
            said = refused(source, tmp_path / "out")
            assert f"{name} is a link to {key}, outside of the model's folder" in said and "\n" not in said


def test_no_run_begins_from_a_model_that_links_out_of_its_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (tmp_path / "id_rsa").write_text("-----BEGIN PRIVATE KEY-----", "utf-8")
    (folder / "additional_chat_templates").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "tool_use.jinja").write_text("theirs", "utf-8")
    for door in (resolve, load_model, load_tokenizer, describe_vocabulary):
        with pytest.raises(LimbeckError, match="outside of the model's folder"):
            door(folder)


def test_links_that_belong_to_a_model(tmp_path: Path) -> None:
    """Within the folder, from a snapshot of the hub's cache to its blobs, and of weights that lie elsewhere."""
    blobs = tmp_path / "models--owner--name/blobs"
    folder = write_model(tmp_path / "models--owner--name/snapshots/0123abcd")
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    assert export_model(str(folder), tmp_path / "out").difference == 0
    plain = write_model(tmp_path / "plain")
    (plain / "chat_template.jinja").rename(plain / "chatml.jinja")
    (plain / "chat_template.jinja").symlink_to("chatml.jinja")
    (plain / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (plain / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert load_model(plain).tokenizer.chat_template


def test_an_adapter_with_a_tokenizer_of_its_own(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((base / name).read_bytes())
    assert export_model(str(folder), tmp_path / "out").difference == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "holds a list, expected a JSON object"),
        ("{", "is no JSON"),
        ("null", "holds a NoneType"),
        ('{"peft_type": "LORA", "base_model_name_or_path": 7}', "names no base model"),
        ('{"peft_type": "IA3", "base_model_name_or_path": "x"}', "peft_type is 'IA3', expected LORA"),
    ],
)
def test_adapter_configurations_that_are_none(base: Path, text: str, said: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", base)
    (folder / "adapter_config.json").write_text(text, "utf-8")
    assert said in refused(folder, tmp_path / "out")


def test_adapters_of_other_fields(base: Path, tmp_path: Path) -> None:
    for number, (changes, said) in enumerate(
        (
            ({"r": "x"}, "r is 'x'"),
            ({"r": 10**9}, "r is '1000000000'"),
            ({"lora_alpha": {}}, "cannot be put onto"),
            ({"megatron_config": {}, "megatron_core": "os"}, "without megatron_config"),
        )
    ):
        assert said in refused(adapter(tmp_path / str(number), base, **changes), tmp_path / "out")


def test_pickled_adapters_are_not_opened(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", base)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "adapters in .bin are pickles" in refused(folder, tmp_path / "out")


def test_an_adapter_beside_whole_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    for path in adapter(tmp_path / "adapter", folder).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert "holds whole weights and an adapter" in refused(folder, tmp_path / "out")


def test_what_no_file_can_hold(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    path = folder / "tokenizer_config.json"
    told = json.loads(path.read_text("utf-8")) | {"clean_up_tokenization_spaces": "\ud800"}
    path.write_text(json.dumps(told), "utf-8")
    assert "holds half a surrogate pair" in refused(folder, tmp_path / "out")


def test_ends_that_are_no_tokens(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"eos_token_id": [2, 10**30, -1]}), "utf-8")
    assert export_model(str(folder), tmp_path / "out", format="gguf").difference == 0


def test_of_two_exports_to_one_folder_one_wins(base: Path, tmp_path: Path) -> None:
    begun, go, ends = threading.Event(), threading.Event(), []

    def slow(line: str) -> None:
        del line
        begun.set()
        go.wait(60)

    first = threading.Thread(target=lambda: ends.append(export_model(str(base), tmp_path / "out", say=slow)))
    first.start()
    assert begun.wait(60)
    with pytest.raises(LimbeckError, match="is being written by another export"):
        export_model(str(base), tmp_path / "out")
    go.set()
    first.join()
    assert len(ends) == 1 and (tmp_path / "out/model.safetensors").is_file()
    assert not list(tmp_path.glob(".out*"))


def test_a_number_that_no_gguf_field_holds(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["rope_parameters"]["rope_theta"] = 1e308
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    out = tmp_path / "out"
    with pytest.raises(LimbeckError, match="that no field of a GGUF file can hold"):
        export_model(str(folder), out, format="gguf")
    assert not out.exists()
