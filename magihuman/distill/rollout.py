"""Student rollouts (backward simulation) and micro-batches of a distillation.

A rollout without gradients serves a whole iteration: the fake score is fitted to its data estimates, and the student's
gradient is computed by one more call at a stored state. Training inputs are thus the states of inference (Yin et al.
2024, arXiv 2405.14867, section 4.4), for K forward passes.

    rollout = roll_out(Sampling("renoise", 8), velocity, seeded([0, 1]), Conditioning.nothing(latents))
    x0 = rollout.estimate(torch.tensor([7, 7]))     # data estimates of the last step
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from magihuman.errors import UserError
from magihuman.flow.path import x0_from_velocity
from magihuman.flow.sampling import MODALITIES, Conditioning, Pair, Shapes, denoise, draw_noise, each
from magihuman.flow.solvers import make_solver
from magihuman.io.export import Sampling
from magihuman.training.rng import BatchRng

Velocity = Callable[[Pair, Pair], Pair]
"""Velocities of a batch at (latents, noise levels [B] of both modalities)."""

Sampler = Callable[[list[Tensor], list[torch.Generator], Shapes], Pair]
"""Sampled latents of a batch: text features, one noise generator per sample, shapes of one sample's latents."""


@dataclass(frozen=True)
class Rollout:
    """States and data estimates of all steps of a trajectory.

    Attributes:
        states: K network inputs x_k; estimates: K data estimates, conditioning inserted; both [B,...].
        end: the sampled latents.
        sigmas: [K+1] noise levels of the sampler.
    """

    states: list[Pair]
    estimates: list[Pair]
    end: Pair
    sigmas: Tensor

    def state(self, step: Tensor) -> Pair:
        """x_k with a step k per sample, [B] on the CPU."""
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
    """Sampler without conditioning.

    Args:
        velocity: v(text, x, sigma).
        size: samples per forward pass, None for all.
    """

    def sample(texts: list[Tensor], noise: list[torch.Generator], shape: Shapes) -> Pair:
        ends = []
        for start in range(0, len(texts), size or len(texts)):
            some = slice(start, start + (size or len(texts)))
            words = [text.to(device) for text in texts[some]]
            like = Pair(*(torch.zeros(len(words), *one, device=device) for one in shape))
            ends.append(roll_out(settings, partial(velocity, words), noise[some], Conditioning.nothing(like)).end)
        return Pair(*map(torch.cat, zip(*ends, strict=True))) if len(ends) > 1 else ends[0]

    return sample


@dataclass
class MicroBatch:
    """Samples that go through the networks together.

    Attributes:
        text: features of each; conditioning: clean latents; generators: one per sample, source of all its noise.
        index: [B] global positions of the samples in the data, on the CPU.
        rollout: current student samples; uses: how often they were drawn from.
    """

    text: list[Tensor]
    conditioning: Conditioning
    generators: list[torch.Generator]
    index: Tensor
    rollout: Rollout | None = None
    uses: int = 0

    def uniform(self) -> Tensor:
        """[B] in [0, 1), from each sample's own generator."""
        return torch.cat([torch.rand(1, generator=g) for g in self.generators])

    def normal(self) -> Pair:
        """Gaussian noise of the shape of the latents."""
        video, audio = self.conditioning.latents
        return draw_noise((video.shape[1:], audio.shape[1:]), self.generators, device=video.device).start


def micro_batches(
    batch: dict[str, Any], rng: BatchRng, *, first_frame: float, audio_conditioning: float, gan: bool, size: int | None
) -> Iterator[MicroBatch]:
    """Split a batch and draw which samples are conditioned on their first frame or audio.

    Args:
        batch: `video`, `audio`, `text`, `index` of a data module; `real` is False if the latents are placeholders.
        first_frame, audio_conditioning: probabilities.
        gan: whether a GAN loss needs the latents.
        size: samples per micro-batch; None for all.

    Raises:
        UserError: a setting needs latents and the data is prompts only.
    """
    if not batch.get("real", True) and (first_frame or audio_conditioning or gan):
        raise UserError(
            "recipe.first_frame, recipe.audio_conditioning and recipe.gan.weight need latents, and data=prompts has "
            "none; set all three to 0, or choose data=shards"
        )
    latents = Pair(batch["video"], batch["audio"])
    conditioning = Conditioning.nothing(latents)
    first, audio = rng.chance(first_frame), rng.chance(audio_conditioning)
    if latents.video.shape[2] > 1:  # a still image would leave nothing to generate
        conditioning.mask.video[first.to(latents.video.device), :, 0] = 0
    conditioning.mask.audio[audio.to(latents.audio.device)] = 0
    for start in range(0, len(rng), size or len(rng)):
        some = slice(start, start + (size or len(rng)))
        index = torch.as_tensor(batch["index"])[some].cpu()
        yield MicroBatch(list(batch["text"][some]), conditioning.select(some), rng.generators[some], index)
