"""One of two processes: asks a sharded teacher for signals as often as it likes, and writes down what it found.

RANK=0 WORLD_SIZE=2 ... python -m tests.distributed.sharded_teacher FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from limbeck.rollouts.collate import collate
from limbeck.teachers import sharded
from limbeck.teachers.base import TeacherModel
from limbeck.teachers.sharded import Sharded
from limbeck.types import LimbeckError
from tests.training.play import tiny_responses

RANK = int(os.environ.get("RANK", "0"))
# Rows of the batches of each rank: one has more of them, and of other lengths.
BATCHES = (((3, 8, 1), (0,), (2, 5)), ((4, 6),))


def local_bytes(model: torch.nn.Module) -> int:
    """Bytes of this rank's parts of the weights, those of blocks and those of everything."""
    weights: list[Any] = list(model.parameters())
    parts = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]
    return sum(part.numel() * part.element_size() for part in parts)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    teacher = Sharded().open(TeacherModel(model=str(folder / "model")), device=torch.device("cpu"), progress=None)
    found, said = {}, {}
    for number, rows in enumerate(BATCHES[RANK]):
        batch = collate(tiny_responses(), rows, pad_id=0)
        found[str(number)] = teacher.signal(batch).hidden_ND.clone()  # type: ignore[union-attr]
    teacher.attend()
    found["head"] = teacher.head.weight_VD.clone()
    model = teacher._scorer().model
    said["bytes"], said["blocks"] = local_bytes(model), local_bytes(model.model.layers)
    # Loaded again, as between stages; here none asks for anything.
    teacher.release()
    teacher.attend()
    save_file(found, folder / f"rank{RANK}.safetensors")
    sharded.PATIENCE_S = 3.0
    if RANK == 0:
        try:
            teacher.signal(collate(tiny_responses(), (0,), pad_id=0))
        except LimbeckError as error:
            said["late"] = str(error)
    (folder / f"rank{RANK}.json").write_text(json.dumps(said))
    if RANK == 1:
        # It lives and does not come.
        while not (folder / "rank0.json").exists():
            time.sleep(0.2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
