"""Weights that are trained as floats and computed with on their grid: the straight-through estimator.

A step costs little more than without: the grids are those of the weights it begins with and stay (Bengio et al. 2013
for the gradient, which the floats get as if there were no rounding).

A weight that is sharded is rounded before it is gathered: each rank rounds its own rows, the products see the rounded
weight, and the gradient that comes back is added up into the floats. What is gathered is let go of as without a grid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_map_only

from limbeck.models.quantization.base import BlockFormat, Grid
from limbeck.models.quantization.formats import snap

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy


# Below the model's own folder, where loaders of its weights do not look.
GRIDS_FILE = "quantized/grids.safetensors"


class OnGrid(nn.Module):
    """The parametrisation of a weight that puts it on its grid and passes the gradient through."""

    def __init__(self, format: BlockFormat, grid: Grid):
        super().__init__()
        _count_updates()
        self.format = format
        self._parts = len(grid)
        for i, part in enumerate(grid):
            # A function of the weights that the student begins with: no checkpoint needs it.
            self.register_buffer(f"grid_{i}", part, persistent=False)
        # Set where the weight comes gathered out of parts that are on the grid.
        self.gathered = False
        self._seen: tuple[int, int] | None = None
        self._snapped: Tensor | None = None

    @property
    def grid(self) -> Grid:
        return tuple(getattr(self, f"grid_{i}") for i in range(self._parts))

    def rows(self, first: int, count: int, of: int) -> Grid:
        """The grid of some rows of a matrix that has `of`."""
        return tuple(part[first * len(part) // of : (first + count) * len(part) // of] for part in self.grid)

    def forward(self, weight: Tensor) -> Tensor:
        if self.gathered:
            return weight
        return _StraightThrough.apply(weight, self._current(weight))  # type: ignore[return-value]

    def forget(self) -> None:
        """Let go of the rounded weight, where the floats are another model's from now on."""
        self._snapped = self._seen = None

    def _current(self, weight: Tensor) -> Tensor:
        """The weight on its grid, computed once for each update of it."""
        now = (weight._version, weight.data_ptr())
        if self._snapped is None or self._seen != now:
            # What was made in inference mode could not enter a graph later on.
            with torch.inference_mode(False), torch.no_grad():
                self._snapped, self._seen = snap(self.format, weight, self.grid).to(weight.dtype), now
        return self._snapped


class _StraightThrough(torch.autograd.Function):
    """The second operand as value, the first one's gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, snapped: Tensor) -> Tensor:
        del ctx, weight
        return snapped.view_as(snapped)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0], None


# What `fully_shard` and a parameter make of a weight's tensor.
_CUTTING = (
    torch.ops.aten.detach.default,
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.split.Tensor,
    torch.ops.aten.view.default,
)


class RowsOnGrid(Tensor):
    """A rank's rows of a weight on a grid: floats that are rounded as they are gathered.

    The two methods are what torch's `fully_shard` asks of a tensor that is not gathered as it is. Everything else sees
    a plain tensor, and gets one; but the cutting up of a weight gives rows of this kind.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        with no_dispatch():
            out = func(*args, **(kwargs or {}))
        return tree_map_only(Tensor, cls.of, out) if func in _CUTTING else out

    @classmethod
    def of(cls, rows: Tensor) -> Tensor:
        """The same numbers, as rows that are rounded."""
        return rows if isinstance(rows, cls) else Tensor._make_subclass(cls, rows)

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[Tensor, ...], None]:
        """The rounded rows, filled up to as many as the first rank has."""
        del outer_stride
        with no_dispatch():
            kept, own = _grid_in(module), self.detach()
        most = -(-outer_size[0] // mesh.size())
        rounded = own.new_zeros((most, *outer_size[1:]), dtype=mp_policy.param_dtype or own.dtype)
        if len(own):
            rows = kept.rows(most * mesh.get_local_rank(), len(own), outer_size[0])
            with torch.no_grad():
                rounded[: len(own)] = snap(kept.format, own, rows)
        return (rounded,), None

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """What was gathered, in the memory that is there for it."""
        del metadata, param_dtype
        return None if out is not None else (all_gather_outputs[0], ())


def round_before_gathering(model: nn.Module) -> None:
    """Have the weights of a model that are on a grid rounded by rows, in place, before it is sharded."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if (kept := grid_of_weight(module)) is not None:
            kept.gathered = True
            parameters: Any = module.parametrizations["weight"]  # type: ignore[index]
            floats: nn.Parameter = parameters.original
            if id(floats) not in made:
                made[id(floats)] = nn.Parameter(RowsOnGrid.of(floats.detach()), floats.requires_grad)
            parameters.original = made[id(floats)]


def put_on_grid(modules: Sequence[nn.Module], format: BlockFormat, grid: Grid) -> None:
    """Have a weight that some modules share computed with on a grid."""
    kept = OnGrid(format, grid)
    for module in modules:
        # Torch's own check computes the weight, which may still be in its files.
        parametrize.register_parametrization(module, "weight", kept, unsafe=True)


def save_grids(folder: Path, model: nn.Module, formats: Mapping[str, str]) -> None:
    """Write the grids of a model's weights into its folder.

    Args:
        formats: names of formats by the weight's name in the plain model.
    """
    path, parts = folder / GRIDS_FILE, dict[str, Tensor]()
    for name in formats:
        _, kept = floats_of(model, name)
        parts |= {f"{name}.{i}": part.cpu().contiguous() for i, part in enumerate(kept.grid)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(parts, path, metadata={"formats": json.dumps(dict(formats))})


def read_grids(folder: Path) -> dict[str, tuple[str, Grid]]:
    """The format and the grid of each weight that `save_grids` wrote, by its name."""
    with safe_open(folder / GRIDS_FILE, "pt") as file:
        formats: dict[str, str] = json.loads(file.metadata()["formats"])
        parts = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    found: dict[str, tuple[str, Grid]] = {}
    for name, chosen in formats.items():
        keys = takewhile(parts.__contains__, map(f"{name}.{{}}".format, count()))
        found[name] = (chosen, tuple(map(parts.__getitem__, keys)))
    return found


def grid_of_weight(module: nn.Module) -> OnGrid | None:
    """What keeps a module's weight on a grid; None where nothing does."""
    parameters: Any = getattr(module, "parametrizations", {})
    return _grid_in(parameters["weight"]) if "weight" in parameters else None


def floats_of(model: nn.Module, name: str) -> tuple[Tensor, OnGrid]:
    """The floats of a weight that is trained, by its name in the plain model, and what keeps it on its grid."""
    module: Any = model.get_submodule(name.removesuffix(".weight"))
    kept = grid_of_weight(module)
    assert kept is not None, "trained weights stay on their grid"
    return module.parametrizations["weight"].original, kept


def _grid_in(parametrizations: Any) -> OnGrid:
    kept = parametrizations[0]
    assert isinstance(kept, OnGrid), "no other parametrisation is made here"
    return kept


@cache
def _count_updates() -> None:
    """Let each step of an optimizer count as a change of its parameters, which that of fused ones does not."""

    def changed(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])

    register_optimizer_step_post_hook(changed)
