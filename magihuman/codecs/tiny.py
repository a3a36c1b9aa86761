"""Video and audio codec of the puppets, fitted on a CPU in minutes (`python -m data.tiny.fit_codec`).

`TinyVideoCodec` is a linear map of 4x4x4 pixel blocks plus small convolutional corrections, fitted so that its latents
can be *upsampled*: decoding trilinearly enlarged latents (x2) beats bicubic upsampling of the pixels. Super-resolution
needs this, and PCA latents do not have it. `TinyAudioCodec` is a PCA of log spectrograms with Griffin-Lim as its inverse.
"""

import torch
import torch.nn.functional as F
from torch import nn


class TinyVideoCodec(nn.Module):
    """Video codec of stride (4,4,4).

    The first frame is repeated four times, then every group of four frames becomes one latent frame, so
    F = 4 (T - 1) + 1 as in the Wan 2.2 VAE.

    Args:
        channels: latent channels C.
    """

    stride = (4, 4, 4)
    block_values = 4 * 3 * 4 * 4  # frames x RGB x rows x columns per latent position

    mean: torch.Tensor
    rotation: torch.Tensor
    scale: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        encoder_width, decoder_width = 192, 128
        self.channels = channels
        self.encode_linear = nn.Conv2d(self.block_values, channels, 1)
        self.encode_wide = nn.Conv2d(channels, encoder_width, 3, padding=1, padding_mode="replicate")
        self.encode_narrow = nn.Conv2d(encoder_width, channels, 1)
        self.decode_linear = nn.Conv2d(channels, self.block_values, 1)
        self.decode_wide = nn.Conv2d(channels, decoder_width, 5, padding=2, padding_mode="replicate")
        self.decode_middle = nn.Conv2d(decoder_width, decoder_width, 1)
        self.decode_narrow = nn.Conv2d(decoder_width, self.block_values, 1)
        for last in (self.encode_narrow, self.decode_middle, self.decode_narrow):
            nn.init.zeros_(last.weight)
            assert last.bias is not None
            nn.init.zeros_(last.bias)
        # Affine map from fitted to normalised latents; it acts on channels, so it commutes with upsampling.
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("rotation", torch.eye(channels))
        self.register_buffer("scale", torch.ones(channels))

    def blocks(self, frames: torch.Tensor) -> torch.Tensor:
        """[B,3,F,H,W] -> [B*T,192,H/4,W/4]: the pixel values of each latent position as channels."""
        count, height, width = frames.shape[2:]
        if count % 4 != 1 or height % 4 or width % 4:
            raise ValueError(f"need 4k+1 frames and sides divisible by 4, got {count} frames of {height}x{width}")
        padded = torch.cat([frames[:, :, :1].expand(-1, -1, 3, -1, -1), frames], 2)  # [B,3,4T,H,W]
        grouped = padded.unflatten(2, (-1, 4)).permute(0, 2, 3, 1, 4, 5)  # [B,T,4,3,H,W]
        return F.pixel_unshuffle(grouped.flatten(0, 1).flatten(1, 2), 4)  # [B*T,192,h,w]

    def frames(self, blocks: torch.Tensor, batch: int) -> torch.Tensor:
        """Inverse of `blocks`; the last frame of the first group is kept."""
        grouped = F.pixel_shuffle(blocks, 4).unflatten(1, (4, 3)).unflatten(0, (batch, -1))  # [B,T,4,3,H,W]
        return grouped.permute(0, 3, 1, 2, 4, 5).flatten(2, 3)[:, :, 3:]

    def encode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        """Blocks [N,192,h,w] -> fitted (not yet normalised) latents [N,C,h,w]."""
        linear = self.encode_linear(blocks)
        return linear + self.encode_narrow(F.gelu(self.encode_wide(linear)))

    def decode_blocks(self, latents: torch.Tensor) -> torch.Tensor:
        """Fitted latents [N,C,h,w] -> blocks [N,192,h,w]."""
        hidden = F.gelu(self.decode_wide(latents))
        hidden = hidden + self.decode_middle(hidden)
        return self.decode_linear(latents) + self.decode_narrow(F.gelu(hidden))

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """[B,3,F,H,W] fp32 in [-1,1] -> normalised latents [B,C,T,h,w] fp32.

        Raises:
            ValueError: F is not 4k+1 or a side is not divisible by 4.
        """
        fitted = self.encode_blocks(self.blocks(frames)).movedim(1, -1) - self.mean
        normal = (fitted @ self.rotation * self.scale).movedim(-1, 1)  # [B*T,C,h,w]
        return normal.unflatten(0, (frames.shape[0], -1)).transpose(1, 2).contiguous()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents [B,C,T,h,w] -> frames [B,3,4(T-1)+1,4h,4w] fp32, about [-1,1]."""
        normal = latents.transpose(1, 2).flatten(0, 1).movedim(1, -1)
        fitted = (normal / self.scale @ self.rotation.T + self.mean).movedim(-1, 1)
        return self.frames(self.decode_blocks(fitted), latents.shape[0])


class TinyAudioCodec(nn.Module):
    """Audio codec with 25 latents per second: PCA of four log-spectrum columns per latent, inverted by Griffin-Lim.

    Latent k covers the samples [640 k, 640 (k + 1)) at 16 kHz, that is video frame k at 25 fps.

    Args:
        channels: latent channels Ca.
        floor: magnitudes below this are silence.
    """

    sample_rate = 16000
    hop = 640
    waveform_channels = 1
    window_length = 512
    columns = 4  # spectrum columns per latent
    step = 160  # samples between columns

    mean: torch.Tensor
    basis: torch.Tensor
    scale: torch.Tensor
    window: torch.Tensor
    weight: torch.Tensor

    def __init__(self, channels: int = 64, floor: float = 0.2) -> None:
        super().__init__()
        self.channels, self.floor = channels, floor
        bins = self.window_length // 2 + 1
        self.register_buffer("mean", torch.zeros(self.columns * bins))
        self.register_buffer("basis", torch.zeros(self.columns * bins, channels))
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("window", torch.hann_window(self.window_length), persistent=False)
        # Bins are weighted by the slope of the mel scale: hearing resolves low frequencies better.
        frequency = torch.linspace(0, self.sample_rate / 2, bins)
        self.register_buffer("weight", (700 / (700 + frequency)).sqrt().repeat(self.columns), persistent=False)

    @property
    def _margin(self) -> int:
        """Padding that centres the first column half a step into the signal."""
        return (self.window_length - self.step) // 2

    def _spectrum(self, waveform: torch.Tensor) -> torch.Tensor:
        """[B,N] -> complex columns [B,257,4A]."""
        padded = F.pad(waveform, (self._margin, self._margin))
        return torch.stft(padded, self.window_length, self.step, window=self.window, center=False, return_complex=True)

    def _waveform(self, spectrum: torch.Tensor) -> torch.Tensor:
        """Least-squares inverse of `_spectrum`: complex [B,257,4A] -> [B,N]."""
        count = spectrum.shape[-1]
        length = self.window_length + self.step * (count - 1)
        pieces = torch.fft.irfft(spectrum, dim=1) * self.window[None, :, None]
        squares = self.window.square()[None, :, None].expand(1, -1, count)

        def overlap_add(columns: torch.Tensor) -> torch.Tensor:
            folded = F.fold(columns, (1, length), (1, self.window_length), stride=(1, self.step))
            return folded[:, 0, 0]

        signal = overlap_add(pieces) / overlap_add(squares).clamp_min(1e-3)
        return signal[:, self._margin : length - self._margin]

    def features(self, waveform: torch.Tensor) -> torch.Tensor:
        """Waveform [B,1,N] -> weighted log-spectrum columns [B,A,4*257]; N is cut to whole latents."""
        whole = waveform[:, 0, : waveform.shape[-1] // self.hop * self.hop]
        log = self._spectrum(whole).abs().clamp_min(self.floor).log()  # [B,257,4A]
        return log.transpose(1, 2).unflatten(1, (-1, self.columns)).flatten(2) * self.weight

    @torch.no_grad()
    def encode(self, waveform: torch.Tensor) -> torch.Tensor:
        """[B,1,N] fp32 -> [B,N//640,Ca] fp32."""
        return (self.features(waveform.float()) - self.mean) @ self.basis * self.scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, iterations: int = 40) -> torch.Tensor:
        """[B,A,Ca] -> [B,1,640 A] fp32, by accelerated Griffin-Lim (Perraudin et al. 2013).

        Args:
            iterations: phase updates; the start phase is fixed, so the result is deterministic.
        """
        log = (latents / self.scale @ self.basis.T + self.mean) / self.weight
        magnitude = log.unflatten(2, (self.columns, -1)).flatten(1, 2).transpose(1, 2).exp()
        # Magnitudes at the floor are silence.
        magnitude = (magnitude - 1.5 * self.floor).clamp_min(0)
        start = torch.Generator().manual_seed(0)
        angle = torch.rand(magnitude.shape[1:], generator=start).to(magnitude.device)
        phase = torch.polar(torch.ones_like(magnitude), 2 * torch.pi * angle.expand_as(magnitude))
        previous = torch.zeros_like(phase)
        for _ in range(iterations):
            projected = self._spectrum(self._waveform(magnitude * phase))
            ahead = projected + 0.95 * (projected - previous)
            phase = ahead / ahead.abs().clamp_min(1e-8)
            previous = projected
        return self._waveform(magnitude * phase)[:, None]
