"""Losses of DMD-2 for one modality, plain fp32 functions (Yin et al. 2024, arXiv 2405.14867).

On the path x_s = (1 - s) x0 + s eps with v = eps - x0, the data estimates of two networks at the same noisy sample y
differ by fake - real = s (v_real - v_fake). The difference of velocities avoids the cancellation of y.
"""

import torch
from torch import Tensor

from magihuman.flow.path import expand_like, masked_mean_per_sample, velocity_target, x0_from_velocity

SMALLEST_ERROR = 1e-4
"""Floor of the normaliser, so that the gradient of a nearly exact student is not amplified without bound."""


@torch.no_grad()
def matching_gradient(
    x0: Tensor, noisy: Tensor, real: Tensor, fake: Tensor, sigma: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Distribution matching gradient: the difference of fake and real score at noised student samples.

    g = s (v_real - v_fake) / mean |x0 - (y - s v_real)|, the mean per sample over generated positions; the normaliser
    balances samples and noise levels (DMD, arXiv 2311.18828, eq. 8).

        gradient, finite = matching_gradient(x0, noisy, teacher_v, fake_score_v, sigma, mask)
        surrogate_loss(student_x0, gradient, mask).mean().backward()

    Args:
        x0: student samples [B,...]; noisy: y, the same at noise level sigma [B].
        real, fake: velocities of teacher (guided) and fake score at y.
        mask: 1 where generated, broadcastable; g is 0 elsewhere.

    Returns:
        g fp32 [B,...], and [B] bool: whether it is finite. Samples with a gradient that is not finite get zeros.
    """
    level = expand_like(sigma.float(), x0)
    error = masked_mean_per_sample((x0.float() - x0_from_velocity(noisy, real, sigma)).abs(), mask)
    gradient = level * (real.float() - fake.float()) / expand_like(error.clamp(min=SMALLEST_ERROR), x0) * mask
    finite = gradient.flatten(1).isfinite().all(1) & error.isfinite()
    return torch.where(expand_like(finite, x0), gradient, torch.zeros_like(gradient)), finite


def surrogate_loss(x0: Tensor, gradient: Tensor, mask: Tensor) -> Tensor:
    """Loss [B] whose derivative by x0 is `gradient` over the number of generated entries: 0.5 (x0 - stop(x0 - g))^2.

    In fp32, since x0 - g in bf16 would round away most of a gradient of 0.003.
    """
    x0 = x0.float()
    return masked_mean_per_sample(0.5 * (x0 - (x0 - gradient).detach()).square(), mask)


def fake_score_loss(velocity: Tensor, x0: Tensor, noise: Tensor, mask: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Flow-matching loss on student samples: mean w (v - (eps - x0))^2 over generated positions, [B].

    Args:
        weight: w, broadcastable; those of the teacher's training, since they change what is learned
            (`magihuman.training.motion`).
    """
    error = velocity.float() - velocity_target(x0, noise).detach()
    return masked_mean_per_sample(weight * error.square(), mask)
