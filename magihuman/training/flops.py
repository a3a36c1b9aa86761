"""Arithmetic of the network, for model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B)."""

import torch

from magihuman.models.config import DiTConfig

PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
"""Dense bf16 FLOP/s by device name, from the makers' data sheets."""


def forward_flops(config: DiTConfig, video: int, audio: int, text: int) -> float:
    """Multiply-adds x 2 of one sample's forward pass: matrix products and attention, nothing else.

    Args:
        video, audio, text: tokens of the sample. Each token runs through one expert.
    """
    length, hidden = video + audio + text, config.hidden_size
    total = 0.0
    for layer in range(config.num_layers):
        products = config.qkv_width + hidden + config.up_width(layer) + config.intermediate_size(layer)
        total += 2 * length * hidden * products + 4 * length * length * hidden
    channels = video * config.video_in_channels + audio * config.audio_in_channels
    return total + 2 * hidden * (2 * channels + text * config.text_in_channels)


def training_flops(config: DiTConfig, video: int, audio: int, text: int) -> float:
    """Forward and backward of one sample; recomputed activations do not count as model FLOPs."""
    return 3 * forward_flops(config, video, audio, text)


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak of a known GPU, or None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16.items() if key in name), None)
