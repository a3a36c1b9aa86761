"""The denoising loop: integrates the flow of video and audio latents from noise to data (SPEC 4.2, 4.3).

Inference and the rollouts of a distillation run this loop; it knows solvers and a velocity function, no network:

    noise = draw_noise(((48, 2, 8, 8), (9, 64)), seeded([0]))          # one sample's video and audio shapes
    solvers = make_solver("unipc", 32), make_solver("unipc", 32)
    video, audio = denoise(lambda x, i: Pair(*denoiser(*x, text)), solvers, noise)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from magihuman.flow.guidance import MODALITIES
from magihuman.flow.solvers import Solver

Shapes = tuple[Sequence[int], Sequence[int]]
"""Shapes of one sample's latents: video (C, T, h, w) and audio (A, Ca)."""


class Pair(NamedTuple):
    """Video [B,C,T,h,w] and audio [B,A,Ca] of a batch: latents, noise, velocities, gradients or masks."""

    video: Tensor
    audio: Tensor


def each(function: Callable[..., Tensor], *pairs: Pair) -> Pair:
    """Apply a function to the video tensors and to the audio tensors of the arguments.

    each(add_noise, x0, noise, sigma)     # Pair(add_noise(x0.video, ...), add_noise(x0.audio, ...))
    """
    video, audio = zip(*pairs, strict=True)
    return Pair(function(*video), function(*audio))


@dataclass(frozen=True)
class Conditioning:
    """Latents that are kept clean during sampling and training: first frames, whole audio tracks.

    Every network of a distillation gets them at every noise level: a fake-score network without them would fit
    another conditional distribution than the teacher's. Losses and statistics leave them out.

    Attributes:
        latents: clean latents, broadcastable; only read where the mask is 0.
        mask: 1 where latents are generated, 0 where they are conditioning: [B,1,T,1,1] and [B,1,1].
    """

    latents: Pair
    mask: Pair

    @classmethod
    def nothing(cls, like: Pair) -> "Conditioning":
        """No conditioning, for latents of the shapes of `like`."""
        (batch, _, frames), device = like.video.shape[:3], like.video.device
        masks = torch.ones(batch, 1, frames, 1, 1, device=device), torch.ones(batch, 1, 1, device=device)
        return cls(like, Pair(*masks))

    @classmethod
    def first_frame(cls, image: Tensor, like: Pair) -> "Conditioning":
        """The first latent frame [B,C,1,h,w] of the video, for latents of the shapes of `like`."""
        mask = cls.nothing(like).mask
        mask.video[:, :, 0] = 0
        return cls(Pair(image, like.audio), mask)

    def insert(self, generated: Pair) -> Pair:
        """`generated` with the conditioning positions replaced by clean latents, as new tensors."""
        return each(lambda x, clean, mask: torch.where(mask > 0, x, clean), generated, self.latents, self.mask)

    def select(self, samples: slice) -> "Conditioning":
        """Conditioning of some samples of the batch."""
        return Conditioning(*(Pair(p.video[samples], p.audio[samples]) for p in (self.latents, self.mask)))


@dataclass
class Noise:
    """All random numbers of a sampling run, drawn before the loop, which then needs no transfer from the host.

    Attributes:
        start: latents that the loop starts from, fp32: Gaussian noise, or the input of a super-resolution stage.
        steps: fresh noise of every step of a stochastic solver; empty for a deterministic one.
    """

    start: Pair
    steps: list[Pair] = field(default_factory=list)


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per seed; on the CPU, so that every device starts from the same noise."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(
    shapes: Shapes,
    generators: Sequence[torch.Generator],
    steps: int = 0,
    device: torch.device | str = "cpu",
    *,
    audio: Tensor | None = None,
    audio_steps: bool = True,
    video_first: bool = False,
) -> Noise:
    """Draw the noise of a batch, each sample from its own generator.

    Order of the draws (SPEC 4.2): audio, video, then video, audio for every step. A sample thus gets the same noise
    in any batch, and in training the same as in inference.

    Args:
        steps: steps of a stochastic solver; 0 for a deterministic one.
        audio: start of the audio latents [B,A,Ca], for which nothing is drawn.
        audio_steps: draw audio noise in the steps; False where the audio is conditioning throughout.
        video_first: draw the start of the video first, as the super-resolution stage does.

    Returns:
        noise on `device`; without `audio_steps`, the audio of its steps is empty.
    """

    def one(generator: torch.Generator) -> list[Tensor]:
        def normal(modality: str, drawn: bool = True) -> Tensor:
            shape = shapes[MODALITIES.index(modality)]
            return torch.randn(tuple(shape), generator=generator) if drawn else torch.empty(0)

        if video_first:
            draws = [normal("video"), normal("audio", audio is None)]
        else:
            draws = [normal("audio", audio is None), normal("video")][::-1]
        for _ in range(steps):
            draws += [normal("video"), normal("audio", audio_steps)]
        return draws

    drawn = [torch.stack(draw).to(device) for draw in zip(*map(one, generators), strict=True)]
    start, *fresh = (Pair(*pair) for pair in zip(drawn[0::2], drawn[1::2], strict=True))
    return Noise(start if audio is None else Pair(start.video, audio), fresh)


@torch.no_grad()
def denoise(
    velocity: Callable[[Pair, int], Pair],
    solvers: tuple[Solver, Solver | None],
    noise: Noise,
    conditioning: Conditioning | None = None,
    on_step: Callable[[int, Pair, Pair, Pair], None] | None = None,
) -> Pair:
    """Integrate from noise to data.

    Args:
        velocity: v(x_i, i) at step i, guided or not; the noise level of x_i is `solvers[0].sigmas[i]`.
        solvers: of video and audio, an object each since multistep solvers have a state (SPEC 3.5); None for audio
            that stays as it starts.
        noise: see `draw_noise`.
        conditioning: inserted before every step and at the end.
        on_step: called after step i with (i, x_i, v_i, result of the solver before the conditioning is inserted).

    Returns:
        latents, fp32, on the device of the noise.
    """
    insert = (lambda x: x) if conditioning is None else conditioning.insert
    for solver in solvers:
        if solver is not None:
            solver.reset()
    x = insert(noise.start)
    for i in range(solvers[0].steps):
        v, fresh = velocity(x, i), noise.steps[i] if noise.steps else (None, None)
        stepped = Pair(
            *(x[m] if solver is None else solver.step(v[m], i, x[m], fresh[m]) for m, solver in enumerate(solvers))
        )
        if on_step is not None:
            on_step(i, x, v, stepped)
        x = insert(stepped)
    return x
