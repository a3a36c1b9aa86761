"""The Turbo-VAED decoder of the release: network, sliding windows over a clip, checkpoint (SPEC 8).

    codec = TurboCodec.load("weights/turbo_vae")     # or a cached Hub id
    frames = codec.decode(latents)                   # [B,48,T,h,w] normalised -> [B,3,4(T-1)+1,16h,16w]

A light student of the Wan 2.2 decoder: convolutions only, norms without parameters, names and shapes of the release. It
is not causal (oddity O15): every convolution repeats the first and last frame of its input, so the output depends on
where a window ends, and the schedule of windows is part of the decoder.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from magihuman.codecs.wan import add_statistics
from magihuman.errors import UserError
from magihuman.io.released_files import load_strict, locate, read_json, read_state
from magihuman.schema import check_limits

REPO = "GAIR/daVinci-MagiHuman"
FILES = (
    "turbo_vae/checkpoint-340000.ckpt",
    "checkpoint-340000.ckpt",
    "turbo_vae/model.safetensors",
    "model.safetensors",
)
CONFIG_FILES = ("TurboV3-Wan22-TinyShallow_7_7.json", "config.json")
AVERAGED = "ema_state_dict"  # key of the EMA weights, which are the ones to use
ALIGNMENT_HEADS = "aligned_feature_projection_heads."  # left over from its training

NORM_EPS = 1e-8  # in front of a shortcut the configured one is used instead
PATCH = 2
_IGNORED_SETTINGS = ("_", "aligned_", "in_channels", "scaling_factor")


@dataclass(frozen=True)
class UpStage:
    """One up block: widths in and out, number of residual blocks, kind of upsampling."""

    channels_in: int
    channels_out: int
    blocks: int
    upsample: Literal["none", "space", "space_time"]
    depthwise: bool


@dataclass(frozen=True)
class TurboConfig:
    """The release's JSON, in its names and its order (SPEC 8.1).

    All five `decoder_*` lists run from pixels to latents; `stages` has them reversed.

    Raises:
        UserError: a setting that the released decoder does not have, or lists that do not fit each other.
    """

    latent_channels: int
    decoder_block_out_channels: tuple[int, ...]
    decoder_layers_per_block: tuple[int, ...]
    decoder_spatio_temporal_scaling: tuple[bool, ...]
    decoder_spatio_only: tuple[bool, ...]
    decoder_is_dw_conv: tuple[bool, ...]
    first_chunk_size: int
    step_size: int
    use_unpatchify: bool
    out_channels: int = 3
    decoder_dw_kernel_size: int = 5
    patch_size: int = PATCH
    patch_size_t: int = 1
    resnet_norm_eps: float = 1e-6
    decoder_causal: bool = False
    spatial_compression_ratio: int = 16
    temporal_compression_ratio: int = 4

    def __post_init__(self) -> None:
        levels = len(self.decoder_block_out_channels)
        lengths = {
            "decoder_block_out_channels": max(levels, 1),
            "decoder_layers_per_block": levels + 1,
            "decoder_spatio_temporal_scaling": levels,
            "decoder_spatio_only": levels,
            "decoder_is_dw_conv": levels + 1,
        }
        for name, length in lengths.items():
            if len(getattr(self, name)) != length:
                raise UserError(f"Turbo decoder: {name} = {list(getattr(self, name))} must have {length} entries")
        sizes = ("latent_channels", "out_channels", "first_chunk_size", "step_size")
        lists = ("decoder_block_out_channels", "decoder_layers_per_block")
        for name, value in [(n, getattr(self, n)) for n in sizes] + [(n, min(getattr(self, n))) for n in lists]:
            if value < 1:
                raise UserError(f"Turbo decoder: {name} must be at least 1, not {value}")
        if self.decoder_causal or self.patch_size != PATCH or self.patch_size_t != 1:
            raise UserError(
                "Turbo decoder: only decoder_causal false, patch_size 2 and patch_size_t 1 exist, not "
                f"{self.decoder_causal}, {self.patch_size} and {self.patch_size_t}"
            )
        if self.decoder_dw_kernel_size % 2 == 0:
            raise UserError(f"Turbo decoder: decoder_dw_kernel_size {self.decoder_dw_kernel_size} must be odd")
        if not self.use_unpatchify and self.decoder_block_out_channels[0] % PATCH**2:
            raise UserError(
                f"Turbo decoder: without use_unpatchify the last width must be a multiple of {PATCH**2}, not "
                f"{self.decoder_block_out_channels[0]}"
            )
        upsampling = [stage.upsample for stage in self.stages]
        space = PATCH * 2 ** (levels - upsampling.count("none"))
        time = 2 ** upsampling.count("space_time")
        if (space, time) != (self.spatial_compression_ratio, self.temporal_compression_ratio):
            raise UserError(
                f"Turbo decoder: its stages upsample by {space} in space and {time} in time, but "
                f"spatial_compression_ratio is {self.spatial_compression_ratio} and "
                f"temporal_compression_ratio {self.temporal_compression_ratio}"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TurboConfig":
        """Read the release's settings, without the leftovers of its training; warns of unknown settings.

        Raises:
            UserError: a setting is absent, of the wrong type, or not offered.
        """
        known = {field.name: field for field in fields(cls)}
        check_limits({key: value for key, value in values.items() if key in known}, "Turbo decoder")
        unknown = [key for key in values if key not in known and not key.startswith(_IGNORED_SETTINGS)]
        if unknown:
            warnings.warn(f"Turbo decoder: unknown settings are ignored: {', '.join(unknown)}", stacklevel=2)
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        try:
            return cls(**given)
        except (TypeError, AttributeError) as error:
            raise UserError(f"these are not the settings of a Turbo decoder: {error}") from error

    @property
    def stride(self) -> tuple[int, int, int]:
        """(frames, rows, columns) of pixels per latent."""
        space = self.spatial_compression_ratio
        return self.temporal_compression_ratio, space, space

    @property
    def stages(self) -> tuple[UpStage, ...]:
        """The up blocks, first to last."""
        widths = self.decoder_block_out_channels[::-1]
        kinds: list[Literal["none", "space", "space_time"]] = [
            ("space" if only else "space_time") if scaled else "none"
            for scaled, only in zip(
                self.decoder_spatio_temporal_scaling[::-1], self.decoder_spatio_only[::-1], strict=True
            )
        ]
        return tuple(
            UpStage(*parts)
            for parts in zip(
                (widths[0], *widths[:-1]),
                widths,
                self.decoder_layers_per_block[-2::-1],
                kinds,
                self.decoder_is_dw_conv[-2::-1],
                strict=True,
            )
        )


class TurboDecoder(nn.Module):
    """De-normalised latents of one window -> frames; differentiable."""

    def __init__(self, config: TurboConfig) -> None:
        super().__init__()
        stages = config.stages
        mid = stages[0].channels_in
        mid_kernel = config.decoder_dw_kernel_size if config.decoder_is_dw_conv[-1] else None
        width = stages[-1].channels_out
        self.unpatchify = config.use_unpatchify
        self.conv_in = EdgeConv3d(config.latent_channels, mid, (3, 3, 3))
        blocks = [
            ResidualBlock(mid, mid, depthwise=mid_kernel, shortcut_eps=config.resnet_norm_eps)
            for _ in range(config.decoder_layers_per_block[-1])
        ]
        self.mid_block = nn.ModuleDict({"resnets": nn.Sequential(*blocks)})
        self.up_blocks = nn.ModuleList(UpBlock(stage, config) for stage in stages)
        if self.unpatchify:
            self.conv_out = EdgeConv3d(width, config.out_channels * PATCH**2, (3, 3, 3))
        else:
            self.upsampler2d_1 = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
            self.conv_out = EdgeConv3d(width // PATCH**2, config.out_channels, (3, 3, 3))

    def forward(self, latents: torch.Tensor, first: bool) -> torch.Tensor:
        """[B,C,T,h,w] not normalised, in the network's dtype -> [B,3,F,H,W] of the same dtype, not clamped.

        Args:
            first: whether the window starts the clip: F is then 4T-3, else 4T.
        """
        x = self.mid_block["resnets"](self.conv_in(latents))
        for block in self.up_blocks:
            x = block(x, first)
        if not self.unpatchify:
            x = _per_frame(self._shuffle_up, _silu(rms_norm(x, NORM_EPS)))
        x = self.conv_out(_silu(rms_norm(x, NORM_EPS)))
        return unpatchify(x) if self.unpatchify else x

    def _shuffle_up(self, frames: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(self.upsampler2d_1["conv"](frames), PATCH)


class UpBlock(nn.Module):
    """Block with a change of width, upsampling, then residual blocks at the higher resolution."""

    def __init__(self, stage: UpStage, config: TurboConfig) -> None:
        super().__init__()
        width = stage.channels_out
        kernel = config.decoder_dw_kernel_size if stage.depthwise else None
        eps = config.resnet_norm_eps
        self.conv_in: ResidualBlock | None = None
        if stage.channels_in != width:
            self.conv_in = ResidualBlock(stage.channels_in, width, depthwise=kernel, shortcut_eps=eps)
        scaled = stage.upsample != "none"
        self.upsamplers = nn.ModuleList([Upsampler(width, stage.upsample == "space_time")] if scaled else [])
        self.resnets = nn.ModuleList(
            ResidualBlock(width, width, depthwise=kernel, shortcut_eps=eps, relu=scaled) for _ in range(stage.blocks)
        )

    def forward(self, x: torch.Tensor, first: bool) -> torch.Tensor:
        if self.conv_in is not None:
            x = self.conv_in(x)
        for upsampler in self.upsamplers:
            x = upsampler(x, first)
        for block in self.resnets:
            x = block(x)
        return x


class Upsampler(nn.Module):
    """Upsampling by two in space, and before that in time where `time` is set."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.time_conv = EdgeConv3d(channels, 2 * channels, (3, 1, 1)) if time else None

    def forward(self, x: torch.Tensor, first: bool) -> torch.Tensor:
        if self.time_conv is not None:
            # The lower half of the channels holds the even frames, the upper half the odd ones.
            pairs = self.time_conv(x).unflatten(1, (2, -1))  # [B,2,C,T,h,w]
            x = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            if first:
                x = x[:, :, 1:]
        return _per_frame(self.resample, x)


class ResidualBlock(nn.Module):
    """Residual block: (norm, activation, convolution) twice; the shortcut is a 1x1x1 convolution where widths differ.

    Args:
        depthwise: size of the depthwise kernel, or None for dense 3x3x3 convolutions.
        relu: whether the first activation is ReLU; the second is always SiLU.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, depthwise: int | None, shortcut_eps: float, relu: bool = False
    ) -> None:
        super().__init__()
        self.relu = relu
        self.shortcut_eps = shortcut_eps
        self.conv1 = _convolution(channels_in, channels_out, depthwise, 3)
        self.conv2 = _convolution(channels_out, channels_out, depthwise, 3)
        self.conv_shortcut: nn.Module | None = None
        if channels_in != channels_out:
            self.conv_shortcut = _convolution(channels_in, channels_out, depthwise and 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = rms_norm(x, NORM_EPS)
        y = self.conv1(F.relu(y, inplace=not torch.is_grad_enabled()) if self.relu else _silu(y))
        y = self.conv2(_silu(rms_norm(y, NORM_EPS)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(rms_norm(x, self.shortcut_eps))
        return x + y


class EdgeConv3d(nn.Module):
    """3-D convolution that keeps the size: zero padding in space, first and last frame repeated in time."""

    def __init__(self, channels_in: int, channels_out: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        _, rows, columns = kernel
        self.conv = nn.Conv3d(channels_in, channels_out, kernel, padding=(0, rows // 2, columns // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(_repeat_edges(x, self.conv.kernel_size[0] // 2))


class DepthwiseConv3d(nn.Module):
    """Depthwise-separable 3-D convolution, padded as `EdgeConv3d`. Not in the released file."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int) -> None:
        super().__init__()
        space = kernel // 2
        self.depthwise_conv = nn.Conv3d(channels_in, channels_in, kernel, padding=(0, space, space), groups=channels_in)
        self.pointwise_conv = nn.Conv3d(channels_in, channels_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pointwise_conv(self.depthwise_conv(_repeat_edges(x, self.depthwise_conv.kernel_size[0] // 2)))


def _convolution(channels_in: int, channels_out: int, depthwise: int | None, dense: int) -> nn.Module:
    if depthwise is None:
        return EdgeConv3d(channels_in, channels_out, (dense, dense, dense))
    return DepthwiseConv3d(channels_in, channels_out, depthwise)


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """[B,C,...] -> the same dtype, with a root mean square of 1 over C; statistics and product in fp32.

    Without gradients no fp32 copy of x is made: at 1080p it would be 9.6 GB.
    """
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(norm.square() / x.shape[1] + eps)
    if torch.is_grad_enabled():
        return (x * scale).to(x.dtype)
    return torch.mul(x, scale, out=torch.empty_like(x))


def unpatchify(x: torch.Tensor) -> torch.Tensor:
    """[B,C*4,T,H,W] -> [B,C,T,2H,2W]; columns vary slower than rows within the four (SPEC 8.2)."""
    x = x.unflatten(1, (-1, PATCH, PATCH))  # [B,C,dx,dy,T,H,W]
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def _silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU, in place without gradients: for temporaries only."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def _repeat_edges(x: torch.Tensor, count: int) -> torch.Tensor:
    if not count:
        return x
    return torch.cat([*[x[:, :, :1]] * count, x, *[x[:, :, -1:]] * count], dim=2)


def _per_frame(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply a function of images [N,C,h,w] to every frame of [B,C,T,h,w]."""
    images = function(x.transpose(1, 2).flatten(0, 1))
    return images.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


@dataclass(frozen=True)
class Window:
    """Latents [start, stop) decoded at once, and the number of frames dropped at either end (none at a clip's start)."""

    start: int
    stop: int
    head: int
    tail: int


def windows(length: int, first: int, step: int, rate: int = 4) -> list[Window]:
    """Windows of the release's schedule (SPEC 8.3): one latent of context on each side.

    Args:
        length: T. The caller repeats the last latent up to the last window's `stop`.
        first, step: latents that the first and every later window contributes.
        rate: frames per latent.
    """
    padding = first - length if length < first else (first - length) % step
    total = length + padding
    starts = [0, *range(first, total, step)]
    return [
        Window(
            max(start - 1, 0),
            min(stop + 1, total),
            head=rate if start else 0,
            tail=rate if stop < total else rate * padding,
        )
        for start, stop in zip(starts, [*starts[1:], total], strict=True)
    ]


class TurboCodec(nn.Module):
    """The decoder of a `VideoCodec` (`magihuman.codecs.protocols`), in sliding windows; encoding needs `WanCodec`.

    Its state dict has the released names.

    Args:
        decoder: in the compute dtype.
        mean, std: [C] latent statistics, fp32 (SPEC 8.3); those of the release by default.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        decoder: TurboDecoder,
        config: TurboConfig,
        mean: torch.Tensor | None = None,
        std: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.config = config
        self.channels = config.latent_channels
        self.stride = config.stride
        add_statistics(self, mean, std, torch.float32)

    @classmethod
    def load(
        cls, source: str | Path = REPO, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> "TurboCodec":
        """Load the released checkpoint, or its safetensors version, with its JSON in the same folder.

        Args:
            source: the file, its folder, the folder of the whole release, or a Hub id that is cached.
            dtype: bf16 is the release's choice (SPEC 4.5).

        Raises:
            UserError: missing (with the command that fetches it), damaged, or another network.
        """
        path = locate(source, FILES, REPO)
        candidates = [path.with_name(name) for name in CONFIG_FILES]
        settings = next((file for file in candidates if file.is_file()), candidates[0])
        config = TurboConfig.from_json(read_json(settings, "the settings of the Turbo decoder"))
        state = read_state(path, wrappers=(AVERAGED,))
        return cls.from_released(state, config, path, dtype=dtype).to(device)

    @classmethod
    def from_released(
        cls,
        state: Mapping[str, torch.Tensor],
        config: TurboConfig,
        source: str | Path,
        mean: torch.Tensor | None = None,
        std: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "TurboCodec":
        """Build from a state dict in the names of the checkpoint, without its alignment heads; for inference alone.

        Raises:
            UserError: naming missing, unexpected and wrong-shaped tensors.
        """
        with torch.device("meta"):
            decoder = TurboDecoder(config)
        names = {f"decoder.{key}": key for key in decoder.state_dict()}
        load_strict(decoder, decoder_tensors(state), names, source, dtype)
        return cls(decoder.eval().requires_grad_(False), config, mean, std)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """A whole clip in one window, with gradients, for training; `decode` is for long clips."""
        return self.decoder(self.denormalise(latents), first=True)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B,C,T,h,w] normalised -> [B,3,4(T-1)+1,H,W] fp32, about [-1,1], not clamped."""
        return torch.cat(list(self.decode_stream(latents)), dim=2)

    @torch.no_grad()
    def decode_stream(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Decode window by window: yields [B,3,n,H,W] fp32, not clamped; concatenated, they are `decode`.

        In the release n is 25, then 28, fewer at the end. Memory does not depend on the length of the clip.

        Raises:
            ValueError: latents are not [B,C,T,h,w] with the decoder's C and T >= 1.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels or not latents.shape[2]:
            raise ValueError(f"latents {list(latents.shape)}: the Turbo decoder takes [B,{self.channels},T,h,w]")
        config = self.config
        plan = windows(latents.shape[2], config.first_chunk_size, config.step_size, self.stride[0])
        for window in plan:
            # Beyond the end the last latent is repeated.
            index = torch.arange(window.start, window.stop).clamp(max=latents.shape[2] - 1)
            z = self.denormalise(latents[:, :, index.to(latents.device)])
            frames = self.decoder(z, first=not window.head)
            yield frames[:, :, window.head : frames.shape[2] - window.tail].float()

    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents -> the network's input, on its device and in its dtype; arithmetic in fp32 (SPEC 8.3)."""
        latents = latents.to(self.mean.device, self.decoder.conv_in.conv.weight.dtype)
        return (latents / (1.0 / self.std) + self.mean).to(latents.dtype)


def decoder_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors under `decoder.*`, without the prefix `module.` and the alignment heads.

    A state dict of the bare decoder (no name starts with `decoder.` or `encoder.`) gets the prefix (SPEC 8.4).
    """
    named = {key.removeprefix("module."): value for key, value in state.items()}
    named = {key: value for key, value in named.items() if not key.startswith(ALIGNMENT_HEADS)}
    if not any(key.startswith(("decoder.", "encoder.")) for key in named):
        return {f"decoder.{key}": value for key, value in named.items()}
    return named
