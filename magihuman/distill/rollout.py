"""Backward simulation: the student's own sampling trajectory, kept for training on.

One rollout without gradients serves a whole cycle. The critic learns from the data estimates of random steps
of it, and the student's gradient is taken through one more call at a stored state: the networks see exactly
what inference will show them (Yin et al. 2024, arXiv 2405.14867, section 4.4), for the price of K calls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from magihuman.distill.latents import MODALITIES, Given, Pair, each
from magihuman.flow.path import x0_from_velocity
from magihuman.flow.solvers import Solver, make_solver
from magihuman.weights import Sampling

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
