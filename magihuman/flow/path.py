"""Linear flow-matching path between data and noise, and masked reductions; plain fp32 functions (SPEC 3).

x_s = (1 - s) x0 + s eps at noise level s (sigma: 0 data, 1 noise), velocity v = eps - x0, so x0 = x_s - s v.

    noisy = add_noise(x0, noise, sigma)                                   # network input at levels sigma [B]
    loss = (network(noisy) - velocity_target(x0, noise)).square().mean()  # flow matching
"""

import torch
from torch import Tensor


def expand_like(values: Tensor, like: Tensor) -> Tensor:
    """One value per sample [B], shaped to broadcast over `like` [B,...]."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _level(sigma: Tensor | float, like: Tensor) -> Tensor | float:
    return expand_like(sigma.float(), like) if isinstance(sigma, Tensor) and sigma.ndim else sigma


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Noisy sample x_s = (1 - s) x0 + s eps. x0, noise: [B,...]; sigma: [B] or a number. -> fp32 [B,...]."""
    s = _level(sigma, x0)
    return (1 - s) * x0.float() + s * noise.float()


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """Regression target of the network, v = eps - x0, fp32."""
    return noise.float() - x0.float()


def x0_from_velocity(x: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """Data estimate x0 = x_s - s v from a noisy sample and a velocity, fp32."""
    return x.float() - _level(sigma, x) * velocity.float()


def masked_mean_per_sample(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over all dimensions except the batch, over positions where the mask is set.

    Args:
        values: [B,...].
        mask: weights, broadcastable to values ([B,1,T,1,1] for whole frames); None for all positions.

    Returns:
        fp32 [B]; 0 for a sample without any position, so that a missing modality adds no loss.
    """
    values = values.float().flatten(1) if mask is None else values.float()
    if mask is None:
        return values.sum(1) / max(1, values.shape[1])
    weights = mask.to(values.dtype).expand_as(values).flatten(1)
    total = weights.sum(1)
    return (values.flatten(1) * weights).sum(1) / torch.where(total > 0, total, torch.ones_like(total))
