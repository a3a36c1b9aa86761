"""Protocols of video codecs, audio codecs and text encoders.

Shapes (symbols as in `magihuman.models.tokens`): frames [B,3,F,H,W] fp32 in [-1,1]; video latents [B,C,T,h,w];
waveforms [B,channels,N] fp32 in [-1,1]; audio latents [B,A,Ca], one per pixel frame; text features [S,Ct].
"""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # plans and bounds read facts of bundles without torch
    import torch


class VideoCodec(Protocol):
    """Frames to latents and back; F = stride_t * (T - 1) + 1."""

    channels: int
    stride: tuple[int, int, int]

    def encode(self, frames: "torch.Tensor") -> "torch.Tensor":
        """[B,3,F,H,W] in [-1,1] -> [B,C,T,h,w] fp32, normalised."""
        ...

    def decode(self, latents: "torch.Tensor") -> "torch.Tensor":
        """[B,C,T,h,w] -> [B,3,F,H,W] fp32, about [-1,1] (not clamped)."""
        ...


class AudioCodec(Protocol):
    """Waveforms to latents and back; N = hop * A."""

    channels: int
    sample_rate: int
    hop: int
    waveform_channels: int

    def encode(self, waveform: "torch.Tensor") -> "torch.Tensor":
        """[B,waveform_channels,N] -> [B,A,Ca] fp32."""
        ...

    def decode(self, latents: "torch.Tensor") -> "torch.Tensor":
        """[B,A,Ca] -> [B,waveform_channels,N] fp32."""
        ...


class TextEncoder(Protocol):
    """Prompts to features of their own length."""

    channels: int

    def encode(self, prompts: list[str]) -> "list[torch.Tensor]":
        """Each prompt -> [S,Ct] fp32, S >= 1."""
        ...
