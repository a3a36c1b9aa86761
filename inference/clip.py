"""Finished clips, in memory or written while they are decoded."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from magihuman.postprocess import PLAYBACK_RATE, to_playback_rate

AHEAD = 2
"""Chunks of pictures that may wait for the encoder; the decoder then waits for it, so that memory does not grow."""
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


@dataclass
class Clip:
    """One generated clip.

    Attributes:
        frames: uint8 [F,H,W,3]; wave: fp32 [channels,N] in [-1,1].
        sample_rate: Hz; fps: frames per second.
        video: the latents [C,T,h,w] fp32 it was decoded from; audio: [A,Ca] fp32.
    """

    prompt: str
    seed: int
    frames: torch.Tensor
    wave: torch.Tensor
    sample_rate: int
    fps: float
    video: torch.Tensor
    audio: torch.Tensor

    def save(self, path: str | Path) -> None:
        """Write an mp4 (H.264, and AAC where there is sound).

        Raises:
            UserError: odd size.
            OSError: the file cannot be written.
        """
        write(path, iter([self.frames]), self.fps, *playable(self.wave, self.sample_rate))


def playback_rate(rate: int) -> int:
    """The sample rate of the file for a codec's rate: its own where players know it."""
    return rate if rate in AAC_RATES else PLAYBACK_RATE


def playable(wave: torch.Tensor, rate: int) -> tuple[torch.Tensor, int]:
    """A wave [channels,N] at a rate that players know; the released codec works at 51.2 kHz (SPEC 4.5)."""
    if rate in AAC_RATES or not wave.numel():
        return wave, rate
    return to_playback_rate(wave, rate), PLAYBACK_RATE


def write(
    path: str | Path, chunks: Iterator[torch.Tensor], fps: float, wave: torch.Tensor, rate: int
) -> tuple[int, ...]:
    """Write an mp4 while its pictures are made: they are encoded in a thread beside the one that makes the next.

    The bytes are those of encoding everything afterwards. The file appears when it is whole.

    Args:
        chunks: uint8 [n,H,W,3] each; the sound is added in step with them.
        wave: fp32 [channels,N] at `rate`; N = 0 for none.

    Returns:
        (frames, height, width) written.

    Raises:
        UserError: odd size.
        OSError: the file cannot be written.
    """
    from magihuman.media import Mp4Writer

    first = next(chunks)
    size = (int(first.shape[1]), int(first.shape[2]))
    frames = heard = 0
    with Mp4Writer(path, size, fps, rate if wave.numel() else 0, wave.shape[0] or 1) as writer:

        def add(chunk: torch.Tensor, sound: torch.Tensor) -> None:
            writer.add_frames(chunk)
            if sound.shape[1]:
                writer.add_wave(sound)

        waiting: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1) as encoder:
            for chunk in _chain(first, chunks):
                frames += len(chunk)
                until = max(heard, min(round(frames / fps * rate), wave.shape[1]))
                waiting.append(encoder.submit(add, chunk, wave[:, heard:until]))
                heard = until
                if len(waiting) > AHEAD:
                    waiting.popleft().result()
            for future in waiting:
                future.result()
        if heard < wave.shape[1]:
            writer.add_wave(wave[:, heard:])
    return frames, *size


def _chain(first: torch.Tensor, rest: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    yield first
    yield from rest
