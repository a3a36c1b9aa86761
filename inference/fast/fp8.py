"""Products of 8-bit floats (e4m3) with scales fixed when the weights are loaded.

No statistics of activations are needed: every input of a block product has a bound that follows from the weights.
A normalised row has the length sqrt(H), so its entries lie within sqrt(H) max|1 + w|; a value is a product of such a
row, so Cauchy-Schwarz bounds it, and attention's averages of values with it; the activations are clamped at 7. With
scale = bound / 448 nothing saturates, and e4m3, being a float, keeps its three bits of mantissa for entries 28,000
times smaller than the bound.

Weights have one scale per row. It is applied to the product, in whatever follows it, so that the product itself is
one with plain tensor scales, the fastest kind.
"""

import math
from typing import Any

import torch
from torch import Tensor

from magihuman.models.layers import LIMIT

FP8 = torch.float8_e4m3fn
LARGEST = 448.0

SWIGLU_BOUND = LIMIT * (LIMIT + 1)
GELU_BOUND = LIMIT

_ROUNDING = (1 + 1 / 16) ** 2
"""By how much values can exceed their bound because inputs and weights of their product were rounded to 8 bits."""


def quantise(x: Tensor, scale: Tensor) -> Tensor:
    """fp32 -> e4m3 numbers of which one unit stands for `scale`. Entries beyond 464 scales become NaN."""
    return (x * scale.reciprocal()).to(FP8)


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, columns] -> e4m3 of that shape and one fp32 scale per row, [rows]."""
    largest = weight.abs().amax(dim=1).float()
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    return (weight.float() / scales.unsqueeze(1)).to(FP8), scales


def multiply(x: Tensor, codes: Tensor, row_scales: Tensor, scales: Tensor) -> Tensor:
    """x @ weight' in 8 bits.

    Args:
        x: fp32 [n, columns]; scales: fp32 [2], what one unit of its 8-bit form stands for, and 1.
        codes: e4m3 [rows, columns] and row_scales: fp32 [rows], from `quantise_rows`; both sizes multiples of 16.

    Returns:
        fp32 [n, rows]; the product is rounded to bf16 before the rows' scales, as the GPU's kernel gives it.
    """
    if len(x) == 0:
        return x.new_zeros(0, len(codes))
    # Scales without dimensions that are views fail to compile: torch 2.11 looks at the whole tensor behind them.
    scale, one = scales.view(2, 1, 1).unbind()
    scaled_mm: Any = torch._scaled_mm
    y = scaled_mm(
        quantise(x, scale),
        codes.t(),
        scale_a=scale,
        scale_b=one,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,  # Hopper then sums with 14 bits, far finer than 8-bit inputs
    )
    return y.float() * row_scales


def norm_bound(offset_scale: Tensor) -> float:
    """Largest entry of a normalised row: fp32 [...,width], the norm's 1 + w."""
    return math.sqrt(offset_scale.shape[-1]) * float(offset_scale.abs().max())


def value_bounds(weight: Tensor, offset_scale: Tensor) -> Tensor:
    """Largest value of each channel: [channels, H] rows of the projection and fp32 [H], the norm's 1 + w."""
    lengths = (weight.float() * offset_scale).norm(dim=1)
    return lengths * math.sqrt(weight.shape[1]) * _ROUNDING
