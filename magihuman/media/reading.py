"""Decoding media files through PyAV and Pillow: probing, clips at a given frame rate and size, audio, images.

    info = probe("clip.mov")  # kind, size, frame rate, seconds, sample rate
    clip = read_clip("clip.mov", fps=25, frames=101, size=(256, 448), rate=16000)

Times are seconds from the first frame of the file (from the first audio sample where there is no video), so that
audio and video keep the offset that a player would give them, whatever the container's clock says. The demuxer
applies edit lists and the priming samples of AAC; frames are placed by their time stamps, not by counting.

Shapes: frames uint8 [F,H,W,3] RGB; waveforms fp32 [channels,N] in [-1,1].
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from magihuman.errors import UserError

if TYPE_CHECKING:  # torch takes a second to import and probing files does not need it
    import torch

# Demuxers that may be chosen from a file's content. Playlists (hls, concat, dash) are left out on purpose: a text
# file named .mp4 must not make us open other files or the network. So are `tty` and image patterns.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,flv,asf,ogg,wav,w64,aiff,mp3,flac,aac,"
    "ivf,mxf,caf,amr,ac3,eac3,obu,dv,rm,nut,au"
)
# Seconds; a shorter gap is decoded and dropped, since a seek lands a key frame early anyway.
_SEEK_AFTER = 8.0
_RESYNC = 0.02  # seconds; audio time stamps that disagree by less are the container's rounding


class MediaError(UserError):
    """A file that cannot be used; the message says why, in words fit for a report (without its name)."""


def reason(error: BaseException) -> str:
    """One short line for an exception of PyAV, Pillow or the system, without paths."""
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if type(error).__name__ == "InvalidDataError":
        return "no valid media in it (damaged, cut off, or another kind of file)"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]


@dataclass(frozen=True)
class MediaInfo:
    """Kind, size, frame rate, length and sample rate of a media file.

    Attributes:
        kind: "video", "image" (one frame) or "audio" (no frame).
        width, height: as displayed, after rotation and pixel aspect; 0 for audio.
        fps: average frame rate, 0 for images and audio.
        length of the video, or of the audio where there is no video, 0 for images.
        audio_rate, audio_channels: 0 without an audio track.
    """

    kind: str
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
class MediaClip:
    """Frames uint8 [F,H,W,3]; wave fp32 [channels,N], None without an audio track."""

    frames: torch.Tensor
    wave: torch.Tensor | None


def probe(path: str | Path) -> MediaInfo:
    """Facts about a file. A frame is decoded, so that a file which opens but does not decode is an error here.

    Raises:
        MediaError: empty, unreadable, no media, without decodable video or audio, or of zero length.
    """
    image = _probe_image(path)
    if image is not None:
        return image
    with opened(path) as container:
        video, audio = video_stream(container), audio_stream(container)
        rate, channels = (audio.codec_context.sample_rate, audio.codec_context.channels) if audio else (0, 0)
        if video is None:
            if audio is None:
                raise MediaError("holds neither video nor audio")
            length = seconds_of(container, audio)
            return MediaInfo("audio", seconds=length, audio_rate=rate, audio_channels=channels)
        video.codec_context.thread_count = 1
        frames = container.decode(video)
        first, second = next(frames, None), next(frames, None)
        if first is None:
            raise MediaError("no frame could be decoded")
        height, width = square_pixels(first, video)
        if orientation(first)[0]:
            height, width = width, height
        if second is None:
            return MediaInfo("image", width, height, 0.0, 0.0, rate, channels)
        seconds = seconds_of(container, video)
        if seconds <= 0:
            raise MediaError("its video has no length (zero duration)")
        fps = float(video.average_rate or video.guessed_rate or 0)
        return MediaInfo("video", width, height, fps, seconds, rate, channels)


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
            wave = None
            if rate and self._audio is not None:
                samples = round(len(images) * rate / fps)
                wave = torch.from_numpy(self._audio.read(start, samples, rate, channels))
        except (av.error.FFmpegError, OSError) as error:
            raise MediaError(f"cannot be decoded near {start:.2f} s: {reason(error)}") from error
        return MediaClip(torch.from_numpy(np.ascontiguousarray(images)), wave)


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


def read_audio(path: str | Path, rate: int, channels: int = 1) -> torch.Tensor:
    """The whole audio track of a sound or video file, from its own start: fp32 [channels,N] at `rate`.

    Raises:
        MediaError: no audio track, unreadable or damaged.
    """
    import torch

    with opened(path) as container:
        stream = audio_stream(container)
        if stream is None:
            raise MediaError("holds no audio")
        seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
        wave = AudioTrack(container, stream, start_of(stream)).read(0.0, None, rate, channels)
    if seconds:  # coded frames are longer than the audio in them
        wave = wave[:, : max(1, round(seconds * rate))]
    if not wave.shape[1]:
        raise MediaError("holds no audio")
    return torch.from_numpy(np.ascontiguousarray(wave))


def _probe_image(path: str | Path) -> MediaInfo | None:
    """Facts about an image file; None when Pillow cannot read it or it is animated."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if getattr(image, "is_animated", False):
                return None
            image.load()
            # EXIF orientations 5 to 8 exchange width and height.
            sideways = image.getexif().get(0x0112, 1) >= 5
            width, height = image.size[::-1] if sideways else image.size
            return MediaInfo("image", width, height)
    except UnidentifiedImageError:
        return None
    except Image.DecompressionBombError as error:
        raise MediaError("the image is too large to be opened safely") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise MediaError(f"cannot be read: {reason(error)}") from error


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> torch.Tensor:
    """An image file, upright, on white where transparent: uint8 [1,H,W,3].

    Args:
        size: (height, width): scaled to cover it and cropped at the centre; None keeps the image's own.

    Raises:
        MediaError: not a readable image.
    """
    import torch
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"is not a readable image: {reason(error)}") from error
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if size is not None and flat.size != (size[1], size[0]):
        flat = ImageOps.fit(flat, (size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(flat)[None])


# ------------------------------------------------------------------------------------------------- streams


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """An input container; every failure inside to open or to decode becomes a MediaError."""
    import av

    full = os.path.abspath(path)  # absolute, so that a name such as "concat:x" is no protocol
    try:
        if os.path.isdir(full):
            raise MediaError("it is a folder")
        if os.path.getsize(full) == 0:
            raise MediaError("the file is empty (0 bytes)")
        options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
        with av.open(full, container_options=options, metadata_errors="replace") as container:
            yield container
    except (av.error.FFmpegError, OSError, EOFError) as error:
        raise MediaError(f"cannot be read: {reason(error)}") from error


def video_stream(container: Any) -> Any | None:
    """The first video stream that is not a cover image."""
    from av.stream import Disposition

    for stream in container.streams.video:
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def audio_stream(container: Any) -> Any | None:
    """The first audio stream that names a sample rate."""
    for stream in container.streams.audio:
        if stream.codec_context is not None and stream.codec_context.sample_rate:
            return stream
    return None


def start_of(stream: Any) -> float:
    """Time of a stream's first frame on the container's clock [s]."""
    return float((stream.start_time or 0) * stream.time_base)


def seconds_of(container: Any, stream: Any) -> float:
    """Length of a stream: its own field, its tag (Matroska), or the end of its last packet."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    clock = stream.metadata.get("DURATION", "").split(":")
    if len(clock) == 3:
        with contextlib.suppress(ValueError):
            end = int(clock[0]) * 3600 + int(clock[1]) * 60 + float(clock[2])
            return end - start_of(stream)
    rate = getattr(stream, "average_rate", None)
    usual = round(1 / (rate * stream.time_base)) if rate else 0  # for FLV and others without packet durations
    ends = [p.pts + (p.duration or usual) for p in container.demux(stream) if p.pts is not None]
    return float((max(ends, default=0) - (stream.start_time or 0)) * stream.time_base)


def orientation(frame: Any) -> tuple[bool, bool, bool]:
    """A frame's display matrix as (transpose, then mirror left-right, then mirror top-bottom).

    The matrix maps coded to displayed coordinates, x' = a x + c y and y' = b x + d y; only signs matter here.
    """
    raw = frame.side_data.get("DISPLAYMATRIX")
    if raw is None:
        return False, False, False
    a, b, _, c, d = (int(x) for x in np.frombuffer(bytes(raw), dtype=np.int32)[:5])
    if abs(b) > abs(a):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def square_pixels(frame: Any, stream: Any) -> tuple[int, int]:
    """(height, width) of a frame with square pixels, before its display matrix."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    return frame.height, max(1, round(frame.width * aspect)) if 0.1 < aspect < 10 else frame.width


class _Track:
    """One stream of an opened container, decoded forwards with seeks over long gaps."""

    def __init__(self, container: Any, stream: Any, origin: float) -> None:
        self._container, self._stream, self._origin = container, stream, origin
        self._base = float(stream.time_base)
        self._damage: list[float] = []  # times of what did not decode
        stream.codec_context.thread_count = 1
        self._frames = self._decoded()

    def _time(self, stamp: int) -> float:
        """Seconds on the file's clock of a time stamp of this stream."""
        return stamp * self._base - self._origin

    def _seek(self, seconds: float) -> None:
        """Go to the last key frame at or before `seconds`."""
        self._container.seek(int((max(seconds, 0.0) + self._origin) / self._base), stream=self._stream)
        self._stream.codec_context.flush_buffers()
        self._damage.clear()
        self._frames = self._decoded()

    def _decoded(self) -> Iterator[Any]:
        """The frames from here on; what does not decode is noted in `_damage` and skipped."""
        import av

        packets = self._container.demux(self._stream)
        last = 0.0
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError:  # the file ends within a packet, or its index points nowhere
                return
            if packet is None:
                return
            last = self._time(packet.pts) if packet.pts is not None else last
            try:
                frames = packet.decode()
            except av.error.EOFError:
                return
            except av.error.FFmpegError:
                self._damage.append(last)
                continue
            if packet.is_corrupt:
                self._damage.append(last)
            yield from (frame for frame in frames if frame.pts is not None)


class VideoTrack(_Track):
    """Frames at given times of a video stream; cheap for ascending times."""

    def __init__(self, container: Any, stream: Any) -> None:
        from av.video.reformatter import VideoReformatter

        super().__init__(container, stream, start_of(stream))
        self._reformatter = VideoReformatter()
        self._shown: Any = None  # on display at the position reached
        self._next: Any = None

    def _seek(self, seconds: float) -> None:
        super()._seek(seconds)
        self._shown = self._next = None

    def _advance(self) -> None:
        self._shown, self._next = self._next, next(self._frames, None)
        frame = self._next
        if frame is None:
            return
        now = self._time(frame.pts)
        if frame.is_corrupt:
            self._damage.append(now)
        elif frame.key_frame:  # nothing refers to frames before it any more
            self._damage = [moment for moment in self._damage if moment >= now]

    def _end(self, frame: Any) -> float:
        duration = frame.duration or 0
        rate = self._stream.average_rate or self._stream.guessed_rate or 25
        return self._time(frame.pts + duration) if duration else self._time(frame.pts) + 1 / float(rate)

    def read(self, start: float, count: int | None, fps: float, size: tuple[int, int] | None) -> np.ndarray:
        """Frames from `start` on, at `fps`: each the one on display in the middle of its interval.

        Args:
            count: how many; None: up to the end.
            size: (height, width): scaled to cover it, cropped at the centre; None: as displayed.

        Returns:
            uint8 [count,H,W,3].

        Raises:
            MediaError: the track ends before, or a frame in the range is damaged.
        """
        begin = start + 0.5 / fps + 1e-6  # on a boundary the later frame counts
        here = self._time(self._shown.pts) if self._shown is not None else 0.0
        if begin < here or begin > here + _SEEK_AFTER:
            self._seek(begin)
        images: list[np.ndarray] = []
        made_of = None
        while count is None or len(images) < count:
            moment = begin + len(images) / fps
            while self._shown is None or (self._next is not None and self._time(self._next.pts) <= moment):
                self._advance()
                if self._shown is None and self._next is None:
                    raise MediaError("no frame could be decoded" + (f" after {start:.2f} s" if start else ""))
            # Frames shortly before a damaged one may refer to it, hence the slack.
            if any(moment > broken - 0.1 for broken in self._damage):
                raise MediaError(f"its video is damaged near {moment:.2f} s")
            if self._next is None and moment >= self._end(self._shown):
                if count is None:
                    break
                end = self._end(self._shown)
                raise MediaError(f"its video ends at {end:.2f} s, before {start + count / fps:.2f} s")
            same = made_of is self._shown
            images.append(images[-1] if same else self._to_rgb(self._shown, size))
            made_of = self._shown
        if not images:
            raise MediaError(f"its video ends before {start:.2f} s")
        return np.stack(images)

    def _to_rgb(self, frame: Any, size: tuple[int, int] | None) -> np.ndarray:
        """A decoded frame as uint8 [H,W,3]: square pixels, upright, covering `size`, centre crop."""
        from av.video.reformatter import Colorspace, Interpolation

        transpose, mirror, upset = orientation(frame)
        height, width = square_pixels(frame, self._stream)
        wanted = size[::-1] if size and transpose else size
        if wanted is not None:
            scale = max(wanted[0] / height, wanted[1] / width)
            height, width = max(wanted[0], round(height * scale)), max(wanted[1], round(width * scale))
        # Untagged material follows the broadcast habit: BT.709 from 720 lines up, BT.601 below.
        untagged = int(frame.colorspace) == 2
        colours = (Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601) if untagged else None
        quality = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
        rgb = self._reformatter.reformat(
            frame,
            width,
            height,
            "rgb24",
            src_colorspace=colours,
            interpolation=quality,
            threads=1,  # the default starts several for every frame
        ).to_ndarray()
        rgb = rgb.transpose(1, 0, 2) if transpose else rgb
        rgb = rgb[:, ::-1] if mirror else rgb
        rgb = rgb[::-1] if upset else rgb
        if size is not None:
            top, left = (rgb.shape[0] - size[0]) // 2, (rgb.shape[1] - size[1]) // 2
            rgb = rgb[top : top + size[0], left : left + size[1]]
        return rgb


class AudioTrack(_Track):
    """Any time range of an audio stream, resampled; silence outside of the track."""

    def __init__(self, container: Any, stream: Any, origin: float) -> None:
        """Args: origin: time 0 on the container's clock [s]."""
        import av

        super().__init__(container, stream, origin)
        self._rate = int(stream.codec_context.sample_rate)
        self._to_float = av.AudioResampler(format="fltp")
        self._layout = ""
        # (first sample on the file's clock, fp32 [channels,n])
        self._chunks: list[tuple[int, np.ndarray]] = []
        self._done = False
        self._gone = -(1 << 60)  # samples before this one were skipped or dropped

    def _seek(self, seconds: float) -> None:
        super()._seek(seconds)
        self._chunks, self._done = [], False

    @property
    def _reached(self) -> int:
        return self._chunks[-1][0] + self._chunks[-1][1].shape[1] if self._chunks else -(1 << 60)

    def _decode_until(self, sample: int) -> None:
        while not self._done and self._reached < sample:
            frame = next(self._frames, None)
            if frame is None:
                self._done = True
                return
            stamped = round(self._time(frame.pts) * self._rate)
            for part in self._to_float.resample(frame):
                values = part.to_ndarray()
                layout = part.layout.name
                if self._layout and layout != self._layout:
                    raise MediaError(f"its audio changes from {self._layout} to {layout} half-way")
                self._layout = layout
                contiguous = abs(stamped - self._reached) < _RESYNC * self._rate
                stamped = self._reached if contiguous else stamped
                self._chunks.append((stamped, values))
                stamped += values.shape[1]

    def read(self, start: float, count: int | None, rate: int, channels: int) -> np.ndarray:
        """`count` samples at `rate` from `start` on (None: to the end), silence outside of the track.

        Returns:
            fp32 [channels,count], clipped to [-1,1].

        Raises:
            MediaError: the audio in the range is damaged.
        """
        first = round(start * rate)
        step = gcd(self._rate, rate)
        up, down = rate // step, self._rate // step
        # Both clocks meet every `up` samples of ours; start there, early enough for the resampling filter.
        blocks = max(1, -(-self._rate // (20 * down)))  # about 50 ms
        begin = first // up - blocks
        source_first = begin * down
        source_last = 1 << 60 if count is None else ((first + count) // up + blocks + 1) * down
        ahead = source_first > max(self._reached, 0) + _SEEK_AFTER * self._rate
        if ahead or source_first < self._gone:
            self._seek(source_first / self._rate - 0.2)  # decoders need a frame or two to settle
            self._gone = source_first if source_first > 0 else -(1 << 60)
        self._decode_until(source_last)
        if any(start - 0.1 < broken and (count is None or broken < start + count / rate) for broken in self._damage):
            raise MediaError(f"its audio is damaged near {max(start, 0):.2f} s")
        if count is None:
            source_last = max(self._reached, source_first)
            count = max(0, round(source_last / self._rate * rate) - first)
        while self._chunks and (end := self._chunks[0][0] + self._chunks[0][1].shape[1]) <= source_first:
            self._chunks.pop(0)
            self._gone = max(self._gone, end)
        lanes = self._chunks[0][1].shape[0] if self._chunks else 1
        timeline = np.zeros((lanes, max(0, source_last - source_first)), dtype=np.float32)
        for at, values in self._chunks:
            low, high = max(at, source_first), min(at + values.shape[1], source_last)
            if high > low:
                timeline[:, low - source_first : high - source_first] = values[:, low - at : high - at]
        wave = resample(mix(timeline, self._layout, self._rate, channels), self._rate, rate)
        wave = wave[:, first - begin * up :][:, :count]
        return np.clip(np.pad(wave, ((0, 0), (0, count - wave.shape[1]))), -1.0, 1.0)


def mix(wave: np.ndarray, layout: str, rate: int, channels: int) -> np.ndarray:
    """[lanes,n] -> [channels,n] for one or two channels; a mono signal keeps its level."""
    if wave.shape[0] > 2:
        wave = _filtered(wave, layout, rate, "aresample=rematrix_maxval=1.0,aformat=channel_layouts=stereo")
    if channels == 1:
        return wave.mean(axis=0, keepdims=True)
    return np.repeat(wave, 2, axis=0) if wave.shape[0] == 1 else wave


def resample(wave: np.ndarray, source: int, target: int) -> np.ndarray:
    """[lanes,n] at `source` Hz -> [lanes, about n * target / source] at `target` Hz, for one or two lanes."""
    if source == target or not wave.shape[1]:
        return wave
    return _filtered(wave, "mono" if wave.shape[0] == 1 else "stereo", source, f"aresample={target}")


def _filtered(wave: np.ndarray, layout: str, rate: int, filters: str) -> np.ndarray:
    """A waveform fp32 [lanes,n] through a chain of ffmpeg audio filters."""
    import av

    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=rate, format="fltp", layout=layout, time_base=Fraction(1, rate))
    nodes = [source]
    for item in filters.split(","):
        name, _, arguments = item.partition("=")
        nodes.append(graph.add(name, arguments))
    nodes.append(graph.add("abuffersink"))
    graph.link_nodes(*nodes).configure()
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave), format="fltp", layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    source.push(frame)
    source.push(None)
    sink: Any = nodes[-1]
    parts = []
    while True:
        try:
            parts.append(sink.pull().to_ndarray())
        except (av.error.EOFError, av.error.BlockingIOError):
            return np.concatenate(parts, axis=1) if parts else wave[:, :0]
