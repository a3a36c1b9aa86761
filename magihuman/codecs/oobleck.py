"""The Stable Audio Open VAE ("Oobleck") through diffusers, for files in the original layout too (SPEC 7, 4.7).

    codec = OobleckCodec.load("stable-audio-open-1.0")
    latents = codec.encode(waveform)      # [B,2,N] at 51.2 kHz -> [B,A,64]

The VAE was trained for 44.1 kHz; the model uses it at 25 latents per second x hop 2048 = 51.2 kHz, so that one audio
latent belongs to one video frame. `magihuman.media.images.to_playback_rate` undoes this for playback.
"""

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from magihuman.errors import UserError
from magihuman.io.released_files import diffusers_config, load_strict, locate, read_json, read_state, require_fit
from magihuman.schema import check_limits

# `AutoencoderOobleck` is written as Any: its module is imported where a codec is built, and has no types.
REPO = "stabilityai/stable-audio-open-1.0"
FILES = (
    "model.safetensors",
    "audio_vae/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors",
)
PREFIX = "pretransform.model."
LATENTS_PER_SECOND = 25
WINDOW_LATENTS = 725  # 29 s at 25 latents a second
OVERLAP = 0.5  # share of a window that the next one overlaps, in the release


class OobleckCodec(nn.Module):
    """Waveforms [B,2,N] <-> latents [B,A,Ca], N = hop * A; always fp32, as the release keeps it.

    Implements `magihuman.codecs.protocols.AudioCodec`. `sample_rate` is the model's time base, 25 * hop
    (51,200 Hz in the release).
    """

    samples_bottleneck = True
    """`encode` takes a generator; inference passes one, so that latents are samples (SPEC 4.2)."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.channels: int = vae.config.decoder_input_channels
        self.hop: int = math.prod(vae.config.downsampling_ratios)
        self.sample_rate: int = LATENTS_PER_SECOND * self.hop
        self.waveform_channels: int = vae.config.audio_channels

    @classmethod
    def load(cls, source: str | Path = REPO, device: str | torch.device = "cpu") -> "OobleckCodec":
        """Load from a folder of Stable Audio Open (`model.safetensors` and `model_config.json`), that file, a
        diffusers folder, or a cached Hub id.

        Raises:
            UserError: missing (with the command that fetches it), damaged, or another network.
        """
        path = locate(source, FILES, REPO)
        if path.with_name("model_config.json").is_file() or path.name == FILES[0]:
            return cls.from_released(read_state(path, PREFIX), autoencoder_config(path), path).to(device)
        vae = _build(diffusers_config(path, "AutoencoderOobleck"))
        load_strict(vae, read_state(path), None, path, torch.float32)
        return cls(vae).to(device)

    @classmethod
    def from_released(
        cls, state: Mapping[str, torch.Tensor], autoencoder: Mapping[str, Any], source: str | Path
    ) -> "OobleckCodec":
        """Build from a state dict in stable-audio-tools' names.

        Args:
            autoencoder: the part of `model_config.json` with the keys encoder, decoder, bottleneck.

        Raises:
            UserError: a setting that this network does not have, or tensors that do not fit.
        """
        vae = _build(released_config(autoencoder, source))
        # Snake parameters are [C] in the file and [1,C,1] in diffusers.
        shaped = {
            key: value.view(1, -1, 1) if key.endswith((".alpha", ".beta")) and value.dim() == 1 else value
            for key, value in state.items()
        }
        load_strict(vae, shaped, key_map(vae), source, torch.float32)
        return cls(vae)

    def _moments(self, waveform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B,channels,N] -> mean and standard deviation, [B,Ca,A] each."""
        mean, scale = self.vae.encoder(waveform).chunk(2, dim=1)
        return mean, F.softplus(scale) + 1e-4

    @torch.no_grad()
    def encode(
        self,
        waveform: torch.Tensor,
        generator: torch.Generator | None = None,
        noise: Sequence[torch.Tensor] | None = None,
        overlap: float = OVERLAP,
    ) -> torch.Tensor:
        """[B,channels,N] (or [B,1,N], which is copied to both channels) at `sample_rate` -> [B,A,Ca] fp32.

        The mean of the bottleneck, or a sample of it with `generator` or `noise`, as the release takes for a given
        waveform (SPEC 4.2, 4.7). Up to 29 s give floor(N / hop) latents in one piece; longer waveforms are encoded
        in cross-faded windows and give ceil(N / hop).

        Args:
            generator: source of one Gaussian [B,Ca,A] per window, drawn on its own device.
            noise: the Gaussians themselves, one [B,A,Ca] per window.
            overlap: share of a window that the next one overlaps, 0 <= overlap < 1.

        Raises:
            ValueError: N is shorter than one latent, wrong channels, or not one noise per window.
        """
        parameter = next(self.vae.parameters())
        waveform = waveform.to(parameter.device, parameter.dtype)
        if waveform.shape[1] == 1:
            waveform = waveform.expand(-1, self.waveform_channels, -1)
        if waveform.shape[1] != self.waveform_channels or waveform.shape[-1] < self.hop:
            raise ValueError(
                f"waveform {list(waveform.shape)}: needs 1 or {self.waveform_channels} channels and at least "
                f"{self.hop} samples"
            )
        windows = split_windows(waveform, WINDOW_LATENTS * self.hop, overlap)
        if noise is not None and len(noise) != len(windows):
            raise ValueError(f"{len(noise)} noise tensors for {len(windows)} windows of audio")
        blocks = []
        for index, window in enumerate(windows):
            latents, std = self._moments(window)  # [B,Ca,A]
            if noise is not None:
                latents = latents + std * noise[index].to(std).transpose(1, 2)
            elif generator is not None:
                drawn = torch.randn(std.shape, generator=generator, device=generator.device)
                latents = latents + std * drawn.to(std)
            blocks.append(latents.transpose(1, 2))
        if len(blocks) == 1:
            return blocks[0].contiguous()
        return cross_fade(blocks, overlap)[:, : math.ceil(waveform.shape[-1] / self.hop)].contiguous()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B,A,Ca] -> [B,channels,hop*A] fp32 at `sample_rate`, not clamped."""
        parameter = next(self.vae.parameters())
        return self.vae.decoder(latents.transpose(1, 2).to(parameter.device, parameter.dtype))


def split_windows(waveform: torch.Tensor, window: int, overlap: float = OVERLAP) -> list[torch.Tensor]:
    """Cut [B,channels,N] into windows of `window` samples that overlap by a share; the last one is zero-padded.

    A waveform that fits into one window is returned unpadded.
    """
    samples, step = waveform.shape[-1], window - math.ceil(window * overlap)
    if samples <= window:
        return [waveform]
    padded = F.pad(waveform, (0, -(samples - window) % step))
    return [piece.contiguous() for piece in padded.unfold(-1, window, step).unbind(-2)]


def cross_fade(blocks: list[torch.Tensor], overlap: float = OVERLAP) -> torch.Tensor:
    """Merge equally long latent blocks [B,A,Ca] into one [B, A + (n-1)(A - shared), Ca], shared = floor(A overlap).

    At offset k of the shared latents the later block weighs k/shared. With odd A and an overlap of a half the blocks
    advance half a latent more than the audio (oddity O13), as in the release.
    """
    merged = blocks[0]
    shared = int(merged.shape[1] * overlap)
    # Weights in double precision, then rounded: the release scales by Python numbers. [1,shared,1]
    rising = (torch.arange(shared, dtype=torch.float64) / max(shared, 1)).view(1, -1, 1)
    weight_old, weight_new = (1 - rising).to(merged), rising.to(merged)
    for block in blocks[1:]:
        kept, tail = merged[:, : merged.shape[1] - shared], merged[:, merged.shape[1] - shared :]
        mixed = tail * weight_old + block[:, :shared] * weight_new
        merged = torch.cat([kept, mixed, block[:, shared:]], dim=1)
    return merged


def autoencoder_config(path: Path) -> dict[str, Any]:
    """The autoencoder's part of `model_config.json` in the folder of a Stable Audio checkpoint.

    Raises:
        UserError: missing, not JSON, or without that part.
    """
    config = read_json(path.with_name("model_config.json"), "the shape of the audio VAE")
    try:
        found = config["model"]["pretransform"]["config"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"model_config.json beside {path} has no model.pretransform.config; use that of {REPO}"
        ) from error
    check_limits(found, "model_config.json")
    return found


def released_config(autoencoder: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    """Arguments of `AutoencoderOobleck` from a stable-audio-tools autoencoder configuration.

    Raises:
        UserError: a setting is missing or not supported.
    """
    try:
        encoder, decoder = autoencoder["encoder"]["config"], autoencoder["decoder"]["config"]
        facts = {
            "encoder.type is oobleck": autoencoder["encoder"]["type"] == "oobleck",
            "decoder.type is oobleck": autoencoder["decoder"]["type"] == "oobleck",
            "bottleneck.type is vae": autoencoder["bottleneck"]["type"] == "vae",
            "use_snake is true": encoder["use_snake"] and decoder["use_snake"],
            "final_tanh is false": not decoder["final_tanh"],
            "encoder latent_dim equals its channels": encoder["latent_dim"] == encoder["channels"],
            "encoder latent_dim is twice the decoder's": encoder["latent_dim"] == 2 * decoder["latent_dim"],
            "c_mults agree": list(encoder["c_mults"]) == list(decoder["c_mults"]),
            "strides agree": list(encoder["strides"]) == list(decoder["strides"]),
            "as many channels come out as go in": encoder["in_channels"] == decoder["out_channels"],
        }
        arguments = {
            "encoder_hidden_size": encoder["channels"],
            "downsampling_ratios": list(encoder["strides"]),
            "channel_multiples": list(encoder["c_mults"]),
            "decoder_channels": decoder["channels"],
            "decoder_input_channels": decoder["latent_dim"],
            "audio_channels": encoder["in_channels"],
            "sampling_rate": 44100,
        }
    except (KeyError, TypeError) as error:
        raise UserError(f"the audio VAE's configuration of {source} lacks {error}; use that of {REPO}") from error
    broken = [fact for fact, holds in facts.items() if not holds]
    if broken:
        raise UserError(f"the audio VAE of {source} is another network; it should hold that {'; '.join(broken)}")
    return arguments


def key_map(vae: Any) -> dict[str, str]:
    """Names in the original file (no prefix) -> names in diffusers, for every tensor of `vae` (SPEC 7)."""
    return {_released_name(key, len(vae.config.downsampling_ratios)): key for key in vae.state_dict()}


def to_diffusers(
    shapes: Mapping[str, tuple[int, ...]], autoencoder: Mapping[str, Any], source: str | Path
) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]]:
    """Names and shapes in diffusers of the tensors of an original file; snake parameters get two more axes.

    Args:
        shapes: by their names without the prefix; autoencoder: as in `OobleckCodec.from_released`.

    Returns:
        config.json of the diffusers folder, and: name in the file -> (name, shape) in diffusers.

    Raises:
        UserError: naming missing, unexpected and wrong-shaped tensors.
    """
    vae = _build(released_config(autoencoder, source))
    inner = {key: tuple(value.shape) for key, value in vae.state_dict().items()}
    names = {name: (key, inner[key]) for name, key in key_map(vae).items()}
    snakes = (".alpha", ".beta")
    expected = {n: (math.prod(shape),) if n.endswith(snakes) else shape for n, (_, shape) in names.items()}
    require_fit(shapes, expected, source)
    return json.loads(vae.to_json_string()), names


_UNIT = {"snake1": 0, "conv1": 1, "snake2": 2, "conv2": 3}
_ENCODER_BLOCK = {"res_unit1": 0, "res_unit2": 1, "res_unit3": 2, "snake1": 3, "conv1": 4}
_DECODER_BLOCK = {"snake1": 0, "conv_t1": 1, "res_unit1": 2, "res_unit2": 3, "res_unit3": 4}


def _released_name(key: str, levels: int) -> str:
    """One diffusers name -> the original's, which numbers every layer of a sequence."""
    side, _, rest = key.partition(".")
    outer = {"conv1": 0, "snake1": levels + 1, "conv2": levels + 2}
    found = re.fullmatch(r"block\.(\d+)\.(\w+)(?:\.(\w+))?\.(\w+)", rest)
    if found is None:
        layer, _, leaf = rest.partition(".")
        return f"{side}.layers.{outer[layer]}.{leaf}"
    number, part, unit, leaf = found.groups()
    position = (_ENCODER_BLOCK if side == "encoder" else _DECODER_BLOCK)[part]
    inner = f".layers.{_UNIT[unit]}" if unit else ""
    return f"{side}.layers.{int(number) + 1}.layers.{position}{inner}.{leaf}"


def _build(config: Mapping[str, Any]) -> Any:
    from diffusers import AutoencoderOobleck

    # diffusers keeps torch's old weight norm, because the published files are written in it.
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)
        return AutoencoderOobleck.from_config({key: value for key, value in config.items() if not key.startswith("_")})
