"""Effect of rounding on the updates of a student whose weights are kept in 16 bits."""

from __future__ import annotations

import torch
from torch import nn

from limbeck.models.whole import whole_tensor

# Weights looked at in one go: their copies in float32 should not be missed.
_CHUNK = 2**22


@torch.no_grad()
def unmoved_share(student: nn.Module, rate: float) -> tuple[float, torch.dtype] | None:
    """The share of the trained 16-bit weights that an update of `rate`, up or down, rounds back to what they were.

    AdamW moves a weight by about the learning rate at most. A bfloat16 number has 8 significant bits, so that a weight
    above some 256 to 512 times the rate stays what it is, step after step: nothing adds up.

    Returns:
        The share, exact, and the precision; None where all trained weights are kept in more bits.
    """
    unmoved, total, found = 0, 0, None
    for parameter in student.parameters():
        if not parameter.requires_grad or parameter.dtype not in (torch.bfloat16, torch.float16):
            continue
        found = parameter.dtype
        for weight in whole_tensor(parameter).flatten().split(_CHUNK):
            up, down = ((weight.float() + step).to(found) == weight for step in (rate, -rate))
            unmoved += int((up & down).sum())
        total += parameter.numel()
    return None if found is None else (unmoved / total, found)


def rounding_warning(student: nn.Module, rate: float) -> str | None:
    """How many weights cannot move at a learning rate; None where there are copies of them in float32."""
    lost = unmoved_share(student, rate)
    if lost is None:
        return None
    share, dtype = lost
    return (
        f"the student's weights are {str(dtype).removeprefix('torch.')} without a float32 copy: updates of the size of "
        f"the learning rate ({rate:.3g}) are rounded away at {share:.0%} of them, however many follow; set "
        "student.dtype=float32 train.bf16=true"
    )
