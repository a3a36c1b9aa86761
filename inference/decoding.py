"""Streaming decoders: latents to 8-bit frames, whole or in tiles, and clips written while they are decoded.

    for frames in Decoder(codec).stream(latents): ...      # uint8 [n,H,W,3] on the CPU

One interface for all codecs: the Wan decoder goes latent by latent, the released Turbo decoder window by window, our
causal decoders chunk by chunk with a state, and any other codec decodes at once. Frames become 8-bit on the device, a
quarter of the bytes, and are copied to the CPU while the next ones are decoded. Large frames can be decoded in
overlapping tiles; all tiles advance through the clip together, so memory does not grow with its length.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magihuman.codecs.causal_decoder import CausalDecoderCodec
from magihuman.errors import UserError
from magihuman.media.images import PLAYBACK_RATE, frames_to_uint8, to_playback_rate

Streamer = Callable[[Tensor], Iterator[Tensor]]
"""Latents [B,C,T,h,w] -> frames [B,3,n,H,W] fp32, part by part."""

AHEAD = 2
"""Chunks of frames that may wait for the encoder; the decoder then waits for it, so that memory does not grow."""
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


@dataclass
class Clip:
    """One generated clip.

    Attributes:
        frames: uint8 [F,H,W,3]; wave: fp32 [channels,N] in [-1,1].
        sample_rate: Hz; fps: frames per second.
        video: the latents [C,T,h,w] fp32 it was decoded from; audio: [A,Ca] fp32.
        crf: x264's quality in the file.
    """

    prompt: str
    seed: int
    frames: torch.Tensor
    wave: torch.Tensor
    sample_rate: int
    fps: float
    video: torch.Tensor
    audio: torch.Tensor
    crf: int = 18

    def save(self, path: str | Path) -> None:
        """Write an mp4 (H.264, and AAC where there is audio).

        Raises:
            UserError: odd size.
            OSError: the file cannot be written.
        """
        write(path, iter([self.frames]), self.fps, *playable(self.wave, self.sample_rate), self.crf)


def playback_rate(rate: int) -> int:
    """The sample rate of the file for a codec's rate: its own where players know it."""
    return rate if rate in AAC_RATES else PLAYBACK_RATE


def playable(wave: torch.Tensor, rate: int) -> tuple[torch.Tensor, int]:
    """A wave [channels,N] at a rate that players know; the released codec works at 51.2 kHz (SPEC 4.5)."""
    if rate in AAC_RATES or not wave.numel():
        return wave, rate
    return to_playback_rate(wave, rate), PLAYBACK_RATE


def write(
    path: str | Path, chunks: Iterator[torch.Tensor], fps: float, wave: torch.Tensor, rate: int, crf: int = 18
) -> tuple[int, ...]:
    """Write an mp4 while its frames are decoded: a second thread encodes them.

    The bytes are those of encoding everything afterwards. The file appears when it is whole.

    Args:
        chunks: uint8 [n,H,W,3] each; the audio is added in step with them.
        wave: fp32 [channels,N] at `rate`; N = 0 for none.
        crf: see `Mp4Writer`.

    Returns:
        (frames, height, width) written.

    Raises:
        UserError: odd size.
        OSError: the file cannot be written.
    """
    from magihuman.media.mp4 import Mp4Writer

    first = next(chunks)
    size = (int(first.shape[1]), int(first.shape[2]))
    frames = written = 0
    with Mp4Writer(path, size, fps, rate if wave.numel() else 0, wave.shape[0] or 1, crf) as writer:

        def add(chunk: torch.Tensor, part: torch.Tensor) -> None:
            writer.add_frames(chunk)
            if part.shape[1]:
                writer.add_wave(part)

        waiting: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1) as encoder:
            for chunk in chain([first], chunks):
                frames += len(chunk)
                until = max(written, min(round(frames / fps * rate), wave.shape[1]))
                waiting.append(encoder.submit(add, chunk, wave[:, written:until]))
                written = until
                if len(waiting) > AHEAD:
                    waiting.popleft().result()
            for future in waiting:
                future.result()
        if written < wave.shape[1]:
            writer.add_wave(wave[:, written:])
    return frames, *size


class Decoder:
    """A codec's decoding half.

    Args:
        codec: has `stride`, `channels`, and `decode` or `decode_stream`, see `magihuman.codecs.protocols`.
        tile: pixels a side of the tiles in which large frames are decoded, blended where they overlap, for small
            cards; None decodes frames whole.

    Raises:
        UserError: a tile that the codec cannot have.
    """

    def __init__(self, codec: Any, tile: int | None = None) -> None:
        self.codec = codec
        self.tile = latents_per_tile(tile, codec.stride)

    @torch.no_grad()
    def stream(self, latents: Tensor) -> Iterator[Tensor]:
        """8-bit frames of one clip, as many at a time as the codec makes.

        Args:
            latents: normalised, [C,T,h,w] or [1,C,T,h,w], any device.

        Yields:
            uint8 [n,H,W,3] on the CPU; all n together are s (T - 1) + 1.

        Raises:
            ValueError: more than one clip.
        """
        if latents.ndim == 5 and len(latents) != 1:
            raise ValueError(f"latents {list(latents.shape)}: frames are streamed clip by clip")
        waiting: _PendingCopy | None = None
        for part in self.frames(latents if latents.ndim == 5 else latents[None]):
            frames = to_uint8(part)
            del part  # makes room for the next one
            if frames.device.type != "cuda":
                yield frames.cpu()
                continue
            arriving = _PendingCopy(frames)
            if waiting is not None:
                yield waiting.wait()
            waiting = arriving
        if waiting is not None:
            yield waiting.wait()

    @torch.no_grad()
    def frames(self, latents: Tensor) -> Iterator[Tensor]:
        """The same before the conversion to 8 bit: [B,C,T,h,w] -> [B,3,n,H,W] fp32 on the codec's device, not clamped."""
        latents = latents.to(device_of(self.codec))
        codec = self.codec
        if isinstance(codec, CausalDecoderCodec):
            # As many latents at once as the whole frame would allow: tiles are joined in memory.
            stream: Streamer = partial(codec.decode_stream, chunk=codec.chunk_for(latents))
        elif hasattr(codec, "decode_stream"):
            stream = codec.decode_stream
        else:

            def stream(z: Tensor) -> Iterator[Tensor]:
                yield codec.decode(z)

        if self.tile is None or max(latents.shape[3:]) <= self.tile:
            return stream(latents)
        return stream_tiles(stream, latents, self.tile, codec.stride[1])


def device_of(codec: Any) -> torch.device:
    """Where a codec's tensors are; codecs without any work on the CPU."""
    if isinstance(codec, torch.nn.Module):
        for tensor in (*codec.parameters(), *codec.buffers()):
            return tensor.device
    return torch.device("cpu")


def to_uint8(frames: Tensor) -> Tensor:
    """[1,3,n,H,W] in about [-1,1] -> uint8 [n,H,W,3] on the same device; one frame's temporaries at a time."""
    return torch.cat([frames_to_uint8(frames[:, :, i : i + 1])[0] for i in range(frames.shape[2])])


class _PendingCopy:
    """Frames on their way from a GPU: on a stream of its own, so that the next chunk need not wait for the copy."""

    def __init__(self, frames: Tensor) -> None:
        copying = _copy_stream(frames.device)
        copying.wait_stream(torch.cuda.current_stream(frames.device))
        with torch.cuda.stream(copying):
            self._frames = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
            self._frames.copy_(frames, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(copying)
        frames.record_stream(copying)

    def wait(self) -> Tensor:
        """On the CPU, complete."""
        self._arrived.synchronize()
        return self._frames


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


OVERLAP = 4  # a tile shares one part in so many with its neighbour
SMALLEST = 8  # latents a side


@dataclass(frozen=True)
class Span:
    """Latents [start, stop) of one axis, and what their pixels count for: [pixels] fp32, the spans' sum is 1."""

    start: int
    stop: int
    weight: Tensor


def spans(length: int, tile: int, overlap: int, stride: int) -> list[Span]:
    """The fewest equal spans of at most `tile` latents that cover `length`, neighbours sharing at least `overlap`.

    Towards a border inside the frame a span's weight falls linearly over the middle half of the overlap and is 0 in
    the outer quarter: there the zeros beyond the border, which the whole frame does not have, weigh the most.

    Args:
        stride: pixels per latent.

    Raises:
        ValueError: tile <= overlap.
    """
    if tile >= length:
        return [Span(0, length, torch.ones(length * stride))]
    if not 0 <= overlap < tile:
        raise ValueError(f"an overlap of {overlap} latents does not fit into tiles of {tile}")
    count = -(-(length - overlap) // (tile - overlap))
    # As many smaller ones, so that none overlaps more than needed.
    tile = -(-(length + (count - 1) * overlap) // count)
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    pixels = torch.arange(tile * stride) + 0.5
    margin, ramp = overlap * stride / 4, max(overlap * stride / 2, 1)
    rising = ((pixels - margin) / ramp).clamp(0, 1)
    weights = []
    for start in starts:
        weight = torch.ones(tile * stride)
        if start > 0:
            weight = torch.minimum(weight, rising)
        if start + tile < length:
            weight = torch.minimum(weight, rising.flip(0))
        weights.append(weight)
    total = torch.zeros(length * stride)
    for start, weight in zip(starts, weights, strict=True):
        total[start * stride : (start + tile) * stride] += weight
    return [
        Span(start, start + tile, weight / total[start * stride : (start + tile) * stride])
        for start, weight in zip(starts, weights, strict=True)
    ]


def latents_per_tile(tile: int | None, stride: tuple[int, int, int]) -> int | None:
    """The setting tile=, in pixels, as latents; None for whole frames.

    Raises:
        UserError: too small, or no multiple of the decoder's stride.
    """
    if tile is None:
        return None
    space = stride[1]
    if tile < SMALLEST * space or tile % space:
        raise UserError(f"tile={tile} is impossible; give a multiple of {space} pixels, at least {SMALLEST * space}")
    return tile // space


def stream_tiles(stream: Streamer, latents: Tensor, tile: int, stride: int) -> Iterator[Tensor]:
    """Decode [B,C,T,h,w] in tiles of `tile` latents a side; yields blended frames [B,3,n,H,W] fp32.

    Args:
        stream: decodes one tile; all tiles have one size, and it must cut equal sizes into equal parts.
        stride: pixels per latent.
    """
    height, width = latents.shape[3:]
    rows, columns = (spans(length, tile, tile // OVERLAP, stride) for length in (height, width))
    pairs = [(row, column) for row in rows for column in columns]
    streams = [stream(latents[..., r.start : r.stop, c.start : c.stop]) for r, c in pairs]
    weights = [r.weight[:, None] * c.weight[None, :] for r, c in pairs]  # [H_tile,W_tile]
    while True:
        whole: Tensor | None = None
        for (row, column), tiles, weight in zip(pairs, streams, weights, strict=True):
            part = next(tiles, None)
            if part is None:
                return
            if whole is None:
                whole = part.new_zeros(*part.shape[:3], height * stride, width * stride)
            high, wide = (slice(span.start * stride, span.stop * stride) for span in (row, column))
            whole[..., high, wide] += part * weight.to(part.device)
            del part  # a name for it, or for a view of `whole`, would keep it in memory with the next one
        assert whole is not None
        yield whole
