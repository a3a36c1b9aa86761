"""What every codec and text encoder offers, and the latent contract that ties a model to them.

Shapes (symbols as in `magihuman.tokens`): frames [B,3,F,H,W] fp32 in [-1,1]; video latents [B,C,T,h,w];
waveforms [B,channels,N] fp32 in [-1,1]; audio latents [B,A,Ca], one per pixel frame; text features [S,Ct].
"""

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from magihuman.errors import UserError


@dataclass(frozen=True)
class Contract:
    """The latent contract: what a checkpoint expects of codecs, text features and rates.

    It travels with codecs, shards and checkpoints; a mismatch is an error at load, never a wrong picture.

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

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "video_stride": list(self.video_stride)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Contract":
        return cls(**{**values, "video_stride": tuple(values["video_stride"])})

    def require(self, other: "Contract", mine: str, theirs: str) -> None:
        """Raise unless both contracts are equal.

        Args:
            mine, theirs: what the two belong to, for the message ("checkpoint tiny/base", "shards runs/x").

        Raises:
            UserError: naming every field that differs.
        """
        a, b = self.to_dict(), other.to_dict()
        differing = [f"{key}: {a[key]!r} against {b[key]!r}" for key in a if a[key] != b[key]]
        if differing:
            raise UserError(
                f"{mine} and {theirs} were made for different latents ({'; '.join(differing)}); "
                "prepare the data again with the same world, or choose the checkpoint that belongs to it"
            )


class VideoCodec(Protocol):
    """Frames to latents and back; F = stride_t * (T - 1) + 1."""

    channels: int
    stride: tuple[int, int, int]

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """[B,3,F,H,W] in [-1,1] -> [B,C,T,h,w] fp32, normalised."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B,C,T,h,w] -> [B,3,F,H,W] fp32, about [-1,1] (not clamped)."""
        ...


class AudioCodec(Protocol):
    """Waveforms to latents and back; N = hop * A."""

    channels: int
    sample_rate: int
    hop: int
    waveform_channels: int

    def encode(self, waveform: torch.Tensor) -> torch.Tensor:
        """[B,waveform_channels,N] -> [B,A,Ca] fp32."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B,A,Ca] -> [B,waveform_channels,N] fp32."""
        ...


class TextEncoder(Protocol):
    """Prompts to features of their own length."""

    channels: int

    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        """Each prompt -> [S,Ct] fp32, S >= 1."""
        ...
