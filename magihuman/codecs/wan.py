"""The Wan 2.2 video VAE through diffusers, for files in the original layout too (SPEC 6).

    codec = WanCodec.load("Wan2.2_VAE.pth", device="cuda")
    latents = codec.encode(frames)        # [B,3,4k+1,H,W] in [-1,1] -> [B,48,k+1,H/16,W/16]

Latents are the posterior mean, normalised per channel: `(mu - mean) * (1 / std)`. The network is diffusers'; statistics,
key map and decoding loop are ours (diffusers clamps, and returns a clip only when all of it is decoded).
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from magihuman.errors import UserError
from magihuman.io.released_files import diffusers_config, load_strict, locate, read_state, require_fit

# `AutoencoderKLWan` is written as Any: its module is imported where a codec is built, and has no types.
REPO = "Wan-AI/Wan2.2-TI2V-5B"
FILES = (
    "Wan2.2_VAE.pth",
    "Wan2.2_VAE.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors",
)

# Published constants of the release, one per latent channel (SPEC 6).
LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


class WanCodec(nn.Module):
    """Frames [B,3,F,H,W] <-> normalised latents [B,C,T,h,w]; F = 4(T-1)+1, H = 16h, W = 16w in the release.

    Implements `magihuman.codecs.protocols.VideoCodec`.

    Args:
        vae: an `AutoencoderKLWan` in the compute dtype.
        mean, std: [C] latent statistics.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, vae: Any, mean: torch.Tensor | None = None, std: torch.Tensor | None = None) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.channels: int = vae.config.z_dim
        space = 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)
        self.stride: tuple[int, int, int] = (2 ** sum(vae.config.temperal_downsample), space, space)
        # The release rounds the statistics to the network's dtype before 1/std is taken.
        add_statistics(self, mean, std, vae.dtype)

    @classmethod
    def load(
        cls, source: str | Path = REPO, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> "WanCodec":
        """Load from `Wan2.2_VAE.pth`, the same as safetensors, a diffusers folder, or a cached Hub id.

        Args:
            dtype: bf16 is the release's choice; fp32 doubles memory (2.8 GB) and is exact.

        Raises:
            UserError: missing (with the command that fetches it), damaged, or not a Wan 2.2 VAE.
        """
        path = locate(source, FILES, REPO)
        state = read_state(path)
        if "quant_conv.weight" in state:
            config = diffusers_config(path, "AutoencoderKLWan")
            if not config.get("is_residual"):
                raise UserError(f"{path} is the VAE of another Wan than 2.2; use that of {REPO}")
            vae = _build(config)
            load_strict(vae, state, None, path, dtype)
            mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
            return cls(vae, mean, std).to(device)
        return cls.from_released(state, path, dtype=dtype).to(device)

    @classmethod
    def from_released(
        cls,
        state: Mapping[str, torch.Tensor],
        source: str | Path,
        mean: torch.Tensor | None = None,
        std: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "WanCodec":
        """Build from a state dict in the names of the original file; widths are read off its shapes.

        Args:
            mean, std: [C] statistics; those of the release by default (C = 48).

        Raises:
            UserError: naming missing, unexpected and wrong-shaped tensors.
        """
        vae = _build(released_config(state, source))
        load_strict(vae, state, key_map(vae), source, dtype)
        return cls(vae, mean, std)

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """[B,3,F,H,W] in [-1,1] -> [B,C,T,h,w] fp32, the normalised posterior mean.

        Raises:
            ValueError: F is not 4k+1, or H, W are not multiples of the spatial stride.
        """
        step, space, _ = self.stride
        if frames.shape[2] % step != 1 or frames.shape[3] % space or frames.shape[4] % space:
            raise ValueError(f"frames {list(frames.shape)}: their number must be {step}k+1, sizes multiples of {space}")
        moments = self.vae.encode(frames.to(self.mean.device, self.mean.dtype)).latent_dist
        return ((moments.mode() - self.mean) * (1.0 / self.std)).float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B,C,T,h,w] normalised -> [B,3,4(T-1)+1,H,W] fp32, not clamped."""
        return torch.cat(list(self.decode_stream(latents)), dim=2)

    @torch.no_grad()
    def decode_stream(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Decode latent frame by latent frame: yields [B,3,1,H,W], then [B,3,4,H,W] each; fp32, not clamped.

        Memory does not depend on the length of the clip.
        """
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify

        z = latents.to(self.mean.device, self.mean.dtype)
        z = self.vae.post_quant_conv(z / (1.0 / self.std) + self.mean)
        convolutions = sum(isinstance(module, WanCausalConv3d) for module in self.vae.decoder.modules())
        past: list[Any] = [None] * convolutions
        for t in range(z.shape[2]):
            frames = self.vae.decoder(z[:, :, t : t + 1], feat_cache=past, feat_idx=[0], first_chunk=t == 0)
            yield unpatchify(frames, self.vae.config.patch_size or 1).float()


def add_statistics(codec: Any, mean: torch.Tensor | None, std: torch.Tensor | None, dtype: torch.dtype) -> None:
    """Register the buffers `mean` and `std` [1,C,1,1,1] of a codec's latents.

    Args:
        mean, std: [C]; those of the release by default.

    Raises:
        UserError: another number than the codec's channels.
    """
    for name, given, published in (("mean", mean, LATENT_MEAN), ("std", std, LATENT_STD)):
        values = torch.tensor(published) if given is None else given
        if values.shape != (codec.channels,):
            raise UserError(f"this codec has {codec.channels} latent channels, but {name} has {len(values)} values")
        codec.register_buffer(name, values.to(dtype).view(1, -1, 1, 1, 1), persistent=False)


def released_config(state: Mapping[str, torch.Tensor], source: str | Path) -> dict[str, Any]:
    """Arguments of `AutoencoderKLWan` from the shapes of a Wan 2.2 state dict (SPEC 6).

    Raises:
        UserError: a tensor that is needed for this is missing.
    """

    def shape(key: str) -> torch.Size:
        if key not in state:
            raise UserError(f"{source} is not a Wan 2.2 VAE: it lacks {key}; use {FILES[0]} of {REPO}")
        return state[key].shape

    def block(level: int, index: int) -> str:
        return f"encoder.downsamples.{level}.downsamples.{index}.residual.2.weight"

    width, pixels = shape("encoder.conv1.weight")[:2]
    levels = 0
    while block(levels, 0) in state:
        levels += 1
    shape(block(0, 0))
    blocks = 0
    while block(0, blocks) in state:
        blocks += 1
    multipliers = [shape(block(level, 0))[0] // width for level in range(levels)]
    patch = round((pixels / 3) ** 0.5)
    return {
        "base_dim": width,
        "decoder_base_dim": shape("decoder.head.2.weight")[1] // multipliers[0],
        "z_dim": shape("conv2.weight")[0],
        "dim_mult": multipliers,
        "num_res_blocks": blocks,
        "temperal_downsample": [
            f"encoder.downsamples.{level}.downsamples.{blocks}.time_conv.weight" in state for level in range(levels - 1)
        ],
        "is_residual": True,
        "in_channels": pixels,
        "out_channels": pixels,
        "patch_size": patch,
        "scale_factor_spatial": patch * 2 ** (levels - 1),
    }


def key_map(vae: Any) -> dict[str, str]:
    """Names in the original file -> names in diffusers, for every tensor of `vae` (SPEC 6, table)."""
    return {_released_name(key, vae.config.num_res_blocks): key for key in vae.state_dict()}


def to_diffusers(
    shapes: Mapping[str, tuple[int, ...]], source: str | Path
) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]]:
    """Names and shapes in diffusers of the tensors of an original file.

    Returns:
        config.json of the diffusers folder, and: name in the file -> (name, shape) in diffusers.

    Raises:
        UserError: naming missing, unexpected and wrong-shaped tensors.
    """
    vae = _build(released_config({k: torch.empty(v, device="meta") for k, v in shapes.items()}, source))
    inner = {key: tuple(value.shape) for key, value in vae.state_dict().items()}
    names = {name: (key, inner[key]) for name, key in key_map(vae).items()}
    require_fit(shapes, {name: shape for name, (_, shape) in names.items()}, source)
    vae.register_to_config(latents_mean=list(LATENT_MEAN), latents_std=list(LATENT_STD))
    return json.loads(vae.to_json_string()), names


_IN_BLOCK = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_AROUND = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}


def _released_name(key: str, blocks: int) -> str:
    """One diffusers name -> the original's. `blocks`: residual blocks per encoder level."""
    top, _, rest = key.partition(".")
    if top in ("quant_conv", "post_quant_conv"):
        return f"{'conv1' if top == 'quant_conv' else 'conv2'}.{rest}"
    part, _, leaf = rest.partition(".")
    if part in _AROUND:
        return f"{top}.{_AROUND[part]}.{leaf}"
    if found := re.fullmatch(r"mid_block\.resnets\.(\d+)\.(\w+)\.(\w+)", rest):
        index, layer, leaf = found.groups()
        return f"{top}.middle.{2 * int(index)}.{_IN_BLOCK[layer]}.{leaf}"
    if found := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", rest):
        return f"{top}.middle.1.{found[1]}"
    # A level is one list in the original: its residual blocks, then its resampler.
    level = r"(down|up)_blocks\.(\d+)\."
    if found := re.fullmatch(level + r"resnets\.(\d+)\.(\w+)\.(\w+)", rest):
        way, number, index, layer, leaf = found.groups()
        return f"{top}.{way}samples.{number}.{way}samples.{index}.{_IN_BLOCK[layer]}.{leaf}"
    if found := re.fullmatch(level + r"(?:down|up)sampler\.(.+)", rest):
        way, number, leaf = found.groups()
        last = blocks if way == "down" else blocks + 1
        return f"{top}.{way}samples.{number}.{way}samples.{last}.{leaf}"
    raise KeyError(f"no name in the original file for {key}")


def _build(config: Mapping[str, Any]) -> Any:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        return AutoencoderKLWan.from_config({key: value for key, value in config.items() if not key.startswith("_")})
