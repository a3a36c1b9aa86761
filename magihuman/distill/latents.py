"""Both modalities of a batch as one value, and which places of it a condition gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MODALITIES = ("video", "audio")


class Pair(NamedTuple):
    """Video [B,C,T,h,w] and audio [B,A,Ca] of a batch: latents, noise, velocities, gradients or masks."""

    video: Tensor
    audio: Tensor

    def to(self, device: torch.device | str) -> "Pair":
        return Pair(self.video.to(device), self.audio.to(device))


def each(function: Callable[..., Tensor], *pairs: Pair) -> Pair:
    """Apply a function to the modalities, one after the other."""
    video, audio = zip(*pairs, strict=True)
    return Pair(function(*video), function(*audio))


@dataclass(frozen=True)
class Given:
    """The clean part of a batch: first frames, whole sounds.

    Every network of a distillation has to see it, at every noise level, else the critic learns another
    conditional distribution than the teacher's (distill.md 1.9); and nothing is averaged over it.

    Attributes:
        latents: clean latents; read where the mask is 0 only.
        mask: 1 where something has to be generated, 0 where it is given: [B,1,T,1,1] and [B,1,1].
    """

    latents: Pair
    mask: Pair

    @classmethod
    def nothing(cls, like: Pair) -> "Given":
        """No condition on latents of this shape."""
        (batch, _, frames), device = like.video.shape[:3], like.video.device
        return cls(
            like,
            Pair(
                torch.ones(batch, 1, frames, 1, 1, device=device),
                torch.ones(batch, 1, 1, device=device),
            ),
        )

    def insert(self, generated: Pair) -> Pair:
        """`generated` with the given places replaced by clean latents."""
        return each(
            lambda x, clean, mask: torch.where(mask > 0, x, clean), generated, self.latents, self.mask
        )

    def select(self, samples: slice) -> "Given":
        """The condition of some of the samples."""
        return Given(*(Pair(p.video[samples], p.audio[samples]) for p in (self.latents, self.mask)))
