"""One of the two processes of test_sharded.py: compares a sharded head with a whole one and writes down what it saw.

RANK=0 WORLD_SIZE=2 python -m tests.objectives.sharded_worker FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from limbeck.objectives import AdaptiveTemperature, Temperature, build_objective, fused_distillation_loss
from limbeck.types import DenseSignal, Head

V, D, N = 41, 8, 30


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.manual_seed(0)
    whole = nn.Linear(D, V + 1, dtype=torch.float64)
    head = nn.Linear(D, V + 1, dtype=torch.float64)
    head.load_state_dict(whole.state_dict())
    fully_shard(head, mesh=init_device_mesh("cpu", (2,)))
    hidden_ND = torch.randn(2 * N, D, dtype=torch.float64)
    teacher = DenseSignal(
        hidden_ND=torch.randn(2 * N, D, dtype=torch.float64),
        head=Head(weight_VD=torch.randn(V, D, dtype=torch.float64), vocab_size=V),
    )
    mine = slice(rank * N, (rank + 1) * N)
    objective = build_objective("js")

    def loss(layer: nn.Linear, rows: slice, hidden: torch.Tensor) -> torch.Tensor:
        signal = DenseSignal(hidden_ND=teacher.hidden_ND[rows], head=teacher.head)
        student = Head(weight_VD=layer.weight, bias_V=layer.bias, vocab_size=V)
        return fused_distillation_loss(hidden, student, signal, objective).loss

    local_ND = hidden_ND[mine].clone().requires_grad_()
    with CommDebugMode() as communication:
        # Twice, as under gradient accumulation: the second gradient adds to the first.
        for _ in range(2):
            loss(head, mine, local_ND).backward()
    counts = {str(op): count for op, count in communication.get_comm_counts().items()}
    all_ND = hidden_ND.clone().requires_grad_()
    # Means over equal halves, averaged over the ranks, are the mean over all tokens.
    (2 * loss(whole, slice(0, 2 * N), all_ND)).backward()
    assert isinstance(head.weight, DTensor) and all_ND.grad is not None and local_ND.grad is not None
    gradients = {name: getattr(head, name).grad for name in ("weight", "bias")}
    found = {
        "weight is sharded": head.weight.to_local().shape[0] < V + 1,
        "gradient is sharded": all(isinstance(grad, DTensor) for grad in gradients.values()),
        "gathers": sum(count for op, count in counts.items() if "all_gather" in op),
        "scatters": sum(count for op, count in counts.items() if "reduce_scatter" in op),
        "hidden error": float((local_ND.grad / 2 - all_ND.grad[mine]).abs().max()),
    }
    for name, grad in gradients.items():
        found[f"{name} error"] = float((grad.full_tensor() - getattr(whole, name).grad).abs().max())
    found["sharded teacher error"] = sharded_teacher_error(hidden_ND[mine], teacher, head, whole)
    (folder / f"rank{rank}.json").write_text(json.dumps(found), "utf-8")
    dist.destroy_process_group()


def sharded_teacher_error(hidden_ND: torch.Tensor, teacher: DenseSignal, head: nn.Linear, whole: nn.Linear) -> float:
    """Of a loss that looks at both models before it begins, with both heads sharded, against both whole."""
    sharded = nn.Linear(D, V, bias=False, dtype=torch.float64)
    with torch.no_grad():
        sharded.weight.copy_(teacher.head.weight_VD)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    objective = build_objective("tad", k=3, per_sequence=True)
    losses = []
    for student, weight_VD in ((head, sharded.weight), (whole, teacher.head.weight_VD)):
        signal = DenseSignal(hidden_ND=teacher.hidden_ND[:N], head=Head(weight_VD=weight_VD, vocab_size=V))
        losses.append(
            fused_distillation_loss(
                hidden_ND,
                Head(weight_VD=student.weight, bias_V=student.bias, vocab_size=V),
                signal,
                objective,
                temperature=Temperature(loss=2.0, adapt=AdaptiveTemperature()),
                sequence_N=torch.arange(N) // 10,
            ).loss
        )
    return float((losses[0] - losses[1]).abs())


if __name__ == "__main__":
    main()
