"""Distributions whose flow is known in closed form: what a distillation is measured against.

On the path x_s = (1 - s) x0 + s eps, the velocity E[eps - x0 | x_s, s] of a mixture of Gaussians is a finite sum;
so is E[eps - x0 | x_s], the best that a network can know that is not told s, once the prior of s lies on a grid.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from magihuman.flow.sigmas import SigmaPrior, shift_sigma


@dataclass(frozen=True)
class Mixture:
    """Gaussians with axes along the coordinates, all of one shape.

    Args:
        means: [J,D]; weights: [J], sum 1.
        deviations: [D].
    """

    means: Tensor
    weights: Tensor
    deviations: Tensor

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Samples [count,D], and the mode of each [count]."""
        mode = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator)
        return self.means[mode] + self.deviations * noise, mode

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[eps - x0 | x, s] at x [B,D] and s [B]."""
        return self._mean_velocity(x, sigma[:, None])

    def blind_velocity(self, x: Tensor, prior: SigmaPrior, levels: int = 96) -> Tensor:
        """E[eps - x0 | x] under a shifted prior, whose mass is put on that many quantiles."""
        assert prior.kind == "shifted"
        quantiles = shift_sigma((torch.arange(levels) + 0.5) / levels, prior.shift)
        return self._mean_velocity(x, quantiles[None])

    def _mean_velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Mean over levels sigma [B or 1,N], each weighted with the density of x there."""
        keep, sigma, x = 1 - sigma[..., None], sigma[..., None], x[:, None]
        variance = keep**2 * self.deviations**2 + sigma**2  # [.,N,D]
        square = (x**2 / variance).sum(-1, keepdim=True)
        square = square - 2 * keep * (x / variance) @ self.means.T + keep**2 / variance @ self.means.T**2
        log = self.weights.log() - 0.5 * square - 0.5 * variance.log().sum(-1, keepdim=True)  # [B,N,J]
        share = log.flatten(1).softmax(1).view_as(log)
        # Given level and mode, v = slope (x - keep mean) - mean.
        slope = (sigma - keep * self.deviations**2) / variance
        return (share.sum(-1, keepdim=True) * slope * x - (slope * keep + 1) * (share @ self.means)).sum(1)


def gaussian(mean: float = 0.0, deviation: float = 1.0, dimensions: int = 2) -> Mixture:
    """One Gaussian, alike in all directions."""
    return Mixture(
        torch.full((1, dimensions), mean), torch.ones(1), torch.full((dimensions,), deviation)
    )  # fmt: skip


def ring(dimensions: int = 2) -> Mixture:
    """Eight modes of width 0.3 on a circle of radius 2 in a plane, 0.1 thick in the other directions.

    The modes of the second half are twice as likely.
    """
    angle = torch.arange(8) * (2 * math.pi / 8)
    means = torch.zeros(8, dimensions)
    means[:, 0], means[:, 1] = 2 * angle.cos(), 2 * angle.sin()
    deviations = torch.full((dimensions,), 0.1)
    deviations[:2] = 0.3
    return Mixture(means, torch.tensor([1, 1, 1, 1, 2, 2, 2, 2]) / 12, deviations)


@dataclass(frozen=True)
class Figures:
    """How far samples are from a ring.

    Attributes:
        distance: sliced 2-Wasserstein distance in the plane.
        modes: how many got at least half of their mass.
        imbalance: total variation between the masses around the modes and their weights.
        outliers: share of samples further than 3 standard deviations from every mode, in the plane.
    """

    distance: float
    modes: int
    imbalance: float
    outliers: float


def compare(samples: Tensor, truth: Mixture) -> Figures:
    """Figures of samples [N,D] beside as many of a ring's own."""
    real, _ = truth.draw(len(samples), torch.Generator().manual_seed(99))
    angle = torch.arange(64) * (math.pi / 64)
    directions = torch.stack([angle.cos(), angle.sin()])  # [2,64]
    ours, theirs = ((x[:, :2] @ directions).sort(0).values for x in (samples, real))
    away, nearest = torch.cdist(samples[:, :2], truth.means[:, :2]).min(1)
    inside = away <= 3 * truth.deviations[0]
    masses, kept = (
        torch.bincount(near, minlength=len(truth.weights)) / len(samples) for near in (nearest, nearest[inside])
    )
    return Figures(
        distance=float((ours - theirs).square().mean().sqrt()),
        modes=int((kept >= 0.5 * truth.weights).sum()),
        imbalance=float(0.5 * (masses - truth.weights).abs().sum()),
        outliers=float(1 - inside.float().mean()),
    )
