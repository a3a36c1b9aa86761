"""Both modalities of a batch as one value, and which places of it a condition gives.

Backward simulation: the student's own sampling trajectory, kept for training on.

One rollout without gradients serves a whole cycle. The critic learns from the data estimates of random steps
of it, and the student's gradient is taken through one more call at a stored state: the networks see exactly
what inference will show them (Yin et al. 2024, arXiv 2405.14867, section 4.4), for the price of K calls.

The slices of a batch that go through the networks together, with what is given and what is drawn.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from magihuman.errors import UserError
from magihuman.flow.path import x0_from_velocity
from magihuman.flow.sampling import (
    MODALITIES,
    Conditioning,
    Pair,
    denoise,
    draw_noise,
    each,
)
from magihuman.flow.solvers import make_solver
from magihuman.io.export import Sampling
from magihuman.training.rng import BatchRng

Velocity = Callable[[Pair, Pair], Pair]
"""Velocities of a batch at (latents, noise levels [B] of both modalities)."""

Shape = tuple[list[int], list[int]]
"""Of one sample's video and audio latents."""

Sampler = Callable[[list[Tensor], list[torch.Generator], Shape], Pair]
"""Latents of a batch of texts, the noise of each from a generator of its own."""


@dataclass(frozen=True)
class Rollout:
    """States and data estimates of all steps of a trajectory.

    Attributes:
        states: K network inputs x_k; estimates: K data estimates, conditions inserted; both [B,...].
        end: what the sampler returns.
        sigmas: [K+1] noise levels of the sampler.
    """

    states: list[Pair]
    estimates: list[Pair]
    end: Pair
    sigmas: Tensor

    @property
    def steps(self) -> int:
        return len(self.states)

    def state(self, step: Tensor) -> Pair:
        """x_k, where every sample has a k of its own, [B] on the CPU."""
        return _pick(self.states, step)

    def estimate(self, step: Tensor) -> Pair:
        """The data estimate of step k, per sample."""
        return _pick(self.estimates, step)

    def sigma(self, step: Tensor) -> Tensor:
        """[B] noise levels of x_k, on the device of the latents."""
        return self.sigmas[step].to(self.end.video.device)


def _pick(pairs: Sequence[Pair], step: Tensor) -> Pair:
    steps = step.tolist()
    return Pair(*(torch.stack([pairs[k][m][b] for b, k in enumerate(steps)]) for m in (0, 1)))


@torch.no_grad()
def roll_out(
    sampling: Sampling, velocity: Velocity, generators: Sequence[torch.Generator], conditioning: Conditioning
) -> Rollout:
    """Sample as inference does, with one generator per sample, and keep every step."""
    video, audio = (make_solver(sampling.solver, sampling.steps, sampling.shift) for _ in MODALITIES)
    shapes, device = [x.shape[1:] for x in conditioning.latents], conditioning.latents.video.device
    noise = draw_noise((shapes[0], shapes[1]), generators, sampling.steps if video.stochastic else 0, device)
    sigmas, states, estimates = video.sigmas.tolist(), [], []

    def at_step(x: Pair, i: int) -> Pair:
        level = torch.full((len(generators),), sigmas[i], device=device)
        return velocity(x, Pair(level, level))

    def keep(i: int, x: Pair, v: Pair, stepped: Pair) -> None:
        states.append(x)
        estimates.append(conditioning.insert(each(lambda a, b: x0_from_velocity(a, b, sigmas[i]), x, v)))

    end = denoise(at_step, (video, audio), noise, conditioning, keep)
    return Rollout(states, estimates, end, video.sigmas)


def sampler(
    settings: Sampling,
    velocity: Callable[[list[Tensor], Pair, Pair], Pair],
    device: torch.device,
    size: int | None = None,
) -> Sampler:
    """Sampling without conditions.

    Args:
        velocity: of texts, latents and noise levels; size: samples that go through the network together, None for all.
    """

    def sample(texts: list[Tensor], noise: list[torch.Generator], shape: Shape) -> Pair:
        ends = []
        for start in range(0, len(texts), size or len(texts)):
            some = slice(start, start + (size or len(texts)))
            words = [text.to(device) for text in texts[some]]
            like = Pair(*(torch.zeros(len(words), *one, device=device) for one in shape))
            ends.append(
                roll_out(settings, partial(velocity, words), noise[some], Conditioning.nothing(like)).end
            )
        return Pair(*map(torch.cat, zip(*ends, strict=True))) if len(ends) > 1 else ends[0]

    return sample


@dataclass
class Part:
    """Some samples of a batch.

    Attributes:
        text: features of each; given: conditions; generators: source of all draws, one per sample.
        position: [B] global positions of the samples, on the CPU.
        rollout: the student's samples that are in use, and how often they were: `uses`.
    """

    text: list[Tensor]
    given: Conditioning
    generators: list[torch.Generator]
    position: Tensor
    rollout: Rollout | None = None
    uses: int = 0

    def uniform(self) -> Tensor:
        """[B] in [0, 1), each sample's own draw."""
        return torch.cat([torch.rand(1, generator=g) for g in self.generators])

    def normal(self) -> Pair:
        """Noise of the shape of the latents."""
        video, audio = self.given.latents
        return draw_noise((video.shape[1:], audio.shape[1:]), self.generators, device=video.device).start


def parts(
    batch: dict[str, Any],
    rng: BatchRng,
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
    given = Conditioning.nothing(latents)
    first, sound = rng.chance(first_frame), rng.chance(given_audio)
    if latents.video.shape[2] > 1:  # a still picture would leave nothing to generate
        given.mask.video[first.to(latents.video.device), :, 0] = 0
    given.mask.audio[sound.to(latents.audio.device)] = 0
    for start in range(0, len(rng), size or len(rng)):
        some = slice(start, start + (size or len(rng)))
        position = torch.as_tensor(batch["index"])[some].cpu()
        yield Part(list(batch["text"][some]), given.select(some), rng.generators[some], position)
