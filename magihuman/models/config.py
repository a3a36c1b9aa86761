"""Hyperparameters of network, token packing, token routing and LoRA, and the latent contract; without torch."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import prod
from typing import Any, Literal

from magihuman.errors import UserError
from magihuman.schema import PlainConfig, check_limits

EXPERTS = 3
"""Experts of a multi-modality layer: video, audio, text, stacked in this order (SPEC 1.2)."""

COORDS_STYLES = ("v1", "v2")
"""v2: base and distilled models; v1: super-resolution models (SPEC 2.1)."""

Checkpointing = Literal[False, True, "attention"]
"""Activation checkpointing of the blocks: which activations the backward pass recomputes.

    False        none: all activations are kept
    True         all of the block: only its input is kept (Chen et al. 2016, arXiv 1604.06174)
    "attention"  all but attention: the attention kernel's output and log-sum-exp are kept as well; queries, keys and
                 values are recomputed. Selective checkpointing after Korthikanti et al. 2022 (arXiv 2205.05198), who
                 recompute attention because it stored all scores; fused kernels store none.

"attention" covers the fused kernels of `scaled_dot_product_attention` and flash-attn. Other back ends
(`magihuman.models.attention`) are recomputed with the rest of the block: plain products, whose scores would have to be
kept, and FlexAttention, which is compiled separately and hides its kernel from the policy.
"""


@dataclass(frozen=True)
class DiTConfig(PlainConfig):
    """Shape of the single-stream transformer (SPEC 1.1).

    Attributes:
        num_layers: blocks.
        hidden_size: H; a multiple of head_dim.
        head_dim: D; a multiple of 8, because each of three axes takes D/8 rotary bands.
        num_query_groups: key/value heads; divides the H/D query heads.
        video_in_channels: channels of a video token (latent channels x patch area); also its output width.
        audio_in_channels, text_in_channels: widths of audio latents and text features.
        mm_layers: layers with one expert per modality.
        gelu7_layers: layers with GELU7; the others use SwiGLU7.
        post_norm_layers: layers that normalise each half's output before the residual sum.
        local_attn_layers: layers whose video tokens attend to a window of frames (SPEC 1.6).
        enable_attn_gating: one sigmoid gate per token and query head on the attention output.

    Raises:
        UserError: at construction, for values that do not fit together.
    """

    num_layers: int
    hidden_size: int
    head_dim: int
    num_query_groups: int
    video_in_channels: int
    audio_in_channels: int
    text_in_channels: int
    mm_layers: tuple[int, ...] = ()
    gelu7_layers: tuple[int, ...] = ()
    post_norm_layers: tuple[int, ...] = ()
    local_attn_layers: tuple[int, ...] = ()
    enable_attn_gating: bool = True

    def __post_init__(self) -> None:
        check_limits({field.name: getattr(self, field.name) for field in fields(self)}, "dit")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int or field.type == "int":
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise UserError(f"dit.{field.name} must be a positive whole number, not {value!r}")
            elif field.name.endswith("_layers"):
                object.__setattr__(self, field.name, self._layers(field.name, value))
        if self.hidden_size % self.head_dim:
            raise UserError(f"dit.hidden_size {self.hidden_size} is not a multiple of head_dim {self.head_dim}")
        if self.head_dim % 8:
            raise UserError(f"dit.head_dim must be a multiple of 8 (rotary bands), not {self.head_dim}")
        if self.num_heads % self.num_query_groups:
            raise UserError(
                f"dit.num_query_groups {self.num_query_groups} does not divide the {self.num_heads} query heads "
                f"(hidden_size / head_dim)"
            )

    def _layers(self, name: str, value: Any) -> tuple[int, ...]:
        try:
            layers = tuple(sorted({int(i) for i in value}))
        except (TypeError, ValueError):
            raise UserError(f"dit.{name} must be a list of layer numbers, not {value!r}") from None
        wrong = [i for i in layers if not 0 <= i < self.num_layers]
        if wrong:
            raise UserError(f"dit.{name} names layer {wrong[0]}, but the layers are 0 to {self.num_layers - 1}")
        return layers

    @property
    def num_heads(self) -> int:
        """Query heads, H/D."""
        return self.hidden_size // self.head_dim

    @property
    def qkv_width(self) -> int:
        """Rows of one expert's fused projection: queries, keys, values, gates."""
        heads = self.num_heads + 2 * self.num_query_groups
        return heads * self.head_dim + (self.num_heads if self.enable_attn_gating else 0)

    def experts(self, layer: int) -> int:
        """3 for a multi-modality layer, else 1."""
        return EXPERTS if layer in self.mm_layers else 1

    def intermediate_size(self, layer: int) -> int:
        """Width between the two MLP products: 4H with GELU7, else int(8H/3) rounded down to a multiple of 4."""
        if layer in self.gelu7_layers:
            return 4 * self.hidden_size
        return int(self.hidden_size * 4 * 2 / 3) // 4 * 4

    def up_width(self, layer: int) -> int:
        """Rows of one expert's up projection: the intermediate size, twice that with SwiGLU7."""
        return self.intermediate_size(layer) * (1 if layer in self.gelu7_layers else 2)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        """Every entry of the state dict in order: (key, shape, whether the release stores it in bf16)."""
        hidden = self.hidden_size
        for name, width in (
            ("video", self.video_in_channels),
            ("text", self.text_in_channels),
            ("audio", self.audio_in_channels),
        ):
            yield f"adapter.{name}_embedder.weight", (hidden, width), False
            yield f"adapter.{name}_embedder.bias", (hidden,), False
        yield "adapter.rope.bands", (self.head_dim // 8,), False
        for i in range(self.num_layers):
            m, layer = self.experts(i), f"block.layers.{i}"
            yield f"{layer}.attention.pre_norm.weight", (m * hidden,), False
            yield f"{layer}.attention.linear_qkv.weight", (m * self.qkv_width, hidden), True
            yield f"{layer}.attention.linear_proj.weight", (m * hidden, hidden), True
            yield f"{layer}.attention.q_norm.weight", (m * self.head_dim,), False
            yield f"{layer}.attention.k_norm.weight", (m * self.head_dim,), False
            yield f"{layer}.mlp.pre_norm.weight", (m * hidden,), False
            yield f"{layer}.mlp.up_gate_proj.weight", (m * self.up_width(i), hidden), True
            yield f"{layer}.mlp.down_proj.weight", (m * hidden, self.intermediate_size(i)), True
            if i in self.post_norm_layers:
                yield f"{layer}.attn_post_norm.weight", (m * hidden,), False
                yield f"{layer}.mlp_post_norm.weight", (m * hidden,), False
        for name, width in (("video", self.video_in_channels), ("audio", self.audio_in_channels)):
            yield f"final_norm_{name}.weight", (hidden,), False
            yield f"final_linear_{name}.weight", (width, hidden), False

    def parameter_count(self) -> int:
        """Number of parameters, without the buffer of rotary bands."""
        return sum(prod(shape) for key, shape, _ in self.tensors() if key != "adapter.rope.bands")


def local_layers(count: int) -> tuple[int, ...]:
    """Layers with local attention in the released 1080p network: all but the fourth of every four, and all of the
    last eight (SPEC 1.6)."""
    return tuple(i for i in range(count) if i % 4 != 3 or i >= count - 8)


@dataclass(frozen=True)
class PackConfig(PlainConfig):
    """Settings of token packing (SPEC 2).

    Attributes:
        patch_size: latent rows and columns per video token; one latent frame deep.
        coords_style: "v2" (base, distilled) or "v1" (super-resolution).
        frame_receptive_field: frames to each side in local layers.
        text_offset: added to text positions, v1 only.
    """

    patch_size: int = 2
    coords_style: str = "v2"
    frame_receptive_field: int = 11
    text_offset: int = 0

    def __post_init__(self) -> None:
        if self.patch_size < 1:
            raise UserError(f"pack.patch_size must be at least 1, not {self.patch_size}")
        if self.coords_style not in COORDS_STYLES:
            raise UserError(f"pack.coords_style {self.coords_style!r} is unknown; choose v1 or v2")


@dataclass(frozen=True)
class TreadConfig(PlainConfig):
    """Token routing during training: unselected tokens skip a span of layers and rejoin after it (TREAD).

    Krause et al. 2025, arXiv 2501.04765. The release carries these settings unused: rate 0.5, layers 2 to 25.

    Attributes:
        selection_rate: share of each sample's tokens, per modality, that passes through the span.
        start_layer, end_layer: first and last layer of the span, both included.
    """

    selection_rate: float = 0.5
    start_layer: int = 2
    end_layer: int = 25

    def __post_init__(self) -> None:
        if not 0 < self.selection_rate <= 1:
            raise UserError(f"tread.selection_rate must be above 0 and at most 1, not {self.selection_rate}")
        if not 0 <= self.start_layer <= self.end_layer:
            raise UserError(f"tread needs 0 <= start_layer <= end_layer, not {self.start_layer}, {self.end_layer}")


LORAS = {"full": (), "lora_fake_score": ("fake_score",), "lora": ("student", "fake_score", "average")}
"""Weight sharing of DMD-2's networks -> those that are LoRAs on the teacher's weights."""


@dataclass(frozen=True)
class LoraConfig(PlainConfig):
    """Size of a LoRA (Hu et al. 2021, arXiv 2106.09685).

    Attributes:
        rank: r of every block matrix, per expert.
        alpha: the update is alpha / r B A; None takes alpha = r.
        heads: train copies of the embedders, final norms and final linears in full; they are small compared with the
            block matrices, and a low rank would not make them smaller.

    Raises:
        UserError: at construction, for impossible values.
    """

    rank: int
    alpha: float | None = None
    heads: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise UserError(f"lora.rank must be a positive whole number, not {self.rank!r}")
        if self.alpha is not None and not self.alpha > 0:
            raise UserError(f"lora.alpha must be positive, not {self.alpha!r}; null takes the rank")

    @property
    def scale(self) -> float:
        """alpha / r."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class Contract(PlainConfig):
    """Names, shapes and rates of the latents of a checkpoint, a codec bundle or shards.

    It is stored with checkpoints and shards and compared at load, so a mismatch is an error instead of a wrong clip.

    Attributes:
        video_codec, audio_codec, text_encoder: names (with a content hash where the codec is fitted).
        video_channels: C; audio_channels: Ca; text_channels: Ct.
        video_stride: (frames per latent frame, pixels per latent row, pixels per latent column).
        fps: pixel frames per second; also the rate of audio latents.
        audio_rate: Hz of the waveform that the audio codec takes; waveform_channels: 1 or 2.
    """

    video_codec: str
    audio_codec: str
    text_encoder: str
    video_channels: int
    audio_channels: int
    text_channels: int
    video_stride: tuple[int, int, int]
    fps: float
    audio_rate: int
    waveform_channels: int

    def require(self, other: "Contract", mine: str, theirs: str) -> None:
        """Raise unless both contracts are equal.

        Args:
            mine, theirs: owners of the two contracts, for the message ("checkpoint scene/base", "shards runs/x").

        Raises:
            UserError: naming every field that differs.
        """
        if differing := self.differences(other):
            raise UserError(
                f"{mine} and {theirs} were made for different latents ({'; '.join(differing)}); "
                "prepare the data again with the same codecs, or choose the checkpoint that belongs to it"
            )
