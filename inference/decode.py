"""Latents to finished pictures as a stream: `for pictures in decoder.stream(latents)`.

One interface for all codecs: the Wan decoder goes latent by latent, the released Turbo decoder window by window, our
students chunk by chunk with a state; what can do none of this decodes at once. Pictures become 8-bit on the device,
a quarter of the bytes, and travel to the CPU while the next ones are decoded.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inference.tiles import Streamer, latents_per_tile, stream_tiles
from magihuman.models.codecs_student import StudentCodec
from magihuman.postprocess import frames_to_uint8


class Decoder:
    """A codec's decoding half.

    Args:
        codec: has `stride`, `channels`, and `decode` or `decode_stream`, see `magihuman.models.codecs`.
        tile: pixels a side of the tiles in which large pictures are decoded, blended where they overlap, for small
            cards; None decodes pictures whole.

    Raises:
        UserError: a tile that the codec cannot have.
    """

    def __init__(self, codec: Any, tile: int | None = None) -> None:
        self.codec = codec
        self.tile = latents_per_tile(tile, codec.stride)

    @property
    def device(self) -> torch.device:
        """Where the codec's tensors are now; codecs without any work on the CPU."""
        return device_of(self.codec)

    @torch.no_grad()
    def stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Pictures of one clip, as many at a time as the codec makes.

        Args:
            latents: normalised, [C,T,h,w] or [1,C,T,h,w], any device.

        Yields:
            uint8 [n,H,W,3] on the CPU; all n together are s (T - 1) + 1.

        Raises:
            ValueError: more than one clip.
        """
        if latents.ndim == 5 and len(latents) != 1:
            raise ValueError(f"latents {list(latents.shape)}: pictures are streamed clip by clip")
        waiting: _Arriving | None = None
        for part in self.frames(latents if latents.ndim == 5 else latents[None]):
            pictures = to_pictures(part)
            del part  # makes room for the next one
            if pictures.device.type != "cuda":
                yield pictures.cpu()
                continue
            arriving = _Arriving(pictures)
            if waiting is not None:
                yield waiting.wait()
            waiting = arriving
        if waiting is not None:
            yield waiting.wait()

    @torch.no_grad()
    def frames(self, latents: Tensor) -> Iterator[Tensor]:
        """The same before it becomes pictures: [B,C,T,h,w] -> [B,3,n,H,W] fp32 on the codec's device, not clamped."""
        latents = latents.to(self.device)
        stream = self._streamer(latents)
        if self.tile is None or max(latents.shape[3:]) <= self.tile:
            return stream(latents)
        return stream_tiles(stream, latents, self.tile, self.codec.stride[1])

    def _streamer(self, latents: Tensor) -> Streamer:
        codec = self.codec
        if isinstance(codec, StudentCodec):
            # As many latents at once as the whole picture would allow: tiles are joined in memory.
            return partial(codec.decode_stream, chunk=codec.chunk_for(latents))
        if hasattr(codec, "decode_stream"):
            return codec.decode_stream
        return lambda z: iter([codec.decode(z)])


def device_of(codec: Any) -> torch.device:
    """Where a codec's tensors are; codecs without any work on the CPU."""
    if isinstance(codec, torch.nn.Module):
        for tensor in (*codec.parameters(), *codec.buffers()):
            return tensor.device
    return torch.device("cpu")


def to_pictures(frames: Tensor) -> Tensor:
    """[1,3,n,H,W] in about [-1,1] -> uint8 [n,H,W,3] on the same device; one frame's temporaries at a time."""
    return torch.cat([frames_to_uint8(frames[:, :, i : i + 1])[0] for i in range(frames.shape[2])])


class _Arriving:
    """Pictures on their way from a GPU: on a stream of its own, so that the next chunk need not wait for the copy."""

    def __init__(self, pictures: Tensor) -> None:
        copying = _copy_stream(pictures.device)
        copying.wait_stream(torch.cuda.current_stream(pictures.device))
        with torch.cuda.stream(copying):
            self._pictures = torch.empty(pictures.shape, dtype=pictures.dtype, pin_memory=True)
            self._pictures.copy_(pictures, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(copying)
        pictures.record_stream(copying)

    def wait(self) -> Tensor:
        """On the CPU, complete."""
        self._arrived.synchronize()
        return self._pictures


_COPY_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _COPY_STREAMS:
        _COPY_STREAMS[device] = torch.cuda.Stream(device)
    return _COPY_STREAMS[device]
