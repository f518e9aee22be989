"""Mutants of a model's folder, drawn from a seed: values of its JSON files, bytes of any file, odd kinds of files."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        2**31,
        10**9,
        10**30,
        0.5,
        -0.0,
        1e308,
        "",
        "x",
        "0",
        "\ud800",
        "é\n",
        "<|im_end|>",
    ),
    *([], [1], ["a", None], {}, {"a": 1}, {"model_type": "llama"}, [[[]]], "x" * 5000, [0] * 50, "../../etc/passwd"),
)
TEMPLATES = (
    *(
        "{{ 1 // 0 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ range(10**9) | list }}",
        "\ud800",
        "{% for",
    ),
    *("{{ messages }}", "", "{{ messages[9].content }}", "{{ '<|im_end|>' * 3 }}", "{{ ''.__class__.__mro__ }}"),
    *("{% for m in messages %}{{ m }}{% endfor %}", "{{ raise_exception('no') }}", "{{ undefined.attribute }}"),
)
ADDED = ("text_config", "auto_map", "quantization_config", "layer_types", "rope_parameters", "extra_special_tokens")
JSONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
ADAPTERS: tuple[Any, ...] = (
    *([], {}, None, "x", {"peft_type": "LORA"}, {"peft_type": 5, "base_model_name_or_path": "x"}),
    *({"base_model_name_or_path": 7}, {"peft_type": "LORA", "base_model_name_or_path": "BASE", "r": "x"}),
    {"peft_type": "LORA", "base_model_name_or_path": "BASE", "r": 4, "target_modules": ["q_proj"], "lora_alpha": {}},
    {"peft_type": "LORA", "base_model_name_or_path": "BASE", "r": 4, "target_modules": 8},
    {"peft_type": "LORA", "base_model_name_or_path": "BASE", "r": 10**9, "target_modules": ["q_proj"]},
    {"peft_type": "IA3", "base_model_name_or_path": "BASE"},
    {
        "peft_type": "LORA",
        "base_model_name_or_path": "BASE",
        "r": 4,
        "megatron_config": {},
        "target_modules": ["q_proj"],
    },
)


def mutate(folder: Path, draw: random.Random) -> str:
    """Change one thing, or two, in a copy of a model; says what."""
    said = []
    for _ in range(draw.choice((1, 1, 1, 2))):
        if any(path.is_fifo() for path in folder.iterdir()):
            # Whoever opened it would wait.
            break
        try:
            said.append(draw.choice((*(4 * [_value]), _bytes, _template, _header, _kind, _adapter))(folder, draw))
        except OSError:
            # What the first change has left is no file.
            break
    return " and ".join(said)


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value may be changed; of the long lists of a vocabulary only the beginning."""
    found = [path] if path else []
    pairs: list[tuple[Any, Any]] = []
    if isinstance(tree, dict | list):
        pairs = list(tree.items() if isinstance(tree, dict) else enumerate(tree))[:40]
    for key, value in pairs:
        found += _places(value, (*path, key))
    return found


def _value(folder: Path, draw: random.Random) -> str:
    path = folder / draw.choice((*JSONS, "config.json", "config.json", "tokenizer_config.json"))
    try:
        tree = json.loads(path.read_text("utf-8"))
        place = draw.choice(_places(tree) or [()])
    except (OSError, ValueError):
        return _bytes(folder, draw)
    if not place:
        return _bytes(folder, draw)
    holder: Any = tree
    keys: list[Any] = list(place[:-1])
    for key in keys:
        holder = holder[key]
    what, value = draw.choice(("set", "set", "set", "delete", "add")), copy.deepcopy(draw.choice(VALUES))
    if what == "delete":
        del holder[place[-1]]
    elif what == "add" and isinstance(holder, dict):
        holder[draw.choice(("text_config", "auto_map", "quantization_config", "layer_types", "rope_parameters"))] = (
            value
        )
    else:
        holder[place[-1]] = value
    path.write_text(json.dumps(tree), "utf-8")
    return f"{path.name}: {what} {place} {str(value)[:30]!r}"


def _bytes(folder: Path, draw: random.Random) -> str:
    path = draw.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    data = bytearray(path.read_bytes())
    how = draw.choice(("cut", "flip", "empty", "double"))
    if how == "cut":
        data = data[: draw.randrange(len(data) + 1)]
    elif how == "empty":
        data = bytearray()
    elif how == "double":
        data = data * 2
    else:
        for _ in range(draw.randrange(1, 20)):
            if data:
                data[draw.randrange(min(len(data), 4000))] = draw.randrange(256)
    path.write_bytes(bytes(data))
    return f"{path.name}: {how}"


def _template(folder: Path, draw: random.Random) -> str:
    text = draw.choice(TEMPLATES)
    (folder / "chat_template.jinja").write_bytes(text.encode("utf-8", "surrogatepass"))
    return f"chat template {text[:40]!r}"


def _header(folder: Path, draw: random.Random) -> str:
    path = folder / "model.safetensors"
    if not path.is_file() or len(data := path.read_bytes()) < 8:
        return "nothing"
    (length,) = struct.unpack("<Q", data[:8])
    try:
        header = json.loads(data[8 : 8 + length])
        if not isinstance(header, dict):
            return "nothing"  # an earlier mutation of the same file
        name = draw.choice(sorted(set(header) - {"__metadata__"}))
    except (ValueError, IndexError, TypeError):
        return "nothing"
    kind = draw.choice(("shape", "dtype", "offsets", "name", "entry", "gone", "list", "length"))
    if kind == "gone":
        del header[name]
    elif kind == "name":
        header[draw.choice(("x", name + "x", "model.layers.99.x"))] = header.pop(name)
    elif kind == "list":
        header = draw.choice(VALUES)
    elif kind == "entry":
        header[name] = draw.choice(VALUES)
    elif kind != "length":
        header[name] = {**header[name], {"offsets": "data_offsets"}.get(kind, kind): draw.choice(VALUES)}
    text = json.dumps(header).encode()
    size = draw.choice((0, 1, 2**63, len(text) + 5)) if kind == "length" else len(text)
    path.write_bytes(struct.pack("<Q", size) + text + data[8 + length :])
    return f"header: {kind} of {name}"


def _kind(folder: Path, draw: random.Random) -> str:
    path = folder / draw.choice((*JSONS, "model.safetensors", "chat_template.jinja", "special_tokens_map.json"))
    path.unlink(missing_ok=True)
    kind = draw.choice(("pipe", "folder", "dangling", "gone", "loop"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("dangling", "loop"):
        path.symlink_to(path if kind == "loop" else "nowhere")
    return f"{path.name}: {kind}"


def _adapter(folder: Path, draw: random.Random) -> str:
    told = draw.choice(ADAPTERS)
    if isinstance(told, dict) and told.get("base_model_name_or_path") == "BASE":
        told = told | {"base_model_name_or_path": str(folder.parent / "model")}
    text = draw.choice((json.dumps(told), json.dumps(told), "{", "\x00"))
    (folder / "adapter_config.json").write_text(text, "utf-8")
    weights, adapter = folder / "model.safetensors", folder / "adapter_model.safetensors"
    kind = draw.choice(("beside", "alone", "bin", "none"))
    if kind == "alone" and weights.is_file():
        weights.replace(adapter)
    elif kind == "bin":
        weights.unlink(missing_ok=True)
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    elif kind == "none":
        weights.unlink(missing_ok=True)
    return f"adapter: {text[:80]}, {kind}"


def fresh_copy(model: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(model, folder))
