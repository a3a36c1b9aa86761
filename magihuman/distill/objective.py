"""DMD-2's two objectives for one modality, plain fp32 functions (Yin et al. 2024, arXiv 2405.14867).

With the path x_s = (1 - s) x0 + s eps and v = eps - x0, the data estimates of two networks at the same noisy
sample y differ by fake - real = s (v_real - v_fake). Taking the difference of velocities means that y never
has to cancel.
"""

import torch
from torch import Tensor

from magihuman.flow.path import masked_mean_per_sample, velocity_target, x0_from_velocity

SMALLEST_ERROR = 1e-4
"""Floor of the normaliser: a student that is as good as exact must not have its gradient blown up."""


def _spread(sigma: Tensor, like: Tensor) -> Tensor:
    return sigma.float().view(-1, *[1] * (like.ndim - 1))


@torch.no_grad()
def matching_gradient(
    x0: Tensor, noisy: Tensor, real: Tensor, fake: Tensor, sigma: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Direction that takes student samples away from what the critic and towards what the teacher expects.

    g = s (v_real - v_fake) / mean |x0 - (y - s v_real)|, the mean per sample over what is generated; the
    normaliser makes samples and noise levels of different size count alike (DMD, arXiv 2311.18828, eq. 8).

    Args:
        x0: student samples [B,...]; noisy: y, the same at noise level sigma [B].
        real, fake: velocities of teacher (guided) and critic at y.
        mask: 1 where generated, broadcastable; g is 0 elsewhere.

    Returns:
        g fp32 [B,...], and [B] bool: whether it is finite. A sample whose gradient is not gets zeros.
    """
    level = _spread(sigma, x0)
    error = masked_mean_per_sample((x0.float() - x0_from_velocity(noisy, real, sigma)).abs(), mask)
    gradient = level * (real.float() - fake.float()) / _spread(error.clamp(min=SMALLEST_ERROR), x0) * mask
    finite = gradient.flatten(1).isfinite().all(1) & error.isfinite()
    return torch.where(_spread(finite, x0) > 0, gradient, torch.zeros_like(gradient)), finite


def surrogate_loss(x0: Tensor, gradient: Tensor, mask: Tensor) -> Tensor:
    """A loss [B] whose derivative by x0 is `gradient` over the number of generated entries: 0.5 (x0 - stop(x0 - g))^2.

    In fp32: in bf16, x0 - g loses a gradient of 0.003 almost whole.
    """
    x0 = x0.float()
    return masked_mean_per_sample(0.5 * (x0 - (x0 - gradient).detach()).square(), mask)


def critic_loss(velocity: Tensor, x0: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    """Flow matching on student samples: mean (v - (eps - x0))^2 over what is generated, [B]."""
    return masked_mean_per_sample((velocity.float() - velocity_target(x0, noise).detach()).square(), mask)
