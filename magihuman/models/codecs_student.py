"""Light decoders around their networks: a clip in chunks, and the released layout as a student that can be trained."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from magihuman.models.codecs_turbo import denormalise
from magihuman.models.codecs_wan import LATENT_MEAN, LATENT_STD
from magihuman.models.turbo_decoder import TurboConfig, TurboDecoder
from magihuman.models.turbo_student import State, TurboStudent


class StudentCodec(nn.Module):
    """Normalised latents [B,C,T,h,w] -> frames, chunk by chunk: decoding as in `codecs.VideoCodec`.

    It cannot encode: pictures are encoded by the teacher.

    Args:
        network: in the dtype in which it shall compute; its gradients are turned off.
        chunk: latents decoded at once; None chooses by the picture's size. It changes memory and speed, not frames.
    """

    def __init__(self, network: TurboStudent, chunk: int | None = None) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise ValueError(f"a chunk has at least one latent, not {chunk}")
        self.network = network.eval().requires_grad_(False)
        self.channels = network.channels
        self.stride = network.stride
        self.chunk = chunk

    def chunk_for(self, latents: Tensor) -> int:
        """How many of these latents are decoded at once."""
        batch, _, _, height, width = latents.shape
        return self.chunk or self.network.config.chunk(batch * height * width)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B,C,T,h,w] normalised -> [B,3,s(T-1)+1,H,W] fp32, about [-1,1], not clamped."""
        return torch.cat(list(self.decode_stream(latents)), dim=2)

    @torch.no_grad()
    def decode_stream(self, latents: Tensor, chunk: int | None = None) -> Iterator[Tensor]:
        """Decode chunk by chunk: yields [B,3,n,H,W] fp32, not clamped; concatenated, they are `decode`.

        Memory does not grow with the length of the clip.

        Args:
            chunk: latents at once; None as `chunk_for` says.

        Raises:
            ValueError: latents are not [B,C,T,h,w] with the decoder's C and T >= 1.
        """
        weight = self.network.conv_out.weight
        state: State | None = None
        if latents.ndim == 5 and chunk is None:
            chunk = self.chunk_for(latents)
        chunk = chunk or 1  # with a wrong rank, `step` says what is wrong
        for start in range(0, max(1, latents.shape[2]), chunk):
            part = latents[:, :, start : start + chunk].to(weight.device, weight.dtype)
            frames, state = self.network.step(part, state)
            pixels = frames.float()
            del frames
            yield pixels
            del pixels  # what the caller has let go of makes room for the next chunk


class ReleasedStudent(nn.Module):
    """The released layout with the interface of `TurboStudent`, for training and for comparison with it.

    Normalised latents [B,C,T,h,w] -> frames [B,3,F,H,W]. It has no `step`: the layout is not causal, and
    `codecs_turbo.TurboCodec` decodes long clips in windows.

    Args:
        mean, std: C latent statistics each, undone first; those of the Wan 2.2 codec by default.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: TurboConfig, mean: Tensor | None = None, std: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.channels = config.latent_channels
        space, time = config.spatial_compression_ratio, config.temporal_compression_ratio
        self.stride: tuple[int, int, int] = (time, space, space)
        self.decoder = TurboDecoder(config)
        mean = torch.tensor(LATENT_MEAN) if mean is None else mean
        std = torch.tensor(LATENT_STD) if std is None else std
        self.register_buffer("mean", mean.float().view(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("std", std.float().view(1, -1, 1, 1, 1), persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        """A whole clip in one window."""
        return self.decoder(self._raw(latents), first=True)

    def taps(self, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Frames, and what the middle block and every up block yield: [B,width,T_i,h_i,w_i] each."""
        return self.decoder.taps(self._raw(latents), first=True)

    def _raw(self, latents: Tensor) -> Tensor:
        return denormalise(latents.to(self.decoder.conv_in.conv.weight.dtype), self.mean, self.std)
