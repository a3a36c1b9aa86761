"""Writing mp4 files: H.264 and AAC through PyAV, the same bytes every time; decoding is in `magihuman.media.reading`."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from magihuman.errors import UserError
from magihuman.io.files import atomic_path


class Mp4Writer:
    """An mp4 (H.264 yuv420p, AAC, index in front) that appears under its name only when it is complete.

        with Mp4Writer(path, (256, 448), fps=25, rate=44100) as writer:
            writer.add_frames(frames)
            writer.add_wave(wave)

    Frames and audio may be added piece by piece while they are made.
    """

    def __init__(
        self, path: str | Path, size: tuple[int, int], fps: float, rate: int = 0, channels: int = 1,
        crf: int = 18,
    ) -> None:  # fmt: skip
        """
        Args:
            size: (height, width), both even, as yuv420p needs.
            rate, channels: of the audio, 0: none.
            crf: x264 quality, 0 to 51, less is better.

        Raises:
            UserError: odd size, or not one or two channels.
        """
        if size[0] % 2 or size[1] % 2 or min(size) < 2:
            raise UserError(f"cannot write a {size[1]}x{size[0]} mp4: H.264 needs even width and height")
        if rate and channels not in (1, 2):
            raise UserError(f"cannot write {channels} audio channels: give one or two")
        self._path = Path(path)
        self._output = atomic_path(self._path)
        self._size, self._fps = size, Fraction(fps).limit_denominator(1001)
        self._rate, self._channels, self._crf = rate, channels, crf
        self._written = self._samples = 0

    def __enter__(self) -> Mp4Writer:
        import av
        from av.video.reformatter import VideoReformatter

        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(
            str(self._output.__enter__().absolute()), "w", format="mp4", container_options={"movflags": "+faststart"}
        )
        # x264's macroblock tree reads beyond rows of odd lengths: with it, equal frames gave unequal files.
        options = {"crf": str(self._crf), "x264-params": "mbtree=0"}
        video = self._container.add_stream("libx264", rate=self._fps, options=options)
        video.height, video.width, video.pix_fmt = *self._size, "yuv420p"
        context = video.codec_context
        context.thread_count = 1  # the bytes of the file depend on it
        # BT.709, limited range, said so in the file: untagged small clips would be shown with BT.601 colours.
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = 1, 1, 1, 1
        self._video, self._reformatter, self._audio = video, VideoReformatter(), None
        if self._rate:
            layout = "mono" if self._channels == 1 else "stereo"
            self._audio = self._container.add_stream("aac", rate=self._rate, layout=layout)
            self._audio.codec_context.bit_rate = 96_000 * self._channels
        return self

    def add_frames(self, frames: Any) -> None:
        """Append frames: uint8 [n,H,W,3], array or tensor."""
        import av
        from av.video.reformatter import ColorRange, Colorspace, Interpolation

        array = np.ascontiguousarray(_numpy(frames))
        if array.ndim != 4 or array.shape[1:] != (*self._size, 3) or array.dtype != np.uint8:
            raise ValueError(
                f"frames must be uint8 [n,{self._size[0]},{self._size[1]},3], not {array.dtype} {array.shape}"
            )
        quality = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND
        for image in array:
            frame = self._reformatter.reformat(
                av.VideoFrame.from_ndarray(image, format="rgb24"), format="yuv420p", interpolation=quality,
                dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1,
            )  # fmt: skip
            frame.pts, frame.time_base = self._written, 1 / self._fps
            self._written += 1
            self._container.mux(self._video.encode(frame))

    def add_wave(self, wave: Any) -> None:
        """Append audio: fp32 [channels,n], array or tensor; clipped to [-1,1]."""
        import av

        array = np.clip(np.ascontiguousarray(_numpy(wave), dtype=np.float32), -1.0, 1.0)
        if self._audio is None or array.ndim != 2 or array.shape[0] != self._channels:
            raise ValueError(f"wave must be [{self._channels if self._audio else 0},n], not {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError("wave holds values that are not finite")
        frame = av.AudioFrame.from_ndarray(array, format="fltp", layout="mono" if self._channels == 1 else "stereo")
        frame.sample_rate, frame.pts, frame.time_base = self._rate, self._samples, Fraction(1, self._rate)
        self._samples += array.shape[1]
        self._container.mux(self._audio.encode(frame))

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                self._container.mux(self._video.encode(None))
                if self._audio is not None:
                    self._container.mux(self._audio.encode(None))
            self._container.close()
        except BaseException:
            self._output.__exit__(*sys.exc_info())
            raise
        self._output.__exit__(*error)


def _numpy(values: Any) -> np.ndarray:
    """An array of an array or a tensor on any device."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def write_mp4(path: str | Path, frames: Any, fps: float, wave: Any = None, rate: int = 0, *, crf: int = 18) -> None:
    """Write one clip as mp4 in one pass; it appears complete or not at all, with the same bytes every time.

    Args:
        frames: uint8 [F,H,W,3], array or tensor; every one becomes a frame of the file.
        wave: fp32 [channels,N] with one or two channels at `rate` Hz, or None.

    Raises:
        UserError: odd size or more than two channels.
        ValueError: wrong shape or type.
    """
    array = _numpy(frames)
    if array.ndim != 4 or not len(array):
        raise ValueError(f"frames must be uint8 [F,H,W,3] with F >= 1, not {array.shape}")
    audio = None if wave is None else _numpy(wave)
    channels = 1 if audio is None else audio.shape[0]
    size = (int(array.shape[1]), int(array.shape[2]))
    with Mp4Writer(path, size, fps, rate if audio is not None else 0, channels, crf) as writer:
        writer.add_frames(array)
        if audio is not None:
            writer.add_wave(audio)
