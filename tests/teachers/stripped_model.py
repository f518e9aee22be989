"""A model of which all but the last norm and the head is elsewhere."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from limbeck.models.heads import head_of
from limbeck.models.loading import load_model
from limbeck.rollouts.collate import collate
from limbeck.teachers.local import LocalTeacher
from limbeck.types import Response, TokenBatch
from tests.tiny_pair import write_model

NORM, TIED_HEAD = "model.norm.weight", "model.embed_tokens.weight"


def rows_of(length: int) -> TokenBatch:
    """Three rows of so many random ids, of which the first four are the prompt."""
    ids = torch.randint(3, 300, (3, length), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        Response(prompt_id=f"p{i}", author="data", prompt_ids=tuple(r[:4]), response_ids=tuple(r[4:]), stop="eos")
        for i, r in enumerate(ids)
    ]
    return collate(rows, range(3), pad_id=0)


class StrippedModel:
    """A model as a server has it, in `whole`, and the folder of it that is here: its last norm and its head alone."""

    def __init__(self, folder: Path, *, width: int = 32, **shape: Any) -> None:
        self.alone = threading.Lock()
        self.folder = write_model(folder / "teacher", head_rows=320, width=width, **shape)
        weights = self.folder / "model.safetensors"
        with safe_open(weights, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        # Unlike the ones that a model begins with.
        stored[NORM] = torch.linspace(0.5, 2, width)
        save_file(stored, weights, metadata={"format": "pt"})
        self.whole = Path(shutil.copytree(self.folder, folder / "whole"))
        loaded = load_model(str(self.whole))
        self.local = LocalTeacher(loaded.model, head_of(loaded.model, len(loaded.tokenizer)))
        weights.unlink()
        save_file({name: stored[name] for name in (NORM, TIED_HEAD)}, weights)

    def states(self, ids: list[int], layer: int = -1) -> torch.Tensor:
        """What the last block gives, or another one."""
        found: list[torch.Tensor] = []
        block = self.local.model.get_submodule("model.layers")[layer]  # type: ignore[index]
        # One at a time: a hook sees the passes of all threads.
        with self.alone, torch.no_grad():
            hook = block.register_forward_hook(lambda module, given, out: found.append(out))
            self.local.model(torch.tensor([ids]))
            hook.remove()
        return found[0][0]

    def hidden(self, ids: list[int]) -> torch.Tensor:
        """What the final norm gives."""
        with self.alone, torch.no_grad():
            return self.local.model.get_submodule("model")(torch.tensor([ids])).last_hidden_state[0]

    def scores(self, ids: list[int]) -> torch.Tensor:
        with self.alone, torch.no_grad():
            logits_TV = self.local.model(torch.tensor([ids])).logits[0, :, : self.local.head.vocab_size]
        return logits_TV.log_softmax(-1)
