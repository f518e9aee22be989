"""The elementwise work on a block of logits: values and gradient of an objective, compiled where a compiler exists."""

from __future__ import annotations

import contextlib
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from limbeck.objectives.base import LOG_ZERO, Objective, Rows, TemperatureScale
from limbeck.objectives.fused.projection import LogitTransform
from limbeck.objectives.sums import row_leaves
from limbeck.objectives.support import restrict
from limbeck.objectives.temperature import scaled
from limbeck.types import LimbeckError, Support

Compile = Literal["auto", "on", "off"]
Block = dict[str, Tensor]
# Below this the elementwise work is too small a part to pay for seconds of compilation.
COMPILE_FROM_VOCAB = 16384
# The working set of a block: small enough for the caches, large enough to feed every thread.
BLOCK_BYTES = 4 << 20
# A GPU needs rows enough for all its processors; beyond this a block fills no better.
GPU_BLOCK_ROWS = 1024


class Work(Protocol):
    """Function of `run_body`: returns values of each token (values, N) and may write into the block. Hashable."""

    def __call__(self, block: Block, kept: list[Tensor] | None = None) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Body:
    """Computation on a block. Equal bodies share one compilation for each shape.

    A block is a dict of tensors whose first dimension is the token: `student` (products of hidden states and weight, in
    their dtype; the gradient overwrites it), `teacher` (products too) or the columns of a sparse signal, `student_tau`,
    `teacher_tau`, `weight`, `label` and `option.NAME`. Everything is computed in the dtype of `weight`.

    Attributes:
        measure: also give entropies at temperature, forward KL, acceptance and agreement at temperature 1, and what the
            kept tokens hold.
        labels: then also the log-probabilities of `label` at temperature 1 (full support).
    """

    objective: Objective
    support: Support
    scale: TemperatureScale
    student_finish: LogitTransform
    teacher_finish: LogitTransform
    with_grad: bool
    measure: bool
    labels: bool = False

    @property
    def values(self) -> int:
        """Number of values per token."""
        return sum(1 for _ in row_leaves(self.objective)) + len(self.measures)

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measures beside the values."""
        return measured_on(self.support, labels=self.labels) if self.measure else ()

    def __call__(self, block: Block, kept: list[Tensor] | None = None) -> Tensor:
        """Values of the parts, then the measures, each (N,); the weighted gradient is left in `student`.

        Args:
            kept: takes up what must be computed once and stay in memory, which a compiler would compute at every use:
                exponentials and reciprocals, the dearest part of most objectives.
        """
        logits_NV = self.student_finish.logits(block["student"].to(block["weight"].dtype))
        whole = self._rows(logits_NV, block)
        if kept is not None:
            whole = replace(whole, soften=partial(_softened, kept=kept))
            kept += [whole.student_inv_tau_N1, whole.teacher_inv_tau_N1]
        seen, spread = restrict(self.support, whole, block)
        values, seen_grad, whole_grad = [], None, None
        for weight, part in row_leaves(self.objective):
            if "teacher" in part.reads:
                value_N, grad = scaled(part, seen)
                seen_grad = weight * grad if seen_grad is None else seen_grad + weight * grad
            else:
                value_N, grad = scaled(part, whole)
                whole_grad = weight * grad if whole_grad is None else whole_grad + weight * grad
            values.append(value_N)
        if self.measure:
            values += _measure(seen, self._untempered(whole, seen, block), labels=self.labels)
            if self.support != "full":
                values += _kept(whole, seen, block, self.support)
        if self.with_grad:
            # Last of all: the logits may be the products themselves, which the gradient overwrites.
            grads = [g for g in (whole_grad, None if seen_grad is None else spread(seen_grad)) if g is not None]
            grad_NV = grads[0] if len(grads) == 1 else grads[0] + grads[1]
            grad_NV = grad_NV * block["weight"] * self.student_finish.slope(logits_NV)
            # Left out whatever it is: zero times a NaN would not be zero.
            block["student"].copy_(torch.where(block["weight"] == 0, 0.0, grad_NV))
        return torch.stack(values)

    def _untempered(self, whole: Rows, seen: Rows, block: Block) -> Rows:
        """The rows that are compared at temperature 1; a class for all other tokens has another share there."""
        if self.support not in ("topk_tail", "shared_tail"):
            return seen
        one_N1 = torch.ones_like(whole.student_tau_N1)
        plain = replace(whole, student_tau_N1=one_N1, teacher_tau_N1=one_N1)
        return restrict(self.support, plain, block | {"log_z": torch.zeros_like(one_N1)})[0]

    def _rows(self, logits_NV: Tensor, block: Block) -> Rows:
        dense = block.get("teacher")
        # Where no teacher is read, or it is sparse, the whole rows hold a uniform one that takes no memory.
        teacher_NV = (
            logits_NV.new_zeros(1, 1).expand_as(logits_NV)
            if dense is None
            else self.teacher_finish.logits(dense.to(logits_NV.dtype))
        )
        return Rows(
            student_logits_NK=logits_NV,
            teacher_logits_NK=teacher_NV,
            student_tau_N1=block["student_tau"],
            teacher_tau_N1=block["teacher_tau"],
            scale=self.scale,
            label_N=block.get("label"),
            token_options={name.removeprefix("option."): t for name, t in block.items() if name.startswith("option.")},
        )


def _softened(logits_NV: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Softmax and its logarithm from one exponential per entry."""
    lowered_NV = logits_NV - logits_NV.amax(-1, keepdim=True)
    exponential_NV = lowered_NV.exp()
    total_N1 = exponential_NV.sum(-1, keepdim=True)
    share_N1 = 1 / total_N1
    kept += [exponential_NV, share_N1]
    return exponential_NV * share_N1, (lowered_NV - total_N1.log()).clamp_min(LOG_ZERO)


def measured_on(support: Support, *, labels: bool = False) -> tuple[str, ...]:
    """Quantities that can be measured of every token on a support, by name; see `fused_distillation_loss`."""
    if support == "sampled":
        return ()
    both = ("student_kept", "teacher_kept")
    kept = {"topk_renorm": ("student_kept",), "topk_tail": both, "shared_tail": both, "shared_renorm": both}
    at_label = ("log_q", "log_p") if labels else ()
    same = ("forward_kl", "acceptance", "top1_agreement")
    return ("student_entropy", "teacher_entropy", *same, *at_label, *kept.get(support, ()))


def _kept(whole: Rows, seen: Rows, block: Block, support: Support) -> list[Tensor]:
    """Mass of the kept tokens at the temperatures: the student's, and the teacher's where its normaliser is known."""
    if support in ("shared_tail", "shared_renorm"):
        shared, sides = len(block["shared_ids"]), []
        for every_NV, kept_NK, inv_tau_N1 in (
            (whole.student_logits_NK, seen.student_logits_NK, whole.student_inv_tau_N1),
            (whole.teacher_logits_NK, seen.teacher_logits_NK, whole.teacher_inv_tau_N1),
        ):
            log_all_N, log_kept_N = ((t * inv_tau_N1).logsumexp(-1) for t in (every_NV, kept_NK[:, :shared]))
            sides.append((log_kept_N - log_all_N).exp())
        return sides
    kept_N = whole.q_NK.gather(-1, block["ids"]).sum(-1)
    if support == "topk_renorm":
        return [kept_N]
    return [kept_N, (block["logp"] / block["teacher_tau"] - block["log_z"]).exp().sum(-1)]


def _measure(rows: Rows, plain: Rows, *, labels: bool) -> list[Tensor]:
    """Entropies of student and teacher at their temperatures; and at 1, comparable across runs, KL(teacher || student),
    the probability that both share (sum of the smaller ones) and whether their likeliest token is the same.

    With `labels` also the log-probabilities of the labels at 1, of the student and of the teacher.

    Args:
        plain: the rows as they are at temperature 1.
    """
    log_q_NK, log_p_NK = (
        t.log_softmax(-1).clamp_min(LOG_ZERO) for t in (plain.student_logits_NK, plain.teacher_logits_NK)
    )
    forward_N = (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1)
    shared_N = torch.minimum(log_p_NK, log_q_NK).exp().sum(-1)
    same_N = (log_p_NK.argmax(-1) == log_q_NK.argmax(-1)).to(shared_N.dtype)
    measured = [-(rows.q_NK * rows.log_q_NK).sum(-1), -(rows.p_NK * rows.log_p_NK).sum(-1)]
    measured += [forward_N, shared_N, same_N]
    if labels:
        assert plain.label_N is not None, "the door asks for them"
        label_N1 = plain.label_N.clamp_min(0).unsqueeze(-1)
        measured += [log_NK.gather(-1, label_N1).squeeze(-1) for log_NK in (log_q_NK, log_p_NK)]
    return measured


def block_rows(vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a block: a power of two within the byte budget of the caches of a CPU."""
    if device.type != "cpu":
        return GPU_BLOCK_ROWS
    rows = max(4, BLOCK_BYTES // (vocab_size * dtype.itemsize))
    return min(256, 1 << (rows.bit_length() - 1))


@cache
def compiler_available(device_type: str) -> bool:
    """Whether Inductor can build for this device: a C++ compiler and Python's headers, or Triton on a GPU."""
    if device_type == "cpu":
        header = Path(sysconfig.get_path("include")) / "Python.h"
        return header.exists() and shutil.which(os.environ.get("CXX", "g++")) is not None
    from torch.utils._triton import has_triton

    return has_triton()


def resolve_compile(option: Compile, vocab_size: int, device: torch.device) -> bool:
    """Whether to compile. Depends on the environment, the option and the model, never on data or time.

    Raises:
        LimbeckError: for an unknown option, or "on" where no compiler is found.
    """
    if option not in ("auto", "on", "off"):
        raise LimbeckError(f"compile={option!r}: expected auto, on or off")
    if option == "on" and not compiler_available(device.type):
        raise LimbeckError(
            f"compile='on' but no compiler was found for {device.type}: install g++, or use 'auto' or 'off'"
        )
    if option == "auto":
        return vocab_size >= COMPILE_FROM_VOCAB and compiler_available(device.type)
    return option == "on"


def run_body(body: Work, block: Block, compiled: bool) -> Tensor:
    """Apply a body to a block. A compiled body wants blocks of one size, so that it is built once."""
    if not compiled:
        return body(block)
    layout = tuple((name, tuple(t.shape), t.dtype, t.device) for name, t in sorted(block.items()))
    return compiled_body(body, layout)([block[name] for name, *_ in layout])


@cache
def compiled_body(body: Work, layout: tuple[tuple, ...]) -> Callable[[list[Tensor]], Tensor]:
    """Trace a body on example tensors of this layout and build it with Inductor: a few seconds, once per process."""
    names = [name for name, *_ in layout]

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        # What a graph hands out is not computed a second time inside it. A GPU computes faster than it writes.
        kept: list[Tensor] = []
        block = dict(zip(names, tensors, strict=True))
        return (body(block, kept if tensors[0].device.type == "cpu" else None), *kept)

    examples = [torch.ones(shape, dtype=dtype, device=device) for _, shape, dtype, device in layout]
    with torch.no_grad(), warnings.catch_warnings():
        # Inductor's own imports use what torch deprecates elsewhere: nothing a user could act on.
        warnings.simplefilter("ignore", DeprecationWarning)
        kernel = _built(flat, examples)

    def call(tensors: list[Tensor]) -> Tensor:
        return kernel(*tensors)[0]

    return call


def _built(flat: Callable[..., tuple[Tensor, ...]], examples: list[Tensor]) -> Callable[..., list[Tensor]]:
    """A function of tensors like these, built by Inductor.

    Raises:
        LimbeckError: the compiler fails, also when it is asked again: Ctrl-C ends the first of a whole process group.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.exc import InductorError
    from torch.fx.experimental.proxy_tensor import make_fx

    with contextlib.suppress(InductorError):
        return compile_fx(make_fx(flat)(*examples), examples)  # pyright: ignore
    try:
        return compile_fx(make_fx(flat)(*examples), examples)  # pyright: ignore
    except InductorError as error:
        lines = str(error).splitlines()
        said = next((line.strip() for line in lines if "error:" in line), lines[0] if lines else "it says nothing")
        raise LimbeckError(
            f"the compiler cannot build the loss ({said[:300]}): mend {os.environ.get('CXX', 'g++')} and its headers, "
            "or work without it: train.compile=auto, and CXX=none in the environment"
        ) from error
