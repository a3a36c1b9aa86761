"""Derivative of a network along a direction, and the tangent of a consistency function (see `recipes.consistency`).

    velocity, derivative = velocity_and_derivative(student, x, text, direction)
    change = consistency_tangent(teacher_v, velocity.video, derivative.video)
    surrogate_loss(student_v, -normalised(change, mask, 0.1), mask)     # its gradient moves the velocity by +change

The derivative is computed by forward-mode differentiation: one pass without a graph, whose matrix products count like a
forward and a backward pass to the input. Attention runs in plain operators, since fused kernels have no forward-mode
derivative: all scores of one layer are in memory at once, batch x heads x n x n numbers, and as many of their derivative.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from magihuman.flow.path import expand_like, masked_mean_per_sample
from magihuman.flow.sampling import Pair, each
from magihuman.models.denoiser import Denoiser


@torch.no_grad()
def velocity_and_derivative(network: Denoiser, x: Pair, text: Sequence[Tensor], direction: Pair) -> tuple[Pair, Pair]:
    """F(x) and its derivative J_F(x) d along a direction d, both fp32 without gradients.

    Computed in fp32 also where the network computes in bf16, since the tangent is a difference of nearly equal terms.

    Args:
        x: latents [B,C,T,h,w] and [B,A,Ca]; text: B tensors [S,Ct]; direction: d, of the shapes of x.
    """
    with _differentiable(network), forward_ad.dual_level():
        dual = each(forward_ad.make_dual, x, direction)
        parts = [forward_ad.unpack_dual(out) for out in network(dual.video, dual.audio, text)]
        # Without audio there are no numbers to differentiate, and torch gives no tangent.
        tangents = [torch.zeros_like(part.primal) if part.tangent is None else part.tangent for part in parts]
        return Pair(*(part.primal for part in parts)), Pair(*tangents)


@contextmanager
def _differentiable(network: Denoiser) -> Iterator[None]:
    """fp32, and an attention whose operators have a forward-mode derivative."""
    model = network.model
    before = model.compute_dtype, model.attention_backend
    model.compute_dtype = torch.float32
    model.attention_backend = "math" if model.window is None else "windowed"
    try:
        yield
    finally:
        model.compute_dtype, model.attention_backend = before


def consistency_tangent(teacher: Tensor, velocity: Tensor, derivative: Tensor, weight: float = 1.0) -> Tensor:
    """g = v - F - weight * J_F(x) (s v), fp32; 0 where the consistency function x - s F(x) is constant along the path.

    Args:
        teacher: v [B,...]; velocity: F; derivative: J_F(x) (s v), along the velocity times the noise level of each entry.
        weight: of the derivative; 0 leaves the difference of velocities.
    """
    return teacher.float() - velocity.float() - weight * derivative.float()


def normalised(tangent: Tensor, mask: Tensor, floor: float) -> Tensor:
    """g / (rms(g) + floor), rms per sample over generated positions; 0 at the others.

    Bounds the size of every sample's update (Lu and Song 2024, arXiv 2410.11081, section 4.2).

    Args:
        tangent: [B,...]; mask: 1 where generated, broadcastable.
        floor: size below which tangents are no longer enlarged to 1.
    """
    size = masked_mean_per_sample(tangent.square(), mask).sqrt()
    return tangent / expand_like(size + floor, tangent) * mask
