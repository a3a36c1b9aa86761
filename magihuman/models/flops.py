"""Arithmetic of one forward pass: multiply-adds x 2 of matrix products and attention, nothing else; no torch."""

from dataclasses import dataclass

from magihuman.models.config import DiTConfig, LoraConfig, TreadConfig


@dataclass(frozen=True)
class ForwardFlops:
    """Of all samples' tokens: the blocks' products, attention (scores and values), embedders and final linears."""

    products: int
    attention: int
    ends: int

    @property
    def total(self) -> int:
        return self.products + self.attention + self.ends


def forward_flops(
    config: DiTConfig,
    video: int,
    audio: int,
    text: int,
    *,
    frames: int = 0,
    window: int | None = None,
    layers: int | None = None,
    tread: TreadConfig | None = None,
) -> ForwardFlops:
    """Of one sample. Each token runs through one expert.

    Args:
        video, audio, text: tokens of the sample.
        frames: latent frames; window: frames that a video token of a local layer sees to each side. Without a window
            all layers see everything.
        layers: only so many of the first blocks and the embedders, what a feature of the last of them takes; None is
            the whole network.
        tread: routing in training, by which a span of layers sees a share of each modality's tokens.
    """
    hidden, whole = config.hidden_size, (video, audio, text)
    products = attention = 0
    for layer in range(config.num_layers if layers is None else layers):
        video, audio, text = whole
        if tread is not None and tread.start_layer <= layer <= tread.end_layer:
            video, audio, text = (min(n, max(1, round(tread.selection_rate * n))) for n in whole)
        length = video + audio + text
        columns = config.qkv_width + hidden + config.up_width(layer) + config.intermediate_size(layer)
        products += 2 * length * hidden * columns
        local = window is not None and layer in config.local_attn_layers
        seen = attention_pairs(video, audio + text, frames, window if local else None)
        attention += 4 * seen * hidden
    video, audio, text = whole
    channels = video * config.video_in_channels + audio * config.audio_in_channels
    heads = channels if layers is None else 0
    return ForwardFlops(products, attention, 2 * hidden * (channels + text * config.text_in_channels + heads))


def adapter_flops(config: DiTConfig, lora: LoraConfig, tokens: int, *, layers: int | None = None) -> int:
    """Of the products x A' and (x A') B' that an adapter adds to every block matrix in one forward pass.

    Its embedders and final linears stand in for the base's and are counted there.

    Args:
        tokens: of the sample, each of which runs through one expert; layers: as for `forward_flops`.
    """
    hidden, sides = config.hidden_size, 0  # rows + columns of one expert's matrices
    for layer in range(config.num_layers if layers is None else layers):
        sides += (hidden + config.qkv_width) + 2 * hidden
        sides += (hidden + config.up_width(layer)) + (config.intermediate_size(layer) + hidden)
    return 2 * tokens * lora.rank * sides


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
