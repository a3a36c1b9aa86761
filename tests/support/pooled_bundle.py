"""A world without weights for tests of the data path: pooled pictures, framed sound, counted letters."""

import os
import signal
from typing import Any

import torch
import torch.nn.functional as F

from magihuman.codecs.bundle import CodecBundle
from magihuman.models.config import Contract


class PooledVideo:
    """Stride (4,4,4): the first frame is repeated, then 4x4x4 means; the channels are RGB."""

    channels = 3
    stride = (4, 4, 4)

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        held = torch.cat([frames[:, :, :1].expand(-1, -1, 3, -1, -1), frames], 2)
        return F.avg_pool3d(held, 4)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)[:, :, 3:]


class FramedAudio:
    """Latent k holds the sound of frame k as 32 means of 20 samples."""

    channels = 32
    sample_rate = 16000
    hop = 640
    waveform_channels = 1

    def encode(self, waveform: torch.Tensor) -> torch.Tensor:
        return waveform[:, 0].unflatten(1, (-1, 32, 20)).mean(-1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.repeat_interleave(20, 2).flatten(1)[:, None]


class LetterText:
    """One token per word: how often it has each letter."""

    channels = 26

    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        letters = [chr(97 + i) for i in range(26)]
        words = [prompt.lower().split() or [""] for prompt in prompts]
        return [torch.tensor([[float(word.count(c)) for c in letters] for word in some]) for some in words]


def build(device: str) -> CodecBundle:
    """64 x 64 px, 25 frames at 25 fps, 16 kHz mono."""
    contract = Contract("pooled", "framed", "letters", 3, 32, 26, (4, 4, 4), 25.0, 16000, 1)
    return CodecBundle("pooled", contract, PooledVideo(), FramedAudio(), LetterText(), height=64, width=64, frames=25)


def deadly(device: str) -> Any:
    """The pooled world, but encoding clip number 3 kills the process, unless SPARED is set."""

    class Deadly(LetterText):
        def encode(self, prompts: list[str]) -> list[torch.Tensor]:
            if "clip number 3" in prompts and "SPARED" not in os.environ:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().encode(prompts)

    world = build(device)
    object.__setattr__(world, "text_encoder", Deadly())
    return world
