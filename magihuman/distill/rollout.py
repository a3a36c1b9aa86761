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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from magihuman.errors import UserError
from magihuman.flow.path import x0_from_velocity
from magihuman.flow.solvers import Solver, make_solver
from magihuman.io.export import Sampling
from magihuman.training.rng import BatchRng

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
def simulate(
    velocity: Velocity, solvers: tuple[Solver, Solver], start: Pair, fresh: Sequence[Pair], given: Given
) -> Rollout:
    """Sample with the solvers that inference samples with.

    Args:
        velocity: of the network, guided or not.
        solvers: one object per modality (multistep ones have a state each), as inference holds them.
        start: noise; fresh: noise of every step, for stochastic solvers; else empty.
        given: conditions, inserted before every call and at the end.
    """
    for solver in solvers:
        solver.reset()
    sigmas = solvers[0].sigmas
    states, estimates, x = [], [], given.insert(start)
    for k, sigma in enumerate(sigmas[:-1].tolist()):
        level = torch.full((len(x.video),), sigma, device=x.video.device)
        v = velocity(x, Pair(level, level))
        states.append(x)
        estimates.append(given.insert(each(lambda a, b, s=sigma: x0_from_velocity(a, b, s), x, v)))
        noise = fresh[k] if fresh else (None, None)
        stepped = (solver.step(v[m], k, x[m], noise[m]) for m, solver in enumerate(solvers))
        x = given.insert(Pair(*stepped))
    return Rollout(states, estimates, x, sigmas)


def draw_noise(
    generators: Sequence[torch.Generator], shape: Pair, steps: int, device: torch.device
) -> tuple[Pair, list[Pair]]:
    """Start and fresh noise of a rollout, each sample's from its own generator, in the order of SPEC 4.2.

    Audio comes first at the start and last in the steps, as in inference, so that a generator in the same
    state gives the same trajectory there.

    Args:
        shape: latents of the batch, read for their shape only; steps: with fresh noise.
    """

    def one(generator: torch.Generator) -> list[Tensor]:
        video, audio = shape.video.shape[1:], shape.audio.shape[1:]
        draws = [torch.randn(audio, generator=generator), torch.randn(video, generator=generator)]
        for _ in range(steps):
            draws += [torch.randn(video, generator=generator), torch.randn(audio, generator=generator)]
        return draws

    audio, video, *rest = (torch.stack(draw).to(device) for draw in zip(*map(one, generators), strict=True))
    return Pair(video, audio), [Pair(*pair) for pair in zip(rest[0::2], rest[1::2], strict=True)]


def trajectory(
    settings: Sampling, velocity: Velocity, generators: list[torch.Generator], given: Given
) -> Rollout:
    """`simulate` with the solver of `settings` and noise from the generators, one per sample."""
    video, audio = (make_solver(settings.solver, settings.steps, settings.shift) for _ in MODALITIES)
    fresh_steps = settings.steps if video.stochastic else 0
    start, fresh = draw_noise(generators, given.latents, fresh_steps, given.latents.video.device)
    return simulate(velocity, (video, audio), start, fresh, given)


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
            ends.append(trajectory(settings, partial(velocity, words), noise[some], Given.nothing(like)).end)
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
    given = Given.nothing(latents)
    first, sound = rng.chance(first_frame), rng.chance(given_audio)
    if latents.video.shape[2] > 1:  # a still picture would leave nothing to generate
        given.mask.video[first.to(latents.video.device), :, 0] = 0
    given.mask.audio[sound.to(latents.audio.device)] = 0
    for start in range(0, len(rng), size or len(rng)):
        some = slice(start, start + (size or len(rng)))
        position = torch.as_tensor(batch["index"])[some].cpu()
        yield Part(list(batch["text"][some]), given.select(some), rng.generators[some], position)
