"""The denoising loop: from noise and text to video and audio latents (SPEC 4.2 and 4.3).

One loop serves every stage: what differs (start, conditions, solver, guidance) are arguments. Every sample of
a batch owns a noise generator, so a prompt gives the same clip alone and in company.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from inference.fast.fast_denoiser import FastDenoiser
from magihuman.flow.guidance import combine
from magihuman.flow.solvers import make_solver
from magihuman.models.denoiser import Denoiser
from magihuman.models.tokens import Layout

# Called after step i of n with the current latents: (i + 1, n, video, audio).
Progress = Callable[[int, int, torch.Tensor, torch.Tensor], None]


class Scales(Protocol):
    """Guidance scales, such as `magihuman.flow.guidance.Guidance` and `FrameScales`."""

    @property
    def needed(self) -> bool:
        """False when every scale is 1."""
        ...

    def __call__(self, modality: str, timestep: int) -> Tensor | float:
        """Scale for "video" or "audio" at an integer timestep; a tensor is broadcast over [B,C,T,h,w]."""
        ...


@dataclass(frozen=True)
class LatentShape:
    """One sample's latents: video [channels, frames, height, width], audio [audio, audio_channels]."""

    channels: int
    frames: int
    height: int
    width: int
    audio: int
    audio_channels: int

    @property
    def video(self) -> tuple[int, int, int, int]:
        return (self.channels, self.frames, self.height, self.width)


@dataclass
class Noise:
    """Everything random in a run of the loop, drawn beforehand.

    Attributes:
        video: start of the video latents [B,C,T,h,w] fp32 (Gaussian for the base stage; anything else that a
            later stage wants to start from).
        audio: start of the audio latents [B,A,Ca] fp32, or None where the audio is given.
        steps: per solver step the fresh noise (video, audio or None) of a stochastic solver; else empty.
    """

    video: torch.Tensor
    audio: torch.Tensor | None
    steps: list[tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=list)


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per seed; CPU, so that every device starts from the same noise."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(
    shape: LatentShape,
    generators: Sequence[torch.Generator],
    stochastic_steps: int = 0,
    given_audio: Tensor | None = None,
    device: torch.device | str = "cpu",
    *,
    overwrite: bool = False,
) -> Noise:
    """Draw the noise of a batch, each sample from its own generator in the order of SPEC 4.2.

    The order is audio, video, then per stochastic step video, audio. Given audio needs no draw and gets none.
    All draws happen here rather than in the loop: it then holds no transfer from the host.

    Args:
        given_audio: latents [B,A,Ca].
        overwrite: they are only where the loop starts (SPEC O2), so that its steps draw noise for audio.
    """
    start, fresh = given_audio is None, given_audio is None or overwrite

    def one(generator: torch.Generator) -> list[Tensor]:
        def audio(drawn: bool) -> Tensor:
            if not drawn:
                return torch.empty(0)
            return torch.randn(shape.audio, shape.audio_channels, generator=generator)

        draws = [audio(start), torch.randn(shape.video, generator=generator)]
        for _ in range(stochastic_steps):
            draws += [torch.randn(shape.video, generator=generator), audio(fresh)]
        return draws

    audio, video, *steps = (torch.stack(draw).to(device) for draw in zip(*map(one, generators), strict=True))
    pairs = zip(steps[0::2], steps[1::2], strict=True)
    first = audio if start else given_audio if overwrite else None
    return Noise(video, first, [(v, a if fresh else None) for v, a in pairs])


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    text: Sequence[torch.Tensor],
    negative_text: Sequence[torch.Tensor] | None,
    shape: LatentShape,
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
        denoiser: in eval mode, on the device where the loop shall run.
        text: per sample features [S_i,Ct] fp32 at their true length.
        negative_text: the same for the other side of the guidance, own lengths; needed with `guidance`.
        shape: of one sample's latents.
        steps: solver steps n >= 1.
        solver: a name of `magihuman.flow.solvers.SOLVERS`; video and audio get an object each (SPEC 3.5).
        guidance: scales by modality and integer timestep; None is one pass without guidance ("cfg 1").
        shift: of the noise level grid (SPEC 3.1).
        generator: one per sample (see `seeded`); not needed with `noise`.
        image_latent: [B,C,1,h,w], replaces latent frame 0 before every step and at the end.
        audio_latent: [B,A,Ca], used as it is and never changed, with every solver (the released code
            overwrites it when unguided, SPEC O2: for that give it as `noise.audio` instead).
        progress: see `Progress`.
        noise: replaces the draws from `generator` (stored vectors; stages that start elsewhere).
        cfg_passes: 1 computes both sides of the guidance as one batch; 2 one after the other, in half the
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
    video_solver, audio_solver = make_solver(solver, steps, shift), make_solver(solver, steps, shift)
    if noise is None:
        if generator is None or len(generator) != batch:
            raise ValueError(f"{batch} prompts need {batch} generators, or stored noise")
        draws = steps if video_solver.stochastic else 0
        noise = draw_noise(shape, generator, draws, audio_latent, device)
    video, audio = noise.video, audio_latent if audio_latent is not None else noise.audio
    if audio is None:
        raise ValueError("the noise holds no audio and none is given")

    # What runs as one batch: the prompts; then, in the same batch or in one of its own, the other side.
    sides = [list(text)] + ([] if guidance is None else [list(negative_text or ())])
    if cfg_passes == 1:
        sides = [[features for side in sides for features in side]]
    passes = [(side, _layout(denoiser, side, shape, device)) for side in sides]
    if isinstance(denoiser, FastDenoiser):
        denoiser.begin(steps)

    for i, timestep in enumerate(video_solver.timesteps.tolist()):
        video = _with_first_frame(video, image_latent)
        parts = [
            denoiser(_copies(video, len(side) // batch), _copies(audio, len(side) // batch), side, layout)
            for side, layout in passes
        ]
        v_video, v_audio = (
            torch.cat(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True)
        )
        if guidance is not None:
            v_video = combine(v_video[:batch], v_video[batch:], guidance("video", timestep))
            v_audio = combine(v_audio[:batch], v_audio[batch:], guidance("audio", timestep))
        fresh_video, fresh_audio = noise.steps[i] if noise.steps else (None, None)
        video = video_solver.step(v_video, i, video, fresh_video)
        if audio_latent is None:
            audio = audio_solver.step(v_audio, i, audio, fresh_audio)
        if progress is not None:
            progress(i + 1, steps, video, audio)
    return _with_first_frame(video, image_latent), audio


def _layout(denoiser: Denoiser, text: Sequence[Tensor], shape: LatentShape, device: torch.device) -> Layout:
    lengths = [len(features) for features in text]
    return denoiser.layout_for((len(text), *shape.video), shape.audio, lengths, device)


def _copies(latents: Tensor, count: int) -> Tensor:
    return latents if count == 1 else torch.cat([latents] * count)


def _with_first_frame(video: torch.Tensor, image_latent: torch.Tensor | None) -> torch.Tensor:
    """`video` with latent frame 0 replaced, as a new tensor: multistep solvers keep the one they returned."""
    if image_latent is None:
        return video
    return torch.cat([image_latent, video[:, :, 1:]], dim=2)
