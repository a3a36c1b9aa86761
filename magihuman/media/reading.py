"""Reading media files through PyAV and Pillow: probing, clips at a given frame rate and size, and audio.

    info = probe("clip.mov")  # kind, size, frame rate, seconds, sample rate
    clip = read_clip("clip.mov", fps=25, frames=101, size=(256, 448), rate=16000)

Times are seconds from the first frame of the file (from the first audio sample where there is no video), so that
audio and video keep the offset that a player would give them, whatever the container's clock says. The demuxer
applies edit lists and the priming samples of AAC; frames are placed by their time stamps, not by counting.

Shapes: frames uint8 [F,H,W,3] RGB; waveforms fp32 [channels,N] in [-1,1].
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from magihuman.media.container import (
    LONGEST_AUDIO,
    MediaError,
    audio_stream,
    is_cover,
    is_open_ended,
    opened,
    orientation,
    reason,
    seconds_of,
    square_pixels,
    start_of,
    video_stream,
)
from magihuman.media.image_files import probe_image
from magihuman.media.tracks import AudioTrack, VideoTrack, conversion, too_long

if TYPE_CHECKING:  # torch takes a second to import and probing files does not need it
    import torch

_LONGEST_CODED_FRAME = 0.5  # seconds


@dataclass(frozen=True)
class MediaInfo:
    """Kind, size, frame rate, length and sample rate of a media file.

    Attributes:
        kind: "video", "image" (one frame) or "audio" (no frame).
        width, height: as displayed, after rotation and pixel aspect; 0 for audio.
        fps: average frame rate, 0 for images and audio.
        length of the video, or of the audio where there is no video, 0 for images.
        audio_rate, audio_channels: 0 without an audio track.
        note: what reading changes in the frames or leaves out, such as "deinterlaced", else "".
        audio_note: which of several audio tracks is read, where it is not the first, else "".
    """

    kind: str
    width: int = 0
    height: int = 0
    fps: float = 0.0
    seconds: float = 0.0
    audio_rate: int = 0
    audio_channels: int = 0
    note: str = ""
    audio_note: str = ""

    @property
    def has_audio(self) -> bool:
        return self.audio_rate > 0


@dataclass(frozen=True)
class MediaClip:
    """Frames uint8 [F,H,W,3]; wave fp32 [channels,N], None without an audio track."""

    frames: torch.Tensor
    wave: torch.Tensor | None


def probe(path: str | Path) -> MediaInfo:
    """Facts about a file. A frame is decoded, so that a file which opens but does not decode is an error here.

    Raises:
        MediaError: empty, unreadable, no media, without decodable video or audio, or of zero length.
    """
    image = probe_image(path)
    if image is not None:
        size, note = image
        return MediaInfo("image", *size, note=note)
    with opened(path) as container:
        video, audio = video_stream(container), audio_stream(container)
        rate, channels = (audio.codec_context.sample_rate, audio.codec_context.channels) if audio else (0, 0)
        audio_note = _choice(container.streams.audio, audio, "audio")
        if video is None:
            if audio is None:
                raise MediaError("holds neither video nor audio")
            length = seconds_of(container, audio)
            return MediaInfo("audio", 0, 0, 0.0, length, rate, channels, audio_note=audio_note)
        video.codec_context.thread_count = 1
        frames = container.decode(video)
        first, second = next(frames, None), next(frames, None)
        if first is None:
            raise MediaError("no frame could be decoded")
        height, width = square_pixels(first, video)
        if orientation(first)[0]:
            height, width = width, height
        interlaced = first.interlaced_frame or (second is not None and second.interlaced_frame)
        track = _choice([stream for stream in container.streams.video if not is_cover(stream)], video, "video")
        note = "; ".join(filter(None, (conversion(first), "deinterlaced" if interlaced else "", track)))
        if second is None:
            return MediaInfo("image", width, height, 0.0, 0.0, rate, channels, note, audio_note)
        seconds = seconds_of(container, video)
        if not seconds > 0:  # also for NaN
            raise MediaError("its video has no length (zero duration)")
        fps = float(video.average_rate or video.guessed_rate or 0)
        return MediaInfo("video", width, height, fps, seconds, rate, channels, note, audio_note)


def _choice(streams: Any, chosen: Any, kind: str) -> str:
    """A note on which of several streams was chosen; "" for the first."""
    indices = [stream.index for stream in streams]
    if chosen is None or chosen.index == indices[0]:
        return ""
    return f"{kind} track {indices.index(chosen.index) + 1} of {len(indices)}"


class MediaReader:
    """An open file from which clips are read at ascending times, each frame decoded once.

        with MediaReader(path) as reader:
            clips = [reader.read(fps=25, start=start, frames=25) for start in (0.0, 1.0, 2.0)]

    Use as a context manager. Raises MediaError on opening when the file holds no video.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path

    def __enter__(self) -> MediaReader:
        with contextlib.ExitStack() as inputs:
            container = inputs.enter_context(opened(self._path))
            stream = video_stream(container)
            if stream is None:
                raise MediaError("holds no video")
            self._video = VideoTrack(container, stream)
            origin = start_of(stream)
            # Audio has a demuxer of its own, so that neither track waits for the other's packets.
            container = inputs.enter_context(opened(self._path))
            stream = audio_stream(container)
            self._audio = AudioTrack(container, stream, origin) if stream is not None else None
            self._inputs = inputs.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._inputs.close()

    def read(
        self, *, fps: float, start: float = 0.0, frames: int | None = None,
        size: tuple[int, int] | None = None, rate: int = 0, channels: int = 1,
    ) -> MediaClip:  # fmt: skip
        """One clip; arguments and errors as for `read_clip`."""
        import av
        import torch

        try:
            images = self._video.read(start, frames, fps, size)
        except (av.error.FFmpegError, OSError) as error:
            raise _undecodable(start, error) from error
        wave = self.read_sound(round(len(images) * rate / fps), rate, channels, start) if rate else None
        return MediaClip(torch.from_numpy(np.ascontiguousarray(images)), wave)

    def read_sound(self, samples: int, rate: int, channels: int = 1, start: float = 0.0) -> torch.Tensor | None:
        """Audio from `start` [s] after the first frame on; None without an audio track; errors as for `read_clip`."""
        import av
        import torch

        if self._audio is None:
            return None
        try:
            return torch.from_numpy(self._audio.read(start, samples, rate, channels))
        except (av.error.FFmpegError, OSError) as error:
            raise _undecodable(start, error) from error


def _undecodable(start: float, error: Exception) -> MediaError:
    return MediaError(f"cannot be decoded near {start:.2f} s: {reason(error)}")


def read_clip(
    path: str | Path, *, fps: float, start: float = 0.0, frames: int | None = None,
    size: tuple[int, int] | None = None, rate: int = 0, channels: int = 1,
) -> MediaClip:  # fmt: skip
    """A clip of a video file at the wanted frame rate, size and sample rate.

    Frames are picked by display time (no blending), rotation flags and pixel aspect are applied; audio is
    mixed to `channels`, resampled, kept in sync with the video and padded with silence where there is none.

    Args:
        start, frames: where the clip begins [s] and how many frames it has; None: up to the end.
        size: (height, width): scaled to cover it and cropped at the centre; None: as displayed.
        rate, channels: of the wave, round(frames * rate / fps) samples long; rate 0: no audio.

    Raises:
        MediaError: unreadable, damaged in the range, or shorter than wanted.
    """
    with MediaReader(path) as reader:
        return reader.read(fps=fps, start=start, frames=frames, size=size, rate=rate, channels=channels)


def read_sound(path: str | Path, samples: int, rate: int, channels: int = 1) -> torch.Tensor | None:
    """The first `samples` of a video file's audio from its first frame on, as `read_clip` gives them, without decoding frames.

    Returns:
        fp32 [channels,samples] at `rate`, padded with silence; None without an audio track.

    Raises:
        MediaError: no video, unreadable, or damaged in the range.
    """
    with MediaReader(path) as reader:
        return reader.read_sound(samples, rate, channels)


def read_audio(path: str | Path, rate: int, channels: int = 1) -> torch.Tensor:
    """The whole audio track of an audio or video file, from its own start: fp32 [channels,N] at `rate`.

    Raises:
        MediaError: no audio track, unreadable, damaged, or longer than `LONGEST_AUDIO`.
    """
    import torch

    with opened(path) as container:
        stream = audio_stream(container)
        if stream is None:
            raise MediaError("holds no audio")
        seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
        track = AudioTrack(container, stream, start_of(stream), open_ended=is_open_ended(path))
        if seconds > LONGEST_AUDIO:
            raise too_long(seconds)
        wave = track.read(0.0, None, rate, channels)
    # Coded frames are longer than the audio in them; a longer rest means that the length was only an estimate.
    if seconds and wave.shape[1] < (seconds + _LONGEST_CODED_FRAME) * rate:
        wave = wave[:, : max(1, round(seconds * rate))]
    if not wave.shape[1]:
        raise MediaError("holds no audio")
    return torch.from_numpy(np.ascontiguousarray(wave))
