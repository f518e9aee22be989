"""A student sharded over the ranks: each has its part of the weights, gradients and moments, by torch's `fully_shard`.

One block after another is gathered when it computes and let go of again, in the forward and in the backward pass; what
lies outside of the blocks (embeddings, last norm, head) is the root's and stays gathered from one to the other. The
blocks are gathered in the precision of the products and gradients are summed in float32, so that the update is that of
a whole student on each rank (DDP).

The student itself is sharded, once, whatever trains it afterwards; its loss is computed inside of its root (`in_root`).
One whose weights are still in its files is sharded without them, and each rank then reads its part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from limbeck.models.heads import decoder_blocks
from limbeck.models.quantization.on_grid import round_before_gathering
from limbeck.models.slices import read_parts
from limbeck.models.whole import keep_copy
from limbeck.recipe.sections import TrainSection
from limbeck.runtime.launcher import launched

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh

# The dimension of the mesh that parameters are sharded along. A second one would hold copies of the parts (HSDP).
SHARD = "shard"
_METHOD = "limbeck_in_root"


def is_asked(settings: TrainSection) -> bool:
    """Whether the recipe or the launch asks for a student that is sharded.

    Raises:
        LimbeckError: they contradict each other.
    """
    return launched().with_sharding(settings.sharding).sharded


def is_sharded(student: nn.Module) -> bool:
    """Whether a student is sharded."""
    return hasattr(student, _METHOD)


def shard(student: nn.Module, accelerator: Accelerator, *, bf16: bool) -> None:
    """Shard a student over all ranks, in place; one that is sharded stays as it is.

    Args:
        bf16: the products run in bfloat16, so that blocks are gathered in it.
    """
    if is_sharded(student):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    _, blocks = decoder_blocks(student)
    keep_copy(student, accelerator.device)
    round_before_gathering(student)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,), mesh_dim_names=(SHARD,))
    narrow = any(p.dtype in (torch.bfloat16, torch.float16) for p in student.parameters())
    # Activations stay in the precision that autocast gives them: what is sharded computes what a whole one does.
    root = MixedPrecisionPolicy(reduce_dtype=torch.float32 if narrow else None, cast_forward_inputs=False)
    inner = root
    if bf16 and not narrow:
        inner = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=inner)
    setattr(student, _METHOD, _call)
    fully_shard(student, mesh=mesh, mp_policy=root)
    register_fsdp_forward_method(student, _METHOD)
    read_parts(student, accelerator.device)


def in_root(student: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    """What a function of the student gives, with the student's own weights outside of its blocks gathered."""
    if not is_sharded(student):
        return function(*inputs)
    out = getattr(student, _METHOD)(function, *inputs)
    if not torch.is_grad_enabled():
        # No backward pass lets go of what is gathered, and the weights may change before it is used again.
        student.reshard()  # type: ignore[operator]
    return out


def shard_parameter(parameter: nn.Parameter, student: nn.Module) -> nn.Parameter:
    """A parameter beside a student that is sharded, sharded in the same way."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = _mesh_of(student)
    return nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)] * mesh.ndim))


def _call(function: Callable[..., Any], *inputs: Any) -> Any:
    return function(*inputs)


def _mesh_of(student: nn.Module) -> DeviceMesh:
    return next(student.parameters()).device_mesh  # type: ignore[attr-defined, return-value]
