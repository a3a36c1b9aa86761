"""Arithmetic of one forward pass: multiply-adds x 2 of matrix products and attention, nothing else; no torch."""

from dataclasses import dataclass

from magihuman.models.config import DiTConfig


@dataclass(frozen=True)
class ForwardFlops:
    """Of all samples' tokens: the blocks' products, attention (scores and values), embedders and heads."""

    products: int
    attention: int
    ends: int

    @property
    def total(self) -> int:
        return self.products + self.attention + self.ends


def forward_flops(
    config: DiTConfig, video: int, audio: int, text: int, *, frames: int = 0, window: int | None = None
) -> ForwardFlops:
    """Of one sample. Each token runs through one expert.

    Args:
        video, audio, text: tokens of the sample.
        frames: latent frames; window: frames that a video token of a local layer sees to each side. Without a window
            all layers see everything.
    """
    length, hidden = video + audio + text, config.hidden_size
    products = attention = 0
    for layer in range(config.num_layers):
        columns = config.qkv_width + hidden + config.up_width(layer) + config.intermediate_size(layer)
        products += 2 * length * hidden * columns
        local = window is not None and layer in config.local_attn_layers
        seen = attention_pairs(video, audio + text, frames, window if local else None)
        attention += 4 * seen * hidden
    channels = video * config.video_in_channels + audio * config.audio_in_channels
    return ForwardFlops(products, attention, 2 * hidden * (2 * channels + text * config.text_in_channels))


def attention_pairs(video: int, others: int, frames: int = 0, window: int | None = None) -> int:
    """Pairs of query and key: all, or with a window those of SPEC 1.6.

    Args:
        others: audio and text tokens together, which see all and are seen by all.
    """
    length = video + others
    if window is None or not frames:
        return length * length
    area = video // frames
    near = sum(min(frames, i + window + 1) - max(0, i - window) for i in range(frames))
    return near * area * area + video * others + others * length
