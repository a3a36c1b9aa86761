"""Layers of a block: RMS norm and linear layers with one expert per modality, and the two activations.

A weight with m experts stacks them along dimension 0 in the order video, audio, text (SPEC 1.2). Tokens are ordered the
same way, so an expert is a slice of the weight applied to a slice of the rows.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magihuman.models.forward_mode import apply

EPS = 1e-6
ALPHA = 1.702
LIMIT = 7.0


def rms_norm(x: Tensor, offset: Tensor) -> Tensor:
    """x / rms(x) * (1 + offset) over the last dimension, computed in fp32, returned in the dtype of x (SPEC 1.3).

    Args:
        x: [n,...,width]; offset: the stored weight, 0 at initialisation, of the shape of x without its first
            dimension or of its last alone.
    """
    normed, _ = apply(_RMSNorm, x.float(), 1 + offset.float())
    return normed.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    # Half the memory traffic of the gradient that autograd derives from the formula.
    @staticmethod
    def forward(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        inverse = _inverse_rms(x)
        return x * inverse * scale, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        x, scale, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative runs through the norm, too
            inverse = _inverse_rms(x)
        normed = x * inverse
        toward_normed = grad * scale
        along = (toward_normed * normed).mean(dim=-1, keepdim=True)
        return (toward_normed - normed * along) * inverse, (grad * normed).sum_to_size(scale.shape)


def _inverse_rms(x: Tensor) -> Tensor:
    return torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPS)


class RMSNorm(nn.Module):
    """RMS norm with the weights of all experts: `weight` fp32 [experts * width], the offset from 1."""

    def __init__(self, width: int, experts: int = 1) -> None:
        super().__init__()
        self.experts = experts
        self.weight = nn.Parameter(torch.zeros(experts * width, dtype=torch.float32))

    def slices(self) -> tuple[Tensor, ...]:
        """One offset vector per expert."""
        return self.weight.chunk(self.experts) if self.experts > 1 else (self.weight,)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with the only expert."""
        return rms_norm(x, self.weight)


class Update(NamedTuple):
    """Low-rank update of one expert's matrix: W + scale * up @ down, which is never formed.

    Attributes:
        down: [r, columns]; up: [rows, r]; both in the compute dtype.
    """

    down: Tensor
    up: Tensor
    scale: float


def product(x: Tensor, weight: Tensor, update: Update | None = None) -> Tensor:
    """x W' (+ scale (x down') up'): [n, columns] -> [n, rows], in the dtype of x; fp32 with an update.

    In bf16 the sum W + scale up @ down would lose changes below 1/256 of a weight, and so would the sum of the products;
    it is returned in fp32, in which nearly all callers compute anyway.
    """
    y = F.linear(x, weight)
    if update is None:
        return y
    return torch.add(y.float(), F.linear(F.linear(x, update.down), update.up), alpha=update.scale)


class LowRank(nn.Module):
    """One LoRA's share in an `ExpertLinear`: fp32 A [experts * rank, columns] and B [experts * rows, rank].

    `magihuman.models.lora.add_lora` initialises A; B starts at 0, so the product starts as the base's.
    """

    def __init__(self, columns: int, rows: int, experts: int, rank: int, scale: float) -> None:
        super().__init__()
        self.experts = experts
        self.scale = scale
        self.A = nn.Parameter(torch.empty(experts * rank, columns, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(experts * rows, rank, dtype=torch.float32))

    def updates(self, dtype: torch.dtype) -> list[Update]:
        """One per expert, cast to `dtype`."""
        downs, ups = self.A.to(dtype).chunk(self.experts), self.B.to(dtype).chunk(self.experts)
        return [Update(down, up, self.scale) for down, up in zip(downs, ups, strict=True)]


class ExpertLinear(nn.Module):
    """Linear layer of stacked experts, without bias: `weight` [experts * rows, columns], cast to the compute dtype when used.

    `lora` holds the `LowRank` of each LoRA by name; usually empty.
    """

    def __init__(self, columns: int, rows: int, experts: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.experts = experts
        self.weight = nn.Parameter(torch.empty(experts * rows, columns, dtype=dtype))
        self.lora = nn.ModuleDict()

    def slices(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """One matrix [rows, columns] per expert in `dtype`."""
        weight = self.weight.to(dtype)
        return weight.chunk(self.experts) if self.experts > 1 else (weight,)

    def init(self, std: float, generator: torch.Generator | None = None) -> None:
        """Initialise from a normal distribution truncated at three standard deviations."""
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std, generator=generator)


def updates(linear: ExpertLinear, lora: str | None, dtype: torch.dtype) -> Sequence[Update | None]:
    """Low-rank updates of the matrices of `linear.slices` by the LoRA of this name; None for each where `lora` is None."""
    if lora is None:  # needs only `experts`, so that quantised linears work too
        return (None,) * linear.experts
    low = linear.lora[lora]
    assert isinstance(low, LowRank)
    return low.updates(dtype)


class _Gelu7(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor) -> Tensor:
        u = y.float().clamp(max=LIMIT)
        return (u * ALPHA).sigmoid_().mul_(u).to(y.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        y = saved.float()
        slope = _silu_slope(grad.float(), y.clamp(max=LIMIT))
        return _within(slope, y, -math.inf).to(saved.dtype)


class _Swiglu7(torch.autograd.Function):
    # Memory-bound: saves its inputs only (autograd would keep five more tensors), and masks gradients by kernels
    # with a fused comparison, since a product with a boolean is several times slower on CPU.
    @staticmethod
    def forward(gate: Tensor, linear: Tensor) -> Tensor:
        g, shifted = gate.float().clamp(max=LIMIT), linear.float().clamp(-LIMIT, LIMIT).add_(1)
        return (g * ALPHA).sigmoid_().mul_(g).mul_(shifted).to(gate.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        saved = ctx.saved_tensors  # read once: with checkpointing each access recomputes it
        dtype = saved[0].dtype
        gate, linear, grad = saved[0].float(), saved[1].float(), grad.float()
        clamped = gate.clamp(max=LIMIT)
        toward_gate = _silu_slope(grad * (linear.clamp(-LIMIT, LIMIT) + 1), clamped)
        toward_linear = (clamped * ALPHA).sigmoid() * clamped * grad
        return (
            _within(toward_gate, gate, -math.inf).to(dtype),
            _within(toward_linear, linear, -_ABOVE_LIMIT).to(dtype),
        )


_ABOVE_LIMIT = LIMIT + 2.0**-21
"""The next fp32 number above the limit: the masking kernel compares strictly, clamping does not."""


def _within(grad: Tensor, y: Tensor, low: float) -> Tensor:
    """grad where low < y <= limit, else 0."""
    return torch.ops.aten.hardtanh_backward(grad, y, low, _ABOVE_LIMIT)


def _silu_slope(grad: Tensor, u: Tensor) -> Tensor:
    """grad times the derivative of u sigmoid(alpha u), which is silu' at alpha u."""
    if torch.is_grad_enabled():  # the fused kernel has no derivative of its own
        gate = torch.sigmoid(u * ALPHA)
        return grad * gate * (1 + ALPHA * u * (1 - gate))
    return torch.ops.aten.silu_backward(grad, u * ALPHA)


def gelu7(y: Tensor) -> Tensor:
    """u sigmoid(1.702 u) with u = min(y, 7), in fp32. [..., n] -> [..., n] of the same dtype (SPEC 1.5)."""
    return apply(_Gelu7, y)


def swiglu7(gate: Tensor, linear: Tensor) -> Tensor:
    """g sigmoid(1.702 g) (l + 1) in fp32, with g = min(gate, 7) and l = clamp(linear, -7, 7) (SPEC 1.5).

    [..., n] twice -> [..., n] of the same dtype.
    """
    return apply(_Swiglu7, gate, linear)


def swiglu7_projection(x: Tensor, weight: Tensor, update: Update | None = None) -> Tensor:
    """`swiglu7` of `product`, whose columns alternate between gate and linear: [n,H], [2I,H] -> [n,I]."""
    if weight.device.type == "cpu":
        # Reordering the rows of the weight is much cheaper than strided reads of the product.
        if update is not None:
            update = update._replace(up=_planes(update.up))
        return swiglu7(*product(x, _planes(weight), update).chunk(2, dim=-1))
    return swiglu7(*product(x, weight, update).unflatten(-1, (-1, 2)).unbind(-1))


def _planes(rows: Tensor) -> Tensor:
    """Even rows first, then odd ones."""
    return rows.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)


def gelu7_projection(x: Tensor, weight: Tensor, update: Update | None = None) -> Tensor:
    """`gelu7` of `product`: [n,H], [I,H] -> [n,I]."""
    return gelu7(product(x, weight, update))


def projection_std(columns: int, depth: int = 1) -> float:
    """Standard deviation that keeps variance through a product, reduced for sums over `depth` residual branches."""
    return 1.0 / math.sqrt(columns * depth)


def linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """Embedder or head computed in fp32, whatever the dtype of its parameters."""
    if layer.weight.dtype == torch.float32:
        return layer(x.float())  # called as a module, which ZeRO-3's hooks need
    bias = None if layer.bias is None else layer.bias.float()
    return F.linear(x.float(), layer.weight.float(), bias)
