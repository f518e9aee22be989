"""llama.cpp's k-quants: blocks of 256 whose parts have scales of their own, themselves kept in few bits.

The scales are searched as llama.cpp searches them (ggml-quants.c, quantize_row_q4_K_ref and quantize_row_q6_K_ref), for
all blocks at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.models.quantization.base import BlockFormat, Grid, half, half_bytes, inverse, nibbles, of_half_bytes

# Blocks that are searched at once, so that the copies of the search stay small.
_CHUNK = 2**13


def _in_chunks(search: object, weight_NB: Tensor) -> Grid:
    assert callable(search)
    parts = [search(part) for part in weight_NB.split(_CHUNK)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _affine_search(x_PW: Tensor, weight_PW: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum (P, 1) of parts, so that the weighted squared error of ``scale q - minimum`` is least.

    Of some first guesses of the scale each is followed by the least squares for its levels; the best is kept.
    """
    low, high = x_PW.amin(-1, keepdim=True).clamp(max=0), x_PW.amax(-1, keepdim=True)
    flat = high == low
    high = torch.where(flat, low + 1, high)
    sum_w, sum_x = weight_PW.sum(-1, keepdim=True), (weight_PW * x_PW).sum(-1, keepdim=True)

    def levels_at(steps: float, minimum: Tensor) -> Tensor:
        return (steps / (high - minimum) * (x_PW - minimum)).round_().clamp_(0, top)

    def error_of(level: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        return (weight_PW * (scale * level + minimum - x_PW).square()).sum(-1, keepdim=True)

    best_scale, best_minimum = (high - low) / top, low
    best_error = error_of(levels_at(top, low), best_scale, low)
    for step in range(21):
        # From the best minimum so far, as it is there.
        level = levels_at(-1.0 + 0.1 * step + top, best_minimum)
        sum_l, sum_xl = (weight_PW * level).sum(-1, keepdim=True), (weight_PW * level * x_PW).sum(-1, keepdim=True)
        sum_l2 = (weight_PW * level * level).sum(-1, keepdim=True)
        spread = sum_w * sum_l2 - sum_l * sum_l
        scale, minimum = (sum_w * sum_xl - sum_x * sum_l) / spread, (sum_l2 * sum_x - sum_l * sum_xl) / spread
        # A minimum above 0 cannot be kept.
        above = minimum > 0
        scale = torch.where(above, sum_xl / sum_l2, scale)
        minimum = torch.where(above, torch.zeros_like(minimum), minimum)
        error = error_of(level, scale, minimum)
        better = (spread > 0) & (error < best_error)
        best_scale, best_minimum = torch.where(better, scale, best_scale), torch.where(better, minimum, best_minimum)
        best_error = torch.where(better, error, best_error)
    return torch.where(flat, torch.zeros_like(best_scale), best_scale), -best_minimum


@dataclass(frozen=True)
class Q4_K(BlockFormat):
    """4 bits, blocks of 256 in parts of 32: ``w = d s q - m t``, with s and t of each part in 6 bits."""

    width = 256
    block_bytes = 144
    gguf = "Q4_K"
    replacement = "q5_0"

    def grid(self, weight_NB: Tensor) -> Grid:
        return _in_chunks(self._searched, weight_NB)

    def _searched(self, weight_NB: Tensor) -> Grid:
        x_PW = weight_NB.reshape(-1, 32)
        importance_PW = x_PW.abs() + x_PW.square().mean(-1, keepdim=True).sqrt()
        scale_P1, minimum_P1 = _affine_search(x_PW, importance_PW, 15)
        scale_N8, minimum_N8 = scale_P1.view(-1, 8), minimum_P1.view(-1, 8)
        both = []
        for value_N8 in (scale_N8, minimum_N8):
            top_N1 = value_N8.amax(-1, keepdim=True).clamp(min=0)
            share_N8 = (value_N8 * torch.where(top_N1 > 0, 63 / top_N1, torch.zeros_like(top_N1))).round()
            both.append((half(top_N1 / 63), share_N8.clamp(0, 63)))
        (d_N1, share_N8), (m_N1, lowered_N8) = both
        return d_N1, m_N1, share_N8, lowered_N8

    @staticmethod
    def _parts(grid: Grid) -> tuple[Tensor, Tensor]:
        """Scale and minimum of each part, (N, 8, 1)."""
        d_N1, m_N1, share_N8, lowered_N8 = grid
        return (d_N1 * share_N8)[..., None], (m_N1 * lowered_N8)[..., None]

    def levels(self, weight_NB: Tensor, grid: Grid) -> Tensor:
        scale_N81, minimum_N81 = self._parts(grid)
        x_N8W = weight_NB.unflatten(-1, (8, 32))
        level_N8W = (x_N8W + minimum_N81).div_(torch.where(scale_N81 == 0, torch.inf, scale_N81))
        return level_N8W.round_().clamp_(0, 15).flatten(1)

    def decode(self, level_NB: Tensor, grid: Grid) -> Tensor:
        scale_N81, minimum_N81 = self._parts(grid)
        return (level_NB.unflatten(-1, (8, 32)) * scale_N81).sub_(minimum_N81).flatten(1)

    def pack(self, level_NB: Tensor, grid: Grid) -> Tensor:
        d_N1, m_N1, share_N8, lowered_N8 = grid
        (s, t) = (part.to(torch.uint8) for part in (share_N8, lowered_N8))
        # Of parts 0 to 3 all six bits, of parts 4 to 7 the high two bits above them and the low four at the end.
        scales = [s[:, :4] | (s[:, 4:] >> 4 << 6), t[:, :4] | (t[:, 4:] >> 4 << 6), (s[:, 4:] & 15) | (t[:, 4:] << 4)]
        return torch.cat([half_bytes(d_N1), half_bytes(m_N1), *scales, _pairs_of_parts(level_NB)], dim=-1)

    def unpack(self, block_NY: Tensor) -> tuple[Tensor, Grid]:
        low, high, last = block_NY[:, 4:8], block_NY[:, 8:12], block_NY[:, 12:16]
        share = torch.cat([low & 63, (last & 15) | (low >> 6 << 4)], dim=-1)
        lowered = torch.cat([high & 63, (last >> 4) | (high >> 6 << 4)], dim=-1)
        quads_N4Y = block_NY[:, 16:].unflatten(-1, (4, 32))
        level_NB = torch.stack([quads_N4Y & 15, quads_N4Y >> 4], dim=2).flatten(1)
        d_N1, m_N1 = of_half_bytes(block_NY[:, :2]), of_half_bytes(block_NY[:, 2:4])
        return level_NB.to(torch.float32), (d_N1, m_N1, share.to(torch.float32), lowered.to(torch.float32))


def _pairs_of_parts(level_NB: Tensor) -> Tensor:
    """Each two neighbouring parts of 32 in 32 bytes."""
    return nibbles(level_NB.unflatten(-1, (4, 64))).flatten(1)


@dataclass(frozen=True)
class Q6_K(BlockFormat):
    """6 bits, blocks of 256 in parts of 16: ``w = d s (q - 32)``, with s of each part in 8 bits."""

    width = 256
    block_bytes = 210
    gguf = "Q6_K"
    replacement = "q8_0"

    def grid(self, weight_NB: Tensor) -> Grid:
        return _in_chunks(self._searched, weight_NB)

    def _searched(self, weight_NB: Tensor) -> Grid:
        scale_NP = _symmetric_search(weight_NB.reshape(-1, 16), 32).view(-1, 16)
        place_N1 = scale_NP.abs().argmax(-1, keepdim=True)
        top_N1 = scale_NP.gather(-1, place_N1)
        inverse_N1 = torch.where(top_N1.abs() < _NOTHING, torch.zeros_like(top_N1), -128 / top_N1)
        return half(inverse(inverse_N1)), (scale_NP * inverse_N1).round().clamp(max=127)

    def levels(self, weight_NB: Tensor, grid: Grid) -> Tensor:
        scale_NP1 = (grid[0] * grid[1])[..., None]
        level_NPW = weight_NB.unflatten(-1, (16, 16)) / torch.where(scale_NP1 == 0, torch.inf, scale_NP1)
        return level_NPW.round_().clamp_(-32, 31).flatten(1)

    def decode(self, level_NB: Tensor, grid: Grid) -> Tensor:
        scale_NP1 = (grid[0] * grid[1])[..., None]
        return (level_NB.unflatten(-1, (16, 16)) * scale_NP1).flatten(1)

    def pack(self, level_NB: Tensor, grid: Grid) -> Tensor:
        # Halves of 128, each in four stripes of 32.
        stripe_N24W = (level_NB + 32).to(torch.uint8).unflatten(-1, (2, 4, 32))
        a, b, c, d = stripe_N24W.unbind(2)
        low = torch.cat([(a & 15) | (c << 4), (b & 15) | (d << 4)], dim=-1)
        high = (a >> 4) | (b >> 4 << 2) | (c >> 4 << 4) | (d >> 4 << 6)
        scales = grid[1].to(torch.int8).view(torch.uint8)
        return torch.cat([low.flatten(1), high.flatten(1), scales, half_bytes(grid[0])], dim=-1)

    def unpack(self, block_NY: Tensor) -> tuple[Tensor, Grid]:
        low_N2Y, high_N2Y = block_NY[:, :128].unflatten(-1, (2, 64)), block_NY[:, 128:192].unflatten(-1, (2, 32))
        first, second = low_N2Y.chunk(2, dim=-1)
        stripes = [first & 15, second & 15, first >> 4, second >> 4]
        joined = [low | ((high_N2Y >> (2 * i) & 3) << 4) for i, low in enumerate(stripes)]
        level_NB = torch.stack(joined, dim=2).flatten(1).to(torch.float32) - 32
        scale_NP = block_NY[:, 192:208].contiguous().view(torch.int8).to(torch.float32)
        return level_NB, (of_half_bytes(block_NY[:, 208:]), scale_NP)


# Below this a part counts as 0 (GROUP_MAX_EPS there).
_NOTHING = 1e-15


def _symmetric_search(x_PW: Tensor, top: int) -> Tensor:
    """The scale (P, 1) of parts for levels from -top to top - 1, least squares weighted by the weights' own squares."""
    place_P1 = x_PW.abs().argmax(-1, keepdim=True)
    extreme_P1 = x_PW.gather(-1, place_P1)
    nothing = extreme_P1.abs() < _NOTHING
    extreme_P1 = torch.where(nothing, torch.ones_like(extreme_P1), extreme_P1)
    importance_PW = x_PW.square()

    def fitted(inverse_scale: Tensor) -> tuple[Tensor, Tensor]:
        level = (x_PW * inverse_scale).round_().clamp_(-top, top - 1)
        return (importance_PW * x_PW * level).sum(-1, keepdim=True), (importance_PW * level * level).sum(
            -1, keepdim=True
        )

    sum_lx, sum_l2 = fitted(-top / extreme_P1)
    scale = torch.where(sum_l2 > 0, sum_lx / sum_l2, torch.zeros_like(sum_l2))
    best = scale * sum_lx
    for step in (*range(-9, 0), *range(1, 10)):
        sum_lx, sum_l2 = fitted(-(top + 0.1 * step) / extreme_P1)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = torch.where(better, sum_lx / sum_l2, scale)
        best = torch.where(better, scale * sum_lx, best)
    return torch.where(nothing, torch.zeros_like(scale), scale)
