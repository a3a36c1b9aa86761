"""Model FLOPs of training, for their utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B)."""

import torch

from magihuman.gpus import recognise
from magihuman.models.config import DiTConfig
from magihuman.models.flops import forward_flops


def training_flops(
    config: DiTConfig, video: int, audio: int, text: int, *, frames: int = 0, window: int | None = None
) -> float:
    """Forward and backward of one sample; recomputed activations do not count as model FLOPs.

    Args:
        video, audio, text: tokens of the sample.
        frames, window: as for `magihuman.models.flops.forward_flops`.
    """
    return 3.0 * forward_flops(config, video, audio, text, frames=frames, window=window).total


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak of a known GPU, or None."""
    if device.type != "cuda":
        return None
    known = recognise(torch.cuda.get_device_name(device))
    return None if known is None else known.bf16
