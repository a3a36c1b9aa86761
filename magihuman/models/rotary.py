"""Rotary position embedding over time, row and column: frequencies, table, rotation (SPEC 1.4)."""

from typing import Any

import torch
from torch import Tensor

from magihuman.models.forward_mode import apply


def rotary_bands(head_dim: int) -> Tensor:
    """Frequencies of one axis: 1 / 10000^(j / nb), nb = head_dim / 8. fp32 [nb]."""
    count = head_dim // 8
    exponent = torch.arange(count, dtype=torch.int64).to(torch.float32) / count
    return 1.0 / 10000.0**exponent


def rotary_table(coords: Tensor, bands: Tensor) -> Tensor:
    """Sines and cosines of each token's angles.

    Args:
        coords: fp32 [L,9], rows (t, row, column, three sizes, three reference sizes).
        bands: fp32 [nb].

    Returns:
        fp32 [L, 6 nb]: sines of the t, row and column bands, then the cosines in the same order.
    """
    position, size, reference = coords.unflatten(-1, (3, 3)).unbind(-2)  # [L,3] each
    scale = (reference - 1) / (size - 1)
    scale = torch.where((reference == 1) & (size == 1), torch.ones_like(scale), scale)
    centre = (size - 1) / 2
    centre = torch.cat([torch.zeros_like(centre[:, :1]), centre[:, 1:]], dim=-1)  # time is not centred
    angle = ((position - centre) * scale).unsqueeze(-1) * bands  # [L,3,nb]
    return torch.cat([angle.sin().flatten(1), angle.cos().flatten(1)], dim=-1)


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the first 3/4 of each head's channels; channel i is paired with i + 3 nb.

    Args:
        x: fp32 [..., L, heads, D].
        table: fp32 [L, 6 nb], nb = D / 8.

    Returns:
        fp32, shape of x.
    """
    sin, cos = table.unsqueeze(-2).chunk(2, dim=-1)  # [L,1,3nb]
    return apply(_Rotate, x, sin, cos)


class _Rotate(torch.autograd.Function):
    # In place on one copy, since concatenating three channel ranges is slow on CPU. The gradient is the rotation by
    # the opposite angle, so only the table is saved.
    @staticmethod
    def forward(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        half = sin.shape[-1]
        a, b = x[..., :half], x[..., half : 2 * half]
        out = x.clone(memory_format=torch.contiguous_format)
        out[..., :half].mul_(cos).sub_(b * sin)
        out[..., half : 2 * half].mul_(cos).add_(a * sin)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        sin, cos = ctx.saved_tensors
        return _Rotate.apply(grad, -sin, cos), None, None
