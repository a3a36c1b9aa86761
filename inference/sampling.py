"""Sampling of a batch with classifier-free guidance: the denoising loop around a `Denoiser` (SPEC 4.2, 4.3).

    video, audio = sample(denoiser, text, None, shape, steps=8, solver="renoise", generator=seeded([0]))

The loop itself is `magihuman.flow.sampling.denoise`. Every sample has a noise generator of its own, so a prompt gives the
same clip in any batch.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from magihuman.flow.guidance import combine
from magihuman.flow.sampling import Conditioning, Noise, Pair, Shapes, denoise, draw_noise
from magihuman.flow.solvers import make_solver
from magihuman.models.denoiser import Denoiser

# Called after step i of n with the solver's latents: (i + 1, n, video, audio).
Progress = Callable[[int, int, torch.Tensor, torch.Tensor], None]


class Scales(Protocol):
    """Guidance scales, such as `Guidance` and `FrameScales` of `magihuman.flow.guidance`."""

    @property
    def needed(self) -> bool:
        """False when every scale is 1."""
        ...

    def __call__(self, modality: str, timestep: int) -> Tensor | float:
        """Scale for "video" or "audio" at an integer timestep; a tensor is broadcast over [B,C,T,h,w]."""
        ...


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    text: Sequence[torch.Tensor],
    negative_text: Sequence[torch.Tensor] | None,
    shape: Shapes,
    steps: int,
    solver: str = "unipc",
    guidance: Scales | None = None,
    shift: float = 5.0,
    generator: Sequence[torch.Generator] | None = None,
    image_latent: torch.Tensor | None = None,
    audio_latent: torch.Tensor | None = None,
    progress: Progress | None = None,
    noise: Noise | None = None,
    cfg_passes: int = 1,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Denoise a batch.

    Args:
        denoiser: in eval mode, on the device where the loop runs.
        text: per sample features [S_i,Ct] fp32 at their true length.
        negative_text: features of the unconditional branch, with lengths of their own; needed with `guidance`.
        shape: of one sample's latents: video (C,T,h,w), audio (A,Ca).
        steps: solver steps n >= 1.
        solver: a name of `magihuman.flow.solvers.SOLVERS`; video and audio get an object each (SPEC 3.5).
        guidance: scales by modality and integer timestep; None is one pass without guidance ("cfg 1").
        shift: of the noise level grid (SPEC 3.1).
        generator: one per sample (see `magihuman.flow.sampling.seeded`); not needed with `noise`.
        image_latent: [B,C,1,h,w], replaces latent frame 0 before every step and at the end.
        audio_latent: [B,A,Ca], conditioning that never changes, with every solver (the released code overwrites it
            when unguided, SPEC O2: for that pass it as the start of `noise` instead).
        progress: see `Progress`.
        noise: replaces the draws from `generator` (stored vectors; stages with another start).
        cfg_passes: 1 computes both branches of the guidance as one batch; 2 one after the other, in half the
            memory.
        device: where the loop runs, if not where the network's parameters are.

    Returns:
        (video [B,C,T,h,w], audio [B,A,Ca]), fp32, on the denoiser's device.

    Raises:
        ValueError: arguments that contradict each other.
    """
    batch = len(text)
    if guidance is not None and not guidance.needed:
        guidance = None
    if guidance is not None and (negative_text is None or len(negative_text) != batch):
        raise ValueError(f"guidance needs {batch} negative texts, one per sample")
    device = device or next(denoiser.parameters()).device
    solvers = make_solver(solver, steps, shift), make_solver(solver, steps, shift)
    if noise is None:
        if generator is None or len(generator) != batch:
            raise ValueError(f"{batch} prompts need {batch} generators, or stored noise")
        fresh = steps if solvers[0].stochastic else 0
        noise = draw_noise(shape, generator, fresh, device, audio=audio_latent, audio_steps=audio_latent is None)
    elif audio_latent is not None:
        noise = Noise(Pair(noise.start.video, audio_latent), noise.steps)

    # Batches of a step: the prompts; then, in the same batch or in one of its own, the unconditional branch.
    branches = [list(text)] + ([] if guidance is None else [list(negative_text or ())])
    if cfg_passes == 1:
        branches = [[features for branch in branches for features in branch]]
    passes = []
    for branch in branches:
        lengths = [len(features) for features in branch]
        passes.append((branch, denoiser.layout_for((len(branch), *shape[0]), shape[1][0], lengths, device)))
    timesteps = solvers[0].timesteps.tolist()
    denoiser.begin(steps)

    def velocity(x: Pair, i: int) -> Pair:
        found = [
            denoiser(*(_repeat(latents, len(branch) // batch) for latents in x), branch, layout)
            for branch, layout in passes
        ]
        v = Pair(*(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True)))
        if guidance is None:
            return v
        return Pair(
            combine(v.video[:batch], v.video[batch:], guidance("video", timesteps[i])),
            combine(v.audio[:batch], v.audio[batch:], guidance("audio", timesteps[i])),
        )

    def report(i: int, x: Pair, v: Pair, stepped: Pair) -> None:
        if progress is not None:
            progress(i + 1, steps, *stepped)

    conditioning = None if image_latent is None else Conditioning.first_frame(image_latent, noise.start)
    audio_solver = solvers[1] if audio_latent is None else None
    return denoise(velocity, (solvers[0], audio_solver), noise, conditioning, report)


def _repeat(latents: Tensor, count: int) -> Tensor:
    return latents if count == 1 else torch.cat([latents] * count)
