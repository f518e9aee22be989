"""One pass over all tiles: products, bodies, and the gradients collected on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from limbeck.objectives.fused.body import Block, Body, run_body
from limbeck.objectives.fused.projection import Projection
from limbeck.objectives.fused.tiles import Tiling
from limbeck.ops import onednn
from limbeck.types import Head

# Which of hidden states, head weight and head bias want a gradient.
Wanted = tuple[bool, bool, bool]


@dataclass(frozen=True, kw_only=True)
class Grads:
    """Accumulators in the working dtype; None where no gradient is wanted."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None

    @classmethod
    def allocate(cls, hidden_ND: Tensor, head: Head, wanted: Wanted, dtype: torch.dtype) -> Grads:
        sources = (hidden_ND, head.weight_VD, head.bias_V)
        # On a CPU a pass over memory is dear, and the first tile writes what the others add to.
        made = torch.empty if hidden_ND.device.type == "cpu" and len(hidden_ND) else torch.zeros
        hidden, weight, bias = (
            made(t.shape, dtype=dtype, device=t.device) if t is not None and want else None
            for t, want in zip(sources, wanted, strict=True)
        )
        if weight is not None:
            weight[head.vocab_size :] = 0
        if bias is not None:
            bias.zero_()
        return cls(hidden_ND=hidden, weight_VD=weight, bias_V=bias)

    def add(self, tokens: slice, grad_NV: Tensor, hidden_ND: Tensor, weight_VD: Tensor) -> None:
        """Add a tile: its gradient in the products, its hidden states, and the head's weight."""
        vocab = weight_VD.shape[0]
        if self.bias_V is not None:
            self.bias_V[:vocab].add_(grad_NV.sum(0, dtype=self.bias_V.dtype))
        hidden_ND = hidden_ND.to(grad_NV.dtype)
        if self.hidden_ND is not None:
            if onednn.fits(grad_NV, weight_VD):
                self.hidden_ND[tokens] = onednn.product(grad_NV, weight_VD.T)
            elif grad_NV.dtype == self.hidden_ND.dtype:
                torch.mm(grad_NV, weight_VD, out=self.hidden_ND[tokens])
            else:
                self.hidden_ND[tokens] = grad_NV @ weight_VD
        if self.weight_VD is not None:
            _add_product(self.weight_VD[:vocab], grad_NV.T, hidden_ND, first=tokens.start == 0)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b; the first writes it, without reading what is there.

    In half precision the products take the model's dtype, as autograd's would; their sum does not.
    """
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0.0 if first else 1.0)
    elif a.device.type == "cuda" and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Inputs of a pass beside the tokens. `teacher` is None for a sparse signal, or without a teacher.

    Attributes:
        constants: tensors of a block that are the same for all tokens.
    """

    student: Projection
    teacher: Projection | None
    body: Body
    tiling: Tiling
    compiled: bool
    constants: Block = field(default_factory=dict)

    def run(
        self, student_ND: Tensor, teacher_ND: Tensor | None, columns: Block, wanted: Wanted, head: Head
    ) -> tuple[Tensor, Grads]:
        """Values (parts and measures, N) and gradients of all tokens."""
        keep_small_buffers()
        counts_N1 = columns["weight"] != 0
        student_ND = _finite_where_idle(student_ND, counts_N1)
        dtype = self.student.dtype
        sides = (
            {"student": self.student} if self.teacher is None else {"student": self.student, "teacher": self.teacher}
        )
        # In half precision the products are rounded as autograd's would be: wider buffers would hold no more.
        logits = {
            name: torch.empty(
                (self.tiling.tile_rows, side.vocab_size), dtype=side.weight_VD.dtype, device=student_ND.device
            )
            for name, side in sides.items()
        }
        grads = Grads.allocate(student_ND, head, wanted, dtype)
        values_PN = torch.empty(self.body.values, self.tiling.tokens, dtype=dtype, device=student_ND.device)
        for tokens in self.tiling.tiles():
            count = tokens.stop - tokens.start
            self.student.into(student_ND[tokens], logits["student"][:count])
            if self.teacher is not None:
                assert teacher_ND is not None
                teacher_tile_ND = _finite_where_idle(teacher_ND[tokens], counts_N1[tokens])
                self.teacher.into(teacher_tile_ND, logits["teacher"][:count])
            self._blocks(logits, {name: column[tokens] for name, column in columns.items()}, values_PN[:, tokens])
            if self.body.with_grad:
                grads.add(tokens, logits["student"][:count], student_ND[tokens], self.student.weight_VD)
        return values_PN, grads

    def _blocks(self, logits: Block, columns: Block, values_PN: Tensor) -> None:
        """Run the body over the blocks of a tile; a compiled one gets its last block filled up with idle tokens."""
        count = values_PN.shape[1]
        for start in range(0, count, self.tiling.block_rows):
            stop = min(start + self.tiling.block_rows, count)
            block = {name: column[start:stop] for name, column in columns.items()}
            idle = start + self.tiling.block_rows - stop if self.compiled else 0
            if idle:
                block = {name: torch.cat([c, c[-1:].expand(idle, *c.shape[1:])]) for name, c in block.items()}
            block |= self.constants
            for name, buffer in logits.items():
                buffer[stop : stop + idle].zero_()
                block[name] = buffer[start : stop + idle]
            # Copied, not kept: what a compiled body returns may be a corner of a buffer as large as the block.
            values_PN[:, start:stop] = run_body(self.body, block, self.compiled)[:, : stop - start]


@cache
def keep_small_buffers() -> None:
    """Make glibc keep buffers of a block's size instead of faulting them in for every block. Once per process.

    Freeing an allocation above its threshold makes it serve smaller ones from a heap that it trims only beyond twice
    that size (mallopt(3), M_MMAP_THRESHOLD); 31 MiB is just under the largest size it learns from. No page is touched,
    and other C libraries only allocate and free.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def _finite_where_idle(hidden_ND: Tensor, counts_N1: Tensor) -> Tensor:
    """The states, without what is not finite in tokens of weight zero: zero times a NaN would not be zero."""
    hidden_ND = hidden_ND.detach()
    return torch.where(counts_N1 | hidden_ND.isfinite(), hidden_ND, 0.0)
