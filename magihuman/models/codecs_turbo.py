"""The released Turbo-VAED decoder as a codec: its files and its sliding windows (SPEC 8.3 and 8.4).

The network is not causal, so what a window yields depends on where the window ends: the schedule of windows is
part of the decoder.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from magihuman.errors import UserError
from magihuman.models.codecs_wan import LATENT_MEAN, LATENT_STD
from magihuman.models.released_files import load_strict, locate, read_json, read_state
from magihuman.models.turbo_decoder import TurboConfig, TurboDecoder

REPO = "GAIR/daVinci-MagiHuman"
FILES = (
    "turbo_vae/checkpoint-340000.ckpt",
    "checkpoint-340000.ckpt",
    "turbo_vae/model.safetensors",
    "model.safetensors",
)
CONFIG_FILES = ("TurboV3-Wan22-TinyShallow_7_7.json", "config.json")
AVERAGED = "ema_state_dict"  # where the checkpoint keeps the weights to use, beside the last ones
ALIGNMENT_HEADS = "aligned_feature_projection_heads."  # of the distillation; the decoder does not use them


@dataclass(frozen=True)
class Window:
    """Latents [start, stop) to decode at once, and how many of the frames are dropped at either end.

    Only the first window of a clip drops nothing at its head.
    """

    start: int
    stop: int
    head: int
    tail: int


def windows(length: int, first: int, step: int, rate: int = 4) -> list[Window]:
    """The release's schedule (SPEC 8.3): one latent of context on each side, kept frames adjoin.

    Args:
        length: T. The last latent is to be repeated up to the last window's `stop`.
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
    """Normalised latents [B,C,T,h,w] -> frames, window by window: decoding as in `codecs.VideoCodec`.

    Its state dict has the released names. It cannot encode: pictures are encoded by the teacher (`WanCodec`).

    Args:
        decoder: in the dtype in which it shall compute; its gradients are turned off.
        mean, std: C latent statistics each; those of the release by default. They stay fp32 (SPEC 8.3).
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
        self.decoder = decoder.eval().requires_grad_(False)
        self.config = config
        self.channels = config.latent_channels
        space, time = config.spatial_compression_ratio, config.temporal_compression_ratio
        self.stride: tuple[int, int, int] = (time, space, space)
        mean = torch.tensor(LATENT_MEAN) if mean is None else mean
        std = torch.tensor(LATENT_STD) if std is None else std
        for name, values in (("means", mean), ("standard deviations", std)):
            if values.shape != (self.channels,):
                raise UserError(f"the Turbo decoder has {self.channels} channels, but {len(values)} {name}")
        self.register_buffer("mean", mean.float().view(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("std", std.float().view(1, -1, 1, 1, 1), persistent=False)

    @classmethod
    def load(
        cls,
        source: str | Path = REPO,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> "TurboCodec":
        """Load the released checkpoint, or the same as safetensors, with its JSON beside it.

        Args:
            source: the file, its folder, the folder of the whole release, or a Hub id that is cached.
            dtype: bf16 is the release's choice (SPEC 4.5).

        Raises:
            UserError: absent (with the command that fetches it), damaged, or not this decoder.
        """
        path = locate(source, FILES, REPO)
        beside = [path.with_name(name) for name in CONFIG_FILES]
        settings = next((file for file in beside if file.is_file()), beside[0])
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
        """Build from a state dict in the names of the checkpoint; the distillation's heads are left out.

        Raises:
            UserError: naming missing, unexpected and wrong-shaped tensors.
        """
        with torch.device("meta"):
            decoder = TurboDecoder(config)
        names = {f"decoder.{key}": key for key in decoder.state_dict()}
        load_strict(decoder, decoder_tensors(state), names, source, dtype)
        return cls(decoder, config, mean, std)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B,C,T,h,w] normalised -> [B,3,4(T-1)+1,H,W] fp32, about [-1,1], not clamped."""
        return torch.cat(list(self.decode_stream(latents)), dim=2)

    @torch.no_grad()
    def decode_stream(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Decode window by window: yields [B,3,n,H,W] fp32, not clamped; concatenated, they are `decode`.

        In the release n is 25, then 28 each, less at the end. Memory does not grow with the length of the clip.

        Raises:
            ValueError: latents are not [B,C,T,h,w] with the decoder's C and T >= 1.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels or not latents.shape[2]:
            raise ValueError(
                f"latents {list(latents.shape)}: the Turbo decoder takes [B,{self.channels},T,h,w]"
            )
        config = self.config
        plan = windows(latents.shape[2], config.first_chunk_size, config.step_size, self.stride[0])
        for window in plan:
            # Beyond the end the last latent is repeated.
            index = torch.arange(window.start, window.stop).clamp(max=latents.shape[2] - 1)
            z = self.denormalise(latents[:, :, index.to(latents.device)])
            frames = self.decoder(z, first=not window.head)
            yield frames[:, :, window.head : frames.shape[2] - window.tail].float()

    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the network takes them: its dtype and device, the statistics applied in fp32."""
        dtype = self.decoder.conv_in.conv.weight.dtype
        return denormalise(latents.to(self.mean.device, dtype), self.mean, self.std)


def denormalise(latents: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Latents in the network's dtype with their statistics, [1,C,1,1,1] fp32, undone in fp32 (SPEC 8.3)."""
    return (latents / (1.0 / std) + mean).to(latents.dtype)


def decoder_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors in the names `decoder.*`: without `module.`, without the distillation's heads.

    A state dict of the bare decoder (no name starts with `decoder.` or `encoder.`) gets the prefix (SPEC 8.4).
    """
    named = {key.removeprefix("module."): value for key, value in state.items()}
    named = {key: value for key, value in named.items() if not key.startswith(ALIGNMENT_HEADS)}
    if not any(key.startswith(("decoder.", "encoder.")) for key in named):
        return {f"decoder.{key}": value for key, value in named.items()}
    return named
