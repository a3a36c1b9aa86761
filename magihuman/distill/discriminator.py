"""Discriminator of DMD-2's optional GAN loss: small heads on features of a diffusion network.

Distribution matching can at best reproduce the teacher; a GAN loss on real latents corrects it (Yin et al. 2024, arXiv
2405.14867, section 4.3). Two differences here: real and generated latents get the same noise at the same level, since
features of a network without timestep conditioning would reveal the level; and the heads, one per modality, take the
level as an input. Their gradient is penalised by finite differences (approximate R1: Lin et al. 2025, arXiv 2501.08316).

    discriminator = Discriminator(width=256, taps=3, settings=GanSettings(weight=0.03))
    discriminator.loss(features, x0, noise, sigma, conditioning).backward()
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magihuman.errors import UserError
from magihuman.flow.path import add_noise
from magihuman.flow.sampling import MODALITIES, Conditioning, Pair, each

Features = Callable[[Pair], list[tuple[Tensor, Tensor]]]
"""Features of a batch of latents: per tap [B,N,H] of the video and [B,A,H] of the audio."""


@dataclass(frozen=True)
class GanSettings:
    """Settings of the GAN loss (config `recipe.gan`).

    Attributes:
        weight: of the student's GAN loss; 0 trains without discriminator.
        start: iteration from which on the GAN loss is active, after distribution matching has settled.
        taps: layers whose features the heads read; None takes three in the middle of the trunk.
        network: whose features: "teacher" (constant) or "fake_score" (adapted to student samples).
        updates: the heads are trained with the first so many updates of the fake score in an iteration; None: with all.
        lr: of the heads. slope: weight of the finite-difference penalty; step: size of the difference.

    Raises:
        UserError: at construction, for values that do not fit.
    """

    weight: float = 0.0
    start: int = 0
    taps: tuple[int, ...] | None = None
    network: str = "teacher"
    updates: int | None = None
    lr: float = 1e-3
    slope: float = 0.1
    step: float = 0.05

    def __post_init__(self) -> None:
        if self.network not in ("teacher", "fake_score"):
            raise UserError(f"recipe.gan.network={self.network!r} is unknown; choose teacher or fake_score")
        if self.updates is not None and self.updates < 1:
            raise UserError(
                f"recipe.gan.updates={self.updates} never trains the discriminator; give 1 or more, or null for all updates "
                "of the fake score (recipe.gan.weight=0 trains without GAN loss)"
            )
        if min(self.weight, self.slope, self.start) < 0 or not min(self.step, self.lr) > 0:
            raise UserError(
                "recipe.gan needs weight, slope and start of at least 0 and a positive step and lr, not "
                f"{self.weight}, {self.slope}, {self.start}, {self.step} and {self.lr}"
            )

    def layers(self, depth: int) -> tuple[int, ...]:
        """Tapped layers of a network of `depth` layers, ascending.

        Raises:
            UserError: a layer that does not exist.
        """
        if self.taps is None:
            return tuple(sorted({depth // 3, depth // 2, (3 * depth) // 4}))
        if not self.taps or not all(0 <= tap < depth for tap in self.taps):
            raise UserError(f"recipe.gan.taps={list(self.taps)} must be layers of the network, 0 to {depth - 1}")
        return tuple(sorted(set(self.taps)))


class Head(nn.Module):
    """Discriminator head of one modality: layer norm and attention pooling per tap, then an MLP with the noise level.

    Args:
        width: H of the features; taps: how many.
    """

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(taps, width))
        self.read = nn.Sequential(nn.Linear(taps * width + 16, 128), nn.SiLU(), nn.Linear(128, 1))

    def forward(self, features: Sequence[Tensor], sigma: Tensor) -> Tensor:
        """Taps of [B,N,H] and [B] -> fp32 [B]."""
        pooled = []
        for tokens, query in zip(features, self.query, strict=True):
            x = F.layer_norm(tokens.float(), tokens.shape[-1:])
            weights = torch.softmax(x @ query / math.sqrt(x.shape[-1]), dim=1)  # [B,N]
            pooled.append((weights[..., None] * x).sum(1))
        bands = 2.0 ** torch.arange(8, device=sigma.device)
        angles = sigma.float()[:, None] * bands * math.pi / 2
        return self.read(torch.cat([*pooled, angles.sin(), angles.cos()], dim=1)).squeeze(1)


class Discriminator(nn.Module):
    """Heads for both modalities, with the losses of discriminator and student.

    Args:
        width: H; taps: number of tapped layers.
    """

    def __init__(self, width: int, taps: int, settings: GanSettings) -> None:
        super().__init__()
        self.settings = settings
        self.heads = nn.ModuleDict({name: Head(width, taps) for name in MODALITIES})

    def score(self, features: Features, noisy: Pair, sigma: Tensor) -> dict[str, Tensor]:
        """Logits [B] by modality, high for real; without modalities that have no tokens."""
        found = features(noisy)
        return {
            name: self.heads[name]([tap[m] for tap in found], sigma)
            for m, name in enumerate(MODALITIES)
            if found[0][m].shape[1]
        }

    def student_loss(self, features: Features, noisy: Pair, sigma: Tensor) -> Tensor:
        """Non-saturating loss softplus(-D(fake)), summed over modalities; differentiable by `noisy`."""
        logits = self.score(features, noisy, sigma)
        return torch.stack([F.softplus(-value).mean() for value in logits.values()]).sum()

    def loss(self, features: Features, x0: Pair, noise: Pair, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Loss of the heads: softplus(-D(real)) + softplus(D(fake)) + gradient penalty at real samples.

        Args:
            x0: student samples; the real ones are the latents of `conditioning`. Both get `noise` at level sigma [B].
        """
        with torch.no_grad():
            noisy = [
                conditioning.insert(each(lambda a, b: add_noise(a, b, sigma), clean, noise))
                for clean in (conditioning.latents, x0)
            ]
            moved = each(lambda x: x + self.settings.step * torch.randn_like(x), noisy[0])
            found = [features(latents) for latents in (*noisy, conditioning.insert(moved))]
        terms = []
        for m, name in enumerate(MODALITIES):
            if found[0][0][m].shape[1]:
                head = self.heads[name]
                high, low, near = (head([tap[m] for tap in taps], sigma) for taps in found)
                slope = ((high - near) / self.settings.step).square().mean()
                terms.append(F.softplus(-high).mean() + F.softplus(low).mean() + self.settings.slope * slope)
        return torch.stack(terms).sum()
