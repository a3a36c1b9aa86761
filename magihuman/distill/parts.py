"""The slices of a batch that go through the networks together, with what is given and what is drawn."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magihuman.distill.latents import Given, Pair
from magihuman.distill.rollout import Rollout, draw_noise
from magihuman.errors import UserError
from magihuman.training.draws import Draws


@dataclass
class Part:
    """Some samples of a batch.

    Attributes:
        text: features of each; given: conditions; generators: source of all draws, one per sample.
        position: [B] global positions of the samples, on the CPU.
        rollout: the student's samples that are in use, and how often they were: `uses`.
    """

    text: list[Tensor]
    given: Given
    generators: list[torch.Generator]
    position: Tensor
    rollout: Rollout | None = None
    uses: int = 0

    def uniform(self) -> Tensor:
        """[B] in [0, 1), each sample's own draw."""
        return torch.cat([torch.rand(1, generator=g) for g in self.generators])

    def normal(self) -> Pair:
        """Noise of the shape of the latents."""
        return draw_noise(self.generators, self.given.latents, 0, self.given.latents.video.device)[0]


def parts(
    batch: dict[str, Any],
    draws: Draws,
    *,
    first_frame: float,
    given_audio: float,
    judged: bool,
    size: int | None,
) -> Iterator[Part]:
    """Cut a batch and choose what is given.

    Args:
        batch: `video`, `audio`, `text`, `index`, as data modules give them; with `real` false, the latents are
            there for their shape only.
        first_frame, given_audio: probabilities of conditions.
        judged: whether an adversary looks at the latents.
        size: samples of a part; None for all.

    Raises:
        UserError: something needs latents that are not real.
    """
    if not batch.get("real", True) and (first_frame or given_audio or judged):
        raise UserError(
            "recipe.first_frame, recipe.given_audio and recipe.gan.weight need latents and there are prompts alone; "
            "set all three to 0, or choose data=shards"
        )
    latents = Pair(batch["video"], batch["audio"])
    given = Given.nothing(latents)
    first, sound = draws.chance(first_frame), draws.chance(given_audio)
    if latents.video.shape[2] > 1:  # a still picture would leave nothing to generate
        given.mask.video[first.to(latents.video.device), :, 0] = 0
    given.mask.audio[sound.to(latents.audio.device)] = 0
    for start in range(0, len(draws), size or len(draws)):
        some = slice(start, start + (size or len(draws)))
        position = torch.as_tensor(batch["index"])[some].cpu()
        yield Part(list(batch["text"][some]), given.select(some), draws.generators[some], position)
