"""Media files in and out: what a file holds, clips at a wanted rate and size, H.264 + AAC mp4.

Everything goes through PyAV, pictures through Pillow; no external program is started. Times are seconds from
the first picture. Shapes: frames uint8 [F,H,W,3] RGB; waveforms fp32 [channels,N] in [-1,1].
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from magihuman.errors import UserError
from magihuman.io.files import atomic_path
from magihuman.media.decoding import (
    AudioTrack,
    MediaError,
    VideoTrack,
    opened,
    orientation,
    picture_stream,
    reason,
    seconds_of,
    sound_stream,
    square_pixels,
)

if TYPE_CHECKING:  # torch takes a second to import and looking at files does not need it
    import torch

__all__ = [
    "Clip", "MediaError", "MediaInfo", "MediaReader", "Mp4Writer",
    "probe", "read_audio", "read_clip", "read_image", "write_mp4",
]  # fmt: skip


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds.

    Attributes:
        kind: "video", "image" (a single picture) or "audio" (no picture).
        container: name of the demuxer, or the picture's format.
        width, height: as displayed, after rotation and pixel aspect; 0 for audio.
        fps: average pictures per second, 0 for images and audio.
        seconds: of picture for video, of sound for audio, 0 for images.
        audio_rate, audio_channels: 0 without a sound track.
    """

    kind: str
    container: str
    width: int = 0
    height: int = 0
    fps: float = 0.0
    seconds: float = 0.0
    audio_rate: int = 0
    audio_channels: int = 0

    @property
    def has_audio(self) -> bool:
        return self.audio_rate > 0


@dataclass(frozen=True)
class Clip:
    """Frames uint8 [F,H,W,3] at `fps`; wave fp32 [channels,N] at `rate`, None without a sound track."""

    frames: torch.Tensor
    fps: float
    wave: torch.Tensor | None
    rate: int


def probe(path: str | Path) -> MediaInfo:
    """What `path` holds; decodes a picture, so that a file which opens but does not decode is found out here.

    Raises:
        MediaError: empty, unreadable, no media, without a decodable picture or sound, or of no length.
    """
    picture = _probe_image(path)
    if picture is not None:
        return picture
    with opened(path) as container:
        video, audio = picture_stream(container), sound_stream(container)
        rate, channels = (audio.codec_context.sample_rate, audio.codec_context.channels) if audio else (0, 0)
        if video is None:
            if audio is None:
                raise MediaError("holds neither picture nor sound")
            length = seconds_of(container, audio)
            return MediaInfo("audio", container.format.name, 0, 0, 0.0, length, rate, channels)
        video.codec_context.thread_count = 1
        frames = container.decode(video)
        first, second = next(frames, None), next(frames, None)
        if first is None:
            raise MediaError("no picture could be decoded")
        height, width = square_pixels(first, video)
        if orientation(first)[0]:
            height, width = width, height
        if second is None:
            return MediaInfo("image", container.format.name, width, height, 0.0, 0.0, rate, channels)
        seconds = seconds_of(container, video)
        if seconds <= 0:
            raise MediaError("its picture has no length (zero duration)")
        fps = float(video.average_rate or video.guessed_rate or 0)
        return MediaInfo("video", container.format.name, width, height, fps, seconds, rate, channels)


class MediaReader:
    """A file opened for reading clips at ascending times without decoding anything twice.

    Use as a context manager. Raises MediaError on opening when the file holds no moving picture.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        self._path, self._threads = path, threads

    def __enter__(self) -> MediaReader:
        self._pictures = opened(self._path)
        container = self._pictures.__enter__()
        stream = picture_stream(container)
        if stream is None:
            self._pictures.__exit__(None, None, None)
            raise MediaError("holds no moving picture")
        self._video = VideoTrack(container, stream, self._threads)
        origin = float((stream.start_time or 0) * stream.time_base)
        # Sound has a demuxer of its own, so that neither track waits for the other's packets.
        self._sounds = opened(self._path)
        container = self._sounds.__enter__()
        stream = sound_stream(container)
        self._audio = AudioTrack(container, stream, origin) if stream is not None else None
        return self

    def __exit__(self, *_: Any) -> None:
        self._sounds.__exit__(None, None, None)
        self._pictures.__exit__(None, None, None)

    def read(
        self, *, fps: float, start: float = 0.0, frames: int | None = None,
        size: tuple[int, int] | None = None, rate: int = 0, channels: int = 1,
    ) -> Clip:  # fmt: skip
        """One clip; arguments and errors as for `read_clip`."""
        import av
        import torch

        try:
            pictures = self._video.read(start, frames, fps, size)
            wave = None
            if rate and self._audio is not None:
                samples = round(len(pictures) * rate / fps)
                wave = torch.from_numpy(self._audio.read(start, samples, rate, channels))
        except (av.error.FFmpegError, OSError) as error:
            raise MediaError(f"cannot be decoded near {start:.2f} s: {reason(error)}") from error
        return Clip(torch.from_numpy(np.ascontiguousarray(pictures)), fps, wave, rate)


def read_clip(
    path: str | Path, *, fps: float, start: float = 0.0, frames: int | None = None,
    size: tuple[int, int] | None = None, rate: int = 0, channels: int = 1,
) -> Clip:  # fmt: skip
    """A clip of a video file at the wanted frame rate, size and sample rate.

    Frames are picked by display time (no blending), rotation flags and pixel aspect are applied; sound is
    mixed to `channels`, resampled, kept in sync with the picture and padded with silence where there is none.

    Args:
        start, frames: where the clip begins [s] and how many pictures it has; None: up to the end.
        size: (height, width): scaled to cover it and cropped at the centre; None: as displayed.
        rate, channels: of the wave, round(frames * rate / fps) samples long; rate 0: no sound.

    Raises:
        MediaError: unreadable, damaged in the range, or shorter than asked.
    """
    with MediaReader(path) as reader:
        return reader.read(fps=fps, start=start, frames=frames, size=size, rate=rate, channels=channels)


def read_audio(path: str | Path, rate: int, channels: int = 1) -> torch.Tensor:
    """The whole sound of a sound or video file, from its own start: fp32 [channels,N] at `rate`.

    Raises:
        MediaError: no sound track, unreadable or damaged.
    """
    import torch

    with opened(path) as container:
        stream = sound_stream(container)
        if stream is None:
            raise MediaError("holds no sound")
        seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
        wave = AudioTrack(container, stream).read(0.0, None, rate, channels)
    if seconds:  # coded frames are longer than the sound they hold
        wave = wave[:, : max(1, round(seconds * rate))]
    if not wave.shape[1]:
        raise MediaError("holds no sound")
    return torch.from_numpy(np.ascontiguousarray(wave))


# --------------------------------------------------------------------------------------------- still pictures


def _probe_image(path: str | Path) -> MediaInfo | None:
    """The picture's facts, or None when Pillow does not know the file or it moves."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if getattr(image, "is_animated", False):
                return None
            image.load()
            sideways = (
                image.getexif().get(0x0112, 1) >= 5
            )  # EXIF orientations 5 to 8 exchange width and height
            width, height = image.size[::-1] if sideways else image.size
            return MediaInfo("image", str(image.format).lower(), width, height)
    except UnidentifiedImageError:
        return None
    except Image.DecompressionBombError as error:
        raise MediaError("the picture is too large to be opened safely") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise MediaError(f"cannot be read: {reason(error)}") from error


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> torch.Tensor:
    """A still picture, upright, on white where transparent: uint8 [1,H,W,3].

    Args:
        size: (height, width): scaled to cover it and cropped at the centre; None keeps the picture's own.

    Raises:
        MediaError: not a readable picture.
    """
    import torch
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"is not a readable picture: {reason(error)}") from error
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if size is not None and flat.size != (size[1], size[0]):
        flat = ImageOps.fit(flat, (size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(flat)[None])


# ---------------------------------------------------------------------------------------------------- writing


class Mp4Writer:
    """An mp4 (H.264 yuv420p, AAC, index in front) that appears under its name only when it is complete.

    Use as a context manager; pictures and sound may be added piece by piece while they are made.
    """

    def __init__(
        self, path: str | Path, size: tuple[int, int], fps: float, rate: int = 0, channels: int = 1,
        crf: int = 18, threads: int = 1,
    ) -> None:  # fmt: skip
        """
        Args:
            size: (height, width), both even (a demand of yuv420p).
            rate, channels: of the sound, 0: none.
            crf: x264 quality, 0 to 51, less is better.
            threads: of x264; the bytes depend on it, so more than one is the caller's choice.

        Raises:
            UserError: odd size, or not one or two channels.
        """
        if size[0] % 2 or size[1] % 2 or min(size) < 2:
            raise UserError(f"cannot write a {size[1]}x{size[0]} mp4: H.264 needs even width and height")
        if rate and channels not in (1, 2):
            raise UserError(f"cannot write {channels} sound channels: give one or two")
        self._path = Path(path)
        self._output = atomic_path(self._path)
        self._size, self._fps = size, Fraction(fps).limit_denominator(1001)
        self._rate, self._channels, self._crf, self._threads = rate, channels, crf, threads
        self._written = self._samples = 0

    def __enter__(self) -> Mp4Writer:
        import av
        from av.video.reformatter import VideoReformatter

        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(
            str(self._output.__enter__().absolute()),
            "w",
            format="mp4",
            container_options={"movflags": "+faststart"},
        )
        # x264's macroblock tree reads beyond rows of odd lengths: with it, equal pictures gave unequal files.
        options = {"crf": str(self._crf), "x264-params": "mbtree=0"}
        video = self._container.add_stream("libx264", rate=self._fps, options=options)
        video.height, video.width, video.pix_fmt = *self._size, "yuv420p"
        context = video.codec_context
        context.thread_count = self._threads
        # BT.709, limited range, said so in the file: untagged small clips would be shown with BT.601 colours.
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = 1, 1, 1, 1
        self._video, self._reformatter, self._audio = video, VideoReformatter(), None
        if self._rate:
            layout = "mono" if self._channels == 1 else "stereo"
            self._audio = self._container.add_stream("aac", rate=self._rate, layout=layout)
            self._audio.codec_context.bit_rate = 96_000 * self._channels
        return self

    def add_frames(self, frames: Any) -> None:
        """Append pictures: uint8 [n,H,W,3], array or tensor."""
        import av
        from av.video.reformatter import ColorRange, Colorspace, Interpolation

        array = np.ascontiguousarray(_numpy(frames))
        if array.ndim != 4 or array.shape[1:] != (*self._size, 3) or array.dtype != np.uint8:
            raise ValueError(
                f"frames must be uint8 [n,{self._size[0]},{self._size[1]},3], not {array.dtype} {array.shape}"
            )
        quality = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND
        for picture in array:
            frame = self._reformatter.reformat(
                av.VideoFrame.from_ndarray(picture, format="rgb24"), format="yuv420p", interpolation=quality,
                dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1,
            )  # fmt: skip
            frame.pts, frame.time_base = self._written, 1 / self._fps
            self._written += 1
            self._container.mux(self._video.encode(frame))

    def add_wave(self, wave: Any) -> None:
        """Append sound: fp32 [channels,n], array or tensor; clipped to [-1,1]."""
        import av

        array = np.clip(np.ascontiguousarray(_numpy(wave), dtype=np.float32), -1.0, 1.0)
        if self._audio is None or array.ndim != 2 or array.shape[0] != self._channels:
            raise ValueError(f"wave must be [{self._channels if self._audio else 0},n], not {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError("wave holds values that are not finite")
        frame = av.AudioFrame.from_ndarray(
            array, format="fltp", layout="mono" if self._channels == 1 else "stereo"
        )
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


def write_mp4(
    path: str | Path,
    frames: Any,
    fps: float,
    wave: Any = None,
    rate: int = 0,
    *,
    crf: int = 18,
    threads: int = 1,
) -> None:
    """Write one clip as mp4 in one pass; it appears complete or not at all, with the same bytes every time.

    Args:
        frames: uint8 [F,H,W,3], array or tensor; every one becomes a picture of the file.
        wave: fp32 [channels,N] with one or two channels at `rate` Hz, or None.

    Raises:
        UserError: odd size or more than two channels.
        ValueError: wrong shape or type.
    """
    array = _numpy(frames)
    if array.ndim != 4 or not len(array):
        raise ValueError(f"frames must be uint8 [F,H,W,3] with F >= 1, not {array.shape}")
    sound = None if wave is None else _numpy(wave)
    channels = 1 if sound is None else sound.shape[0]
    size = (int(array.shape[1]), int(array.shape[2]))
    with Mp4Writer(path, size, fps, rate if sound is not None else 0, channels, crf, threads) as writer:
        writer.add_frames(array)
        if sound is not None:
            writer.add_wave(sound)
