"""The linear path between data and noise, and reductions over it. Plain fp32 functions (SPEC 3).

x_sigma = (1 - sigma) x0 + sigma noise, velocity v = noise - x0, so x0 = x_sigma - sigma v.
"""

import torch
from torch import Tensor


def _spread(sigma: Tensor | float, like: Tensor) -> Tensor | float:
    """Per-sample sigma [B] shaped to broadcast over the other dimensions of `like`."""
    if isinstance(sigma, Tensor) and sigma.ndim:
        return sigma.to(torch.float32).view(-1, *[1] * (like.ndim - 1))
    return sigma


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Point on the path. x0, noise: [B,...]; sigma: [B] or a number. -> fp32 [B,...]."""
    s = _spread(sigma, x0)
    return (1 - s) * x0.float() + s * noise.float()


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """What the network learns to predict, fp32."""
    return noise.float() - x0.float()


def x0_from_velocity(x: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """Data estimate from a point on the path, fp32."""
    return x.float() - _spread(sigma, x) * velocity.float()


def masked_mean_per_sample(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over everything but the batch, over places where the mask is set.

    Args:
        values: [B,...].
        mask: weights, broadcastable to values ([B,1,T,1,1] for whole frames); None for all places.

    Returns:
        fp32 [B]; 0 for a sample without any place, so that a missing modality adds no loss.
    """
    values = values.float().flatten(1) if mask is None else values.float()
    if mask is None:
        return values.sum(1) / max(1, values.shape[1])
    weights = mask.to(values.dtype).expand_as(values).flatten(1)
    total = weights.sum(1)
    return (values.flatten(1) * weights).sum(1) / torch.where(total > 0, total, torch.ones_like(total))
