"""The optional adversarial term of DMD-2: small heads on features of a network judge noised samples.

Distribution matching can at best reproduce the teacher; real latents can correct it (Yin et al. 2024, arXiv
2405.14867, section 4.3). Two things differ here. Real and generated latents are noised to the same level with
the same noise: a network that is not told the level would else be judged by how noisy it is. And the heads,
one per modality, are told it. The slope of the heads is held down by finite differences (approximate R1: Lin
et al. 2025, arXiv 2501.08316).
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
"""Latents of a batch to features of both modalities per tap, [B,N,H] and [B,A,H]."""


@dataclass(frozen=True)
class AdversarySettings:
    """How real latents take part.

    Attributes:
        weight: of the student's term; 0 leaves all of it out.
        start: cycle from which on it counts: after distribution matching has settled.
        taps: layers whose features are judged; None takes three in the middle of the trunk.
        network: whose: "teacher" (steady) or "critic" (sees the student's samples).
        lr: of the heads. slope: weight of the finite-difference penalty; step: size of the difference.
    """

    weight: float = 0.0
    start: int = 0
    taps: tuple[int, ...] | None = None
    network: str = "teacher"
    lr: float = 1e-3
    slope: float = 0.1
    step: float = 0.05

    def __post_init__(self) -> None:
        if self.network not in ("teacher", "critic"):
            raise UserError(f"recipe.gan.network={self.network!r} is unknown; choose teacher or critic")
        if self.weight < 0 or self.slope < 0 or not self.step > 0:
            raise UserError("recipe.gan needs weight and slope of at least 0 and a positive step")

    def layers(self, depth: int) -> tuple[int, ...]:
        """The taps, for a network of `depth` layers.

        Raises:
            UserError: a layer that does not exist.
        """
        if self.taps is None:
            return tuple(sorted({depth // 3, depth // 2, (3 * depth) // 4}))
        if not self.taps or not all(0 <= tap < depth for tap in self.taps):
            raise UserError(f"recipe.gan.taps={list(self.taps)} are not layers of a network of {depth}")
        return tuple(sorted(set(self.taps)))


class Head(nn.Module):
    """Tokens of one modality to one number: each tap is normalised, pooled by attention of one query, and read
    together with the noise level.

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


class Adversary(nn.Module):
    """Heads for both modalities and the two sides of the game.

    Args:
        width: H; taps: number of layers judged.
    """

    def __init__(self, width: int, taps: int, settings: AdversarySettings) -> None:
        super().__init__()
        self.settings = settings
        self.heads = nn.ModuleDict({name: Head(width, taps) for name in MODALITIES})

    def score(self, features: Features, noisy: Pair, sigma: Tensor) -> dict[str, Tensor]:
        """Logits [B] by modality, high for real; nothing for a modality that is absent."""
        found = features(noisy)
        return {
            name: self.heads[name]([tap[m] for tap in found], sigma)
            for m, name in enumerate(MODALITIES)
            if found[0][m].shape[1]
        }

    def student_loss(self, features: Features, noisy: Pair, sigma: Tensor) -> Tensor:
        """softplus(-D(fake)), summed over modalities; gradients reach the latents through the features."""
        logits = self.score(features, noisy, sigma)
        return torch.stack([F.softplus(-value).mean() for value in logits.values()]).sum()

    def loss(self, features: Features, x0: Pair, noise: Pair, sigma: Tensor, given: Conditioning) -> Tensor:
        """softplus(-D(real)) + softplus(D(fake)), and the penalty on the slope at real samples.

        Args:
            x0: student samples; the real ones are the latents of `given`. Both get this noise at this level [B].
        """
        with torch.no_grad():
            noisy = [
                given.insert(each(lambda a, b: add_noise(a, b, sigma), clean, noise))
                for clean in (given.latents, x0)
            ]
            moved = each(lambda x: x + self.settings.step * torch.randn_like(x), noisy[0])
            found = [features(latents) for latents in (*noisy, given.insert(moved))]
        terms = []
        for m, name in enumerate(MODALITIES):
            if found[0][0][m].shape[1]:
                head = self.heads[name]
                high, low, near = (head([tap[m] for tap in taps], sigma) for taps in found)
                slope = ((high - near) / self.settings.step).square().mean()
                terms.append(F.softplus(-high).mean() + F.softplus(low).mean() + self.settings.slope * slope)
        return torch.stack(terms).sum()
