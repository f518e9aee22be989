"""Checks of a model's folder before any library reads it: in many cases one would hang, or keep quiet.

transformers puts an adapter that lies beside the weights onto them without a word, opens a pipe and waits, and builds
whatever number of blocks a configuration names.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.models.headers import EMBEDDINGS, safetensors_header
from limbeck.types import LimbeckError

# Files that end up in students and exports, as they are or as what was read of them.
_CARRIED = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".codes", ".tokenizer", ".py")
_READ = (".safetensors", *_CARRIED)
# Where transformers looks for chat templates beside the main one.
_TEMPLATES = "additional_chat_templates"
_LARGEST_JSON = 64 * 2**20
# Names of the number of experts in a layer, which may be zero.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
# The largest that a field may be, and its other names. Real models stay far below.
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 10_000),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim"), 100_000),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "intermediate_size", "ffn_dim", "n_inner"), 10_000_000),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 2**31 - 1),
    **dict.fromkeys(("vocab_size", *EXPERT_COUNTS), 100_000_000),
}
_TEXTS = (
    *("model_type", "dtype", "torch_dtype", "_attn_implementation"),
    *("hidden_act", "hidden_activation", "activation_function"),
)
_BLOCK = re.compile(r"\.(?:layers|h|blocks|layer)\.(\d+)\.")


def require_sound_folder(folder: Path) -> None:
    """See that a model's folder can be read: files where libraries read them, and a configuration of possible sizes.

    Raises:
        LimbeckError: names the file and what is wrong with it.
    """
    require_regular_files(folder)
    require_sizes(folder / "config.json")


def refuse_adapter(name: str, folder: Path) -> None:
    """See that no adapter lies where transformers would put it onto the weights.

    Raises:
        LimbeckError: one does.
    """
    if (folder / "adapter_config.json").is_file():
        whole = holds_whole_weights(folder)
        raise LimbeckError(
            f"{name} holds a LoRA adapter (adapter_config.json)"
            + (" beside whole weights, which transformers would put onto them without a word" if whole else "")
            + "; merge it with `limbeck export` and give the result"
            + (", or move adapter_config.json elsewhere" if whole else "")
        )


def holds_whole_weights(folder: Path) -> bool:
    """Whether a folder has weights beside those of an adapter."""
    return any(not path.name.startswith("adapter_") for path in folder.glob("*.safetensors"))


def require_regular_files(folder: Path) -> None:
    """See that what libraries read of a folder are files of its own: a pipe would let them wait for ever, and what a
    link leads to would be handed on with the student.

    Raises:
        LimbeckError: one is something else, a link to nothing, or a text elsewhere.
    """
    for path in (*sorted(folder.iterdir()), *_more_templates(folder)):
        if path.suffix in _READ:
            _require_regular(path)
        if path.suffix in _CARRIED:
            _require_own(path, folder)


def require_own_tokenizer(folder: Path) -> None:
    """See that what transformers reads for the tokenizer of a GGUF file, from the folder it lies in, is of that folder.

    Raises:
        LimbeckError: it is elsewhere, or no file.
    """
    for path in (*sorted(folder.glob("tokenizer*.json")), *sorted(folder.glob("*.jinja")), *_more_templates(folder)):
        _require_regular(path)
        _require_own(path, folder)


def _more_templates(folder: Path) -> list[Path]:
    return sorted((folder / _TEMPLATES).glob("*.jinja"))


def is_own(path: Path, folder: Path) -> bool:
    """Whether a file lies where it seems to: a link out of the folder may lead to anything, and exports are published.

    The hub's cache links from a snapshot to blobs beside it, which are the model's own files.
    """
    real, home = path.resolve(), folder.resolve()
    if real.is_relative_to(home):
        return True
    return home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"


def _require_own(path: Path, folder: Path) -> None:
    if not is_own(path, folder):
        raise LimbeckError(
            f"{path} is a link to {path.resolve()}, outside of the model's folder, and students and exports would "
            "hold what is there; put a copy in its place if you know that file, or download the model again"
        )


def _require_regular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise LimbeckError(f"{path} cannot be read ({error.strerror}); expected a file: mend or remove it") from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise LimbeckError(f"{path} is {what}, expected a regular file; remove it or download the model again")


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        LimbeckError: the file holds anything else.
    """
    if path.stat().st_size > _LARGEST_JSON:
        raise LimbeckError(f"{path} has {path.stat().st_size >> 20} MiB, expected a small JSON file; check it")
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise LimbeckError(f"{path} cannot be read: it is no JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise LimbeckError(f"{path} holds a {type(found).__name__}, expected a JSON object; download it again")
    return found


def require_sizes(path: Path) -> None:
    """See that a configuration's sizes are numbers that a model can have.

    Raises:
        LimbeckError: names the field.
    """
    _require_fields(path, read_json_object(path))


def _require_fields(path: Path, fields: Mapping[str, Any]) -> None:
    for key, value in fields.items():
        if key in _SIZES and value is not None:
            least = 0 if key in EXPERT_COUNTS else 1
            for size in value if isinstance(value, list) else [value]:
                # What is no number at all transformers itself refuses.
                if isinstance(size, int) and not least <= size <= _SIZES[key]:
                    _refuse(path, key, value, f"a whole number from {least} to {_SIZES[key]}")
        elif key in _TEXTS and value is not None and not isinstance(value, str):
            _refuse(path, key, value, "a text")
        elif key in ("dtype", "torch_dtype") and value is not None:
            import torch

            if not isinstance(getattr(torch, value, None), torch.dtype):
                _refuse(path, key, value, "a type of torch, such as float32")
        elif key == "architectures" and value is not None:
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                _refuse(path, key, value, "a list of class names")
        elif key.endswith("_config") and isinstance(value, dict):
            _require_fields(path, value)


def _refuse(path: Path, key: str, value: Any, expected: str) -> None:
    raise LimbeckError(f"{path}: {key} is {str(value)[:60]!r}, expected {expected}; download the file again")


def require_fitting(folder: Path, config: Any) -> None:
    """Check that the weights in a folder have the vocabulary and the depth of its configuration.

    Raises:
        LimbeckError: names the field, and both numbers.
    """
    rows, depth = set(), 0
    for path in folder.glob("*.safetensors"):
        for tensor, entry in safetensors_header(path).items():
            if tensor.endswith(EMBEDDINGS) and len(entry["shape"]) == 2:
                rows.add(entry["shape"][0])
            if found := _BLOCK.search(tensor):
                depth = max(depth, int(found[1]) + 1)
    for field, said, there in (
        ("vocab_size", config.vocab_size, sorted(rows)),
        ("num_hidden_layers", config.num_hidden_layers, [depth] if depth and depth < config.num_hidden_layers else []),
    ):
        if there and said not in there:
            raise LimbeckError(
                f"config.json says {field} {said}, and its weights are of {there[0]}; "
                "they do not belong together: download both again"
            )
