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
import math
import os
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from magihuman.errors import UserError
from magihuman.media import colour

if TYPE_CHECKING:  # torch takes a second to import and probing files does not need it
    import torch
    from PIL.Image import Image as Picture

LONGEST_AUDIO = 300.0
"""Seconds of the longest audio that `read_audio` reads."""
LONGEST_VIDEO = 86_400.0
"""Seconds of the longest video that `data.prepare` cuts into clips; a sparse file can claim years."""

# Limits that are checked before memory is taken.
_MOST_PIXELS = 1 << 27  # of an image or frame; the largest phone cameras that are not pixel-binned have 108 million
_MOST_BYTES = 1 << 32  # of one clip's frames, or of the audio held at once
_MOST_CHANNELS = 64  # libswresample's own limit
_MOST_RATE = 1_000_000  # Hz
_MOST_STREAMS = 100
_PATIENCE = 60.0  # seconds without progress in opening or reading a file

# Image formats that Pillow reads without starting other programs, as it does for EPS.
_IMAGES = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM", "JPEG2000")
# Demuxers that may be chosen from a file's content. Playlists (hls, concat, dash) are left out on purpose: a text
# file named .mp4 must not make us open other files or the network. So are `tty` and image patterns.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,flv,asf,ogg,wav,w64,aiff,mp3,flac,aac,"
    "ivf,mxf,caf,amr,ac3,eac3,obu,dv,rm,nut,au,apng"
)
# Seconds; a shorter gap is decoded and dropped, since a seek lands a key frame early anyway.
_SEEK_AFTER = 8.0
_LONGEST_CODED_FRAME = 0.5
_RESYNC = 0.02  # seconds; audio time stamps that disagree by less are the container's rounding
_LOOK_AHEAD = 1000  # packets read to find out which video stream holds more than one frame


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
    image = _probe_image(path)
    if image is not None:
        return image
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
        track = _choice([stream for stream in container.streams.video if not _is_cover(stream)], video, "video")
        note = "; ".join(filter(None, (_conversion(first), "deinterlaced" if interlaced else "", track)))
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


def _conversion(frame: Any) -> str:
    """`colour.conversion` of a frame, whose ValueError becomes a MediaError."""
    try:
        return colour.conversion(int(frame.color_trc), int(frame.color_primaries), int(frame.colorspace))
    except ValueError as error:
        raise MediaError(str(error)) from error


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
        track = AudioTrack(container, stream, start_of(stream), open_ended=_open_ended(path))
        if seconds > LONGEST_AUDIO:
            raise _too_long(seconds)
        wave = track.read(0.0, None, rate, channels)
    # Coded frames are longer than the audio in them; a longer rest means that the length was only an estimate.
    if seconds and wave.shape[1] < (seconds + _LONGEST_CODED_FRAME) * rate:
        wave = wave[:, : max(1, round(seconds * rate))]
    if not wave.shape[1]:
        raise MediaError("holds no audio")
    return torch.from_numpy(np.ascontiguousarray(wave))


def _too_long(seconds: float) -> MediaError:
    return MediaError(f"it lasts {seconds:.0f} s, and {LONGEST_AUDIO:g} s is the most; cut the part you mean")


def _open_ended(path: str | Path) -> bool:
    """Whether a WAV or CAF file leaves the length of its samples open, as programs do that write to a pipe."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if head[:4] == b"caff":
        return b"data" + b"\xff" * 8 in head
    at = 12
    while head[:4] == b"RIFF" and head[8:12] == b"WAVE" and at + 8 <= len(head):
        size = int.from_bytes(head[at + 4 : at + 8], "little")
        if head[at : at + 4] == b"data":
            return size == 0 or size >= 0x7FFF0000  # 2^32 - 1, 2^31 - 1, or somewhat less
        at += 8 + size + size % 2
    return False


# -------------------------------------------------------------------------------------------------- images


def _probe_image(path: str | Path) -> MediaInfo | None:
    """Facts about an image file; None when Pillow cannot read it or it is a video to us (animated)."""
    from PIL import UnidentifiedImageError

    try:
        with _image_file(path) as file:
            if getattr(file, "is_animated", False) and file.format not in ("MPO", "TIFF"):
                if file.format == "WEBP":
                    raise MediaError("is an animated WebP image, which is not read here; convert it to mp4")
                return None
        image, note = open_image(path)
    except UnidentifiedImageError:
        if _kind_of(path) == "a HEIC photo":  # its tiles would pass for videos
            raise MediaError(_not_an_image(path)) from None
        return None
    except (OSError, SyntaxError, ValueError) as error:
        raise MediaError(f"cannot be read: {reason(error)}") from error
    return MediaInfo("image", *image.size, note=note)


@contextlib.contextmanager
def _image_file(path: str | Path) -> Iterator[Any]:
    """A file opened by Pillow, not decoded yet; raises MediaError if it has too many pixels."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the limit is ours; palettes with transparency warn too
        try:
            file = Image.open(path, formats=_IMAGES)
        except Image.DecompressionBombError as error:
            raise MediaError("the image is too large to be opened safely; shrink it") from error
        with file:
            if file.width * file.height > _MOST_PIXELS:
                size = f"{file.width} x {file.height}"
                raise MediaError(f"the image is too large to be opened safely ({size} pixels); shrink it")
            yield file


def open_image(path: str | Path) -> tuple[Picture, str]:
    """An image file as a Pillow image, upright and RGB (`colour.image_to_rgb`), and a note on what was changed, or "".

    Raises:
        MediaError: not a readable image, or more than 134 million pixels.
    """
    from PIL import UnidentifiedImageError

    try:
        with _image_file(path) as file:
            image, note = colour.image_to_rgb(file)
            if not file.info.get("icc_profile") and (coded := _coded_colours(path)):
                image, changed = colour.image_to_sdr(image, *coded)
                note = "; ".join(filter(None, (note, changed)))
            pages = getattr(file, "n_frames", 1) if file.format != "MPO" else 1  # MPO: previews of phones
    except UnidentifiedImageError as error:
        raise MediaError(_not_an_image(path)) from error
    except MediaError:
        raise
    except Exception as error:  # decoders of damaged files raise errors of many kinds
        raise MediaError(f"cannot be read: {reason(error)}") from error
    first = f"the first of its {pages} images" if pages > 1 else ""
    return image, "; ".join(filter(None, (first, note)))


def _coded_colours(path: str | Path) -> tuple[int, int] | None:
    """(transfer, primaries) of H.273 that an AVIF (nclx) or PNG (cICP) file states."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if (at := head.find(b"colrnclx")) >= 0:
        primaries, transfer = struct.unpack_from(">HH", head, at + 8)
        return transfer, primaries
    if head[:4] == b"\x89PNG" and (at := head.find(b"cICP", 0, head.find(b"IDAT"))) >= 0:
        return head[at + 5], head[at + 4]
    return None


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> torch.Tensor:
    """An image file, upright; transparency is dropped: uint8 [1,H,W,3].

    Args:
        size: (height, width): scaled to cover it and cropped at the centre; None keeps the image's own.

    Raises:
        MediaError: not a readable image.
    """
    import torch
    from PIL import Image, ImageOps

    image, _ = open_image(path)
    if size is not None and image.size != (size[1], size[0]):
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)[None])


def _kind_of(path: str | Path) -> str:
    """What a file without a reader is, by its first bytes; "" if that is not known."""
    with open(path, "rb") as file:
        head = file.read(512)
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        return "a HEIC photo"
    if b"<svg" in head:
        return "an SVG drawing"
    kinds = {b"%PDF": "a PDF document", b"%!PS": "a PostScript document", b"8BPS": "a Photoshop document"}
    return kinds.get(head[:4], "")


def _not_an_image(path: str | Path) -> str:
    kind = _kind_of(path)
    return f"is {kind}, which is not read here; export it as JPEG or PNG" if kind else "is not a readable image"


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
        options = {
            "format_whitelist": _CONTAINERS,
            "protocol_whitelist": "file",
            "max_streams": str(_MOST_STREAMS),
            "max_pixels": str(_MOST_PIXELS),  # of the decoders that look at the first frames
        }
        with av.open(full, options=options, metadata_errors="replace", timeout=_PATIENCE) as container:
            for stream in container.streams.video:
                if stream.codec_context is not None:
                    stream.codec_context.options = {"max_pixels": str(_MOST_PIXELS)}
            yield container
    except (av.error.FFmpegError, OSError, EOFError) as error:
        raise MediaError(f"cannot be read: {reason(error)}") from error


def video_stream(container: Any) -> Any | None:
    """The video stream to show: no cover image, with more than one frame, flagged as default, the largest.

    Raises:
        MediaError: its frames are too large.
    """
    from av.stream import Disposition

    streams = [s for s in container.streams.video if s.codec_context is not None and not _is_cover(s)]
    moving = _moving(container, streams) if len(streams) > 1 else set()

    def cost(stream: Any) -> tuple[bool, bool, int, int]:
        area = stream.codec_context.width * stream.codec_context.height
        return stream.index not in moving, not stream.disposition & Disposition.default, -area, stream.index

    chosen = min(streams, key=cost, default=None)
    if chosen is not None and chosen.codec_context.width * chosen.codec_context.height > _MOST_PIXELS:
        raise MediaError(f"its frames of {chosen.codec_context.width} x {chosen.codec_context.height} are too large")
    return chosen


def _is_cover(stream: Any) -> bool:
    from av.stream import Disposition

    kinds = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    return bool(stream.disposition & kinds)


def _moving(container: Any, streams: list[Any]) -> set[int]:
    """Indices of the streams that hold more than one frame, by their own count or among the first packets."""
    counts = {stream.index: stream.frames for stream in streams}
    unknown = [index for index, count in counts.items() if not count]
    if unknown:
        with opened(container.name) as file:
            for number, packet in enumerate(file.demux([file.streams[index] for index in unknown])):
                counts[packet.stream.index] += packet.size > 0
                if number == _LOOK_AHEAD or all(counts[index] > 1 for index in unknown):
                    break
    return {index for index, count in counts.items() if count > 1}


def audio_stream(container: Any) -> Any | None:
    """The audio stream to hear: flagged as default, rather no commentary or description, the first.

    Raises:
        MediaError: its sample rate or number of channels is beyond all use.
    """
    from av.stream import Disposition

    extra = Disposition.comment | Disposition.hearing_impaired | Disposition.visual_impaired | Disposition.descriptions
    streams = [s for s in container.streams.audio if s.codec_context is not None and s.codec_context.sample_rate]
    stream = min(
        streams,
        key=lambda s: (not s.disposition & Disposition.default, bool(s.disposition & extra), s.index),
        default=None,
    )
    if stream is not None:
        rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
        if rate > _MOST_RATE or channels > _MOST_CHANNELS:
            raise MediaError(
                f"its audio has {channels} channels at {rate} Hz; at most {_MOST_CHANNELS} at {_MOST_RATE} Hz are read"
            )
    return stream


def start_of(stream: Any) -> float:
    """Time of a stream's first frame on the container's clock [s]."""
    return float((stream.start_time or 0) * stream.time_base)


def seconds_of(container: Any, stream: Any) -> float:
    """Length of a stream: its own field, its tag (Matroska), or the end of its last packet."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    clock = stream.metadata.get("DURATION", "").split(":")
    if len(clock) == 3:
        with contextlib.suppress(ValueError, OverflowError):
            end = int(clock[0]) * 3600 + int(clock[1]) * 60 + float(clock[2])
            if math.isfinite(end):
                return end - start_of(stream)
    rate = getattr(stream, "average_rate", None)
    usual = round(1 / (rate * stream.time_base)) if rate else 0  # for FLV and others without packet durations
    ends = (p.pts + (p.duration or usual) for p in container.demux(stream) if p.pts is not None)
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

    def __init__(self, container: Any, stream: Any, origin: float, open_ended: bool = False) -> None:
        self._container, self._stream, self._origin = container, stream, origin
        self._open_ended = open_ended
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
            if packet.is_corrupt and not self._open_ended:
                self._damage.append(last)
            yield from (frame for frame in frames if frame.pts is not None)


class VideoTrack(_Track):
    """Frames at given times of a video stream, deinterlaced and in BT.709 colours; cheap for ascending times."""

    def __init__(self, container: Any, stream: Any) -> None:
        from av.video.reformatter import VideoReformatter

        super().__init__(container, stream, start_of(stream))
        self._reformatter = VideoReformatter()
        self._shown: Any = None  # on display at the position reached
        self._next: Any = None

    def _seek(self, seconds: float) -> None:
        super()._seek(seconds)
        self._shown = self._next = None

    def _decoded(self) -> Iterator[Any]:
        """The frames from here on; interlaced ones become whole frames (bwdif), from the first such on."""
        graph, shape = None, None
        for frame in super()._decoded():
            if graph is not None and shape != (frame.width, frame.height, frame.format.name):
                yield from self._stamped(graph.flush())
                graph = None
            if graph is None and frame.interlaced_frame:
                shape = (frame.width, frame.height, frame.format.name)
                graph = _Filters("bwdif=mode=send_frame:deint=interlaced", video=(self._stream, frame))
            yield from [frame] if graph is None else self._stamped(graph.filtered(frame))
        if graph is not None:
            yield from self._stamped(graph.flush())

    def _stamped(self, frames: Iterator[Any]) -> Iterator[Any]:
        """Filtered frames on the stream's clock again."""
        base = self._stream.time_base
        for frame in frames:
            frame.pts, frame.duration = round(frame.pts * frame.time_base / base), 0
            frame.time_base = base
            yield frame

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
            if images and (len(images) + 1) * images[0].nbytes > _MOST_BYTES:
                raise MediaError(f"its frames from {start:.2f} s on need more than {_MOST_BYTES >> 30} GB of memory")
            images.append(images[-1] if same else self._to_rgb(self._shown, size))
            made_of = self._shown
            if images[-1].shape != images[0].shape:
                raise MediaError(f"its frame size changes at {moment:.2f} s")
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
        if height * width > _MOST_PIXELS:
            raise MediaError(f"its frames, {width} x {height} with square pixels, are too large")
        # Untagged material follows the broadcast habit: BT.709 from 720 lines up, BT.601 below.
        transfer, primaries = int(frame.color_trc), int(frame.color_primaries)
        colours = None
        if int(frame.colorspace) == colour.UNKNOWN and primaries == colour.BT2020:
            colours = Colorspace.BT2020
        elif int(frame.colorspace) == colour.UNKNOWN:
            colours = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
        converted = _conversion(frame)
        quality = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
        rgb = self._reformatter.reformat(
            frame,
            width,
            height,
            "rgb48le" if converted else "rgb24",
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
        return colour.to_sdr(rgb, transfer, primaries) if converted else rgb


class AudioTrack(_Track):
    """Any time range of an audio stream, as mono or stereo, resampled; silence outside of the track."""

    def __init__(self, container: Any, stream: Any, origin: float, *, open_ended: bool = False) -> None:
        """
        Args:
            origin: time 0 on the container's clock [s].
            open_ended: the file's header leaves the length open, so its last packet may be short.
        """
        super().__init__(container, stream, origin, open_ended)
        self._rate = int(stream.codec_context.sample_rate)
        self._mixer: _Filters | None = None
        self._form = ""  # layout and rate of the decoded frames
        # (first sample on the file's clock, fp32 [channels,n])
        self._chunks: list[tuple[int, np.ndarray]] = []
        self._held = 0  # their bytes
        self._done = False
        self._gone = -(1 << 60)  # samples before this one were skipped or dropped

    def _seek(self, seconds: float) -> None:
        super()._seek(seconds)
        self._chunks, self._held, self._done = [], 0, False

    @property
    def _reached(self) -> int:
        return self._chunks[-1][0] + self._chunks[-1][1].shape[1] if self._chunks else -(1 << 60)

    def _decode_until(self, sample: int, limit: float) -> None:
        """Decode up to a sample; raises MediaError for audio after sample `limit`."""
        while not self._done and self._reached < sample:
            frame = next(self._frames, None)
            if frame is None:
                self._done = True
                return
            form = f"{frame.layout.name} at {frame.sample_rate} Hz"
            if self._mixer is None:
                self._form, self._mixer = form, _Filters(_mixing(frame), audio=frame)
            if form != self._form:
                raise MediaError(f"its audio changes from {self._form} to {form} half-way")
            stamped = round(self._time(frame.pts) * self._rate)
            contiguous = abs(stamped - self._reached) < _RESYNC * self._rate
            stamped = self._reached if contiguous else stamped
            if stamped > limit:
                raise _too_long(stamped / self._rate)
            for part in self._mixer.filtered(frame):
                values = part.to_ndarray()
                self._chunks.append((stamped, values))
                stamped += values.shape[1]
                self._held += values.nbytes
                if self._held > _MOST_BYTES:
                    raise MediaError(f"its audio needs more than {_MOST_BYTES >> 30} GB of memory at once")

    def read(self, start: float, count: int | None, rate: int, channels: int) -> np.ndarray:
        """`count` samples at `rate` from `start` on (None: to the end), silence outside of the track.

        Returns:
            fp32 [channels,count], clipped to [-1,1].

        Raises:
            MediaError: the audio in the range is damaged, or goes on beyond `LONGEST_AUDIO` where the end is asked for.
        """
        first = round(start * rate)
        step = math.gcd(self._rate, rate)
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
        self._decode_until(source_last, LONGEST_AUDIO * self._rate if count is None else math.inf)
        if any(start - 0.1 < broken and (count is None or broken < start + count / rate) for broken in self._damage):
            raise MediaError(f"its audio is damaged near {max(start, 0):.2f} s")
        if count is None:
            source_last = max(self._reached, source_first)
            count = max(0, round(source_last / self._rate * rate) - first)
        while self._chunks and (end := self._chunks[0][0] + self._chunks[0][1].shape[1]) <= source_first:
            self._held -= self._chunks.pop(0)[1].nbytes
            self._gone = max(self._gone, end)
        lanes = self._chunks[0][1].shape[0] if self._chunks else 1
        timeline = np.zeros((lanes, max(0, source_last - source_first)), dtype=np.float32)
        for at, values in self._chunks:
            low, high = max(at, source_first), min(at + values.shape[1], source_last)
            if high > low:
                timeline[:, low - source_first : high - source_first] = values[:, low - at : high - at]
        wave = resample(mix(timeline, channels), self._rate, rate)
        wave = wave[:, first - begin * up :][:, :count]
        return np.clip(np.pad(wave, ((0, 0), (0, count - wave.shape[1]))), -1.0, 1.0)


def mix(wave: np.ndarray, channels: int) -> np.ndarray:
    """[lanes,n] -> [channels,n] for one or two of each; a mono signal keeps its level."""
    if channels == 1:
        return wave.mean(axis=0, keepdims=True)
    return np.repeat(wave, 2, axis=0) if wave.shape[0] == 1 else wave


def resample(wave: np.ndarray, source: int, target: int) -> np.ndarray:
    """[lanes,n] at `source` Hz -> [lanes, about n * target / source] at `target` Hz, for one or two lanes."""
    import av

    if source == target or not wave.shape[1]:
        return wave
    layout = "mono" if wave.shape[0] == 1 else "stereo"
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave), format="fltp", layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = source, 0, Fraction(1, source)
    filters = _Filters(f"aresample={target}", audio=frame)
    parts = [part.to_ndarray() for part in (*filters.filtered(frame), *filters.flush())]
    return np.concatenate(parts, axis=1) if parts else wave[:, :0]


def _mixing(frame: Any) -> str:
    """Filters from a decoded audio frame to fp32 in mono or stereo.

    PyAV makes arrays of at most two of our channels only: with eight or more planes it reads beyond the frame.
    """
    count = len(frame.layout.channels)
    if count <= 2:
        return "aformat=sample_fmts=fltp"
    if frame.layout.name == f"{count} channels" and count not in (4, 5, 6, 8):
        # Recorder tracks without positions: their mean. (Of 3 and 7, ffmpeg would take one as LFE and drop it.)
        return f"pan=mono|c0={'+'.join(f'{1 / count}*c{i}' for i in range(count))},aformat=sample_fmts=fltp"
    return "aresample=rematrix_maxval=1.0,aformat=sample_fmts=fltp:channel_layouts=stereo"


class _Filters:
    """A chain of ffmpeg filters, such as "bwdif=deint=interlaced", fed frame by frame.

    Args:
        audio: a frame like those to come; video: their stream and a frame like them.
    """

    def __init__(self, chain: str, *, audio: Any = None, video: tuple[Any, Any] | None = None) -> None:
        import av

        graph = av.filter.Graph()
        if video is None:
            source: Any = graph.add_abuffer(
                sample_rate=audio.sample_rate, format=audio.format.name, layout=audio.layout.name,
                time_base=audio.time_base or Fraction(1, audio.sample_rate),
            )  # fmt: skip
        else:
            stream, frame = video
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format.name, time_base=stream.time_base
            )
        nodes = [source]
        for item in chain.split(","):
            name, _, arguments = item.partition("=")
            nodes.append(graph.add(name, arguments))
        nodes.append(graph.add("abuffersink" if video is None else "buffersink"))
        graph.link_nodes(*nodes).configure()
        self._graph, self._source, self._sink = graph, source, nodes[-1]

    def filtered(self, frame: Any) -> Iterator[Any]:
        """Push a frame; yields those that are ready."""
        import av

        self._source.push(frame)
        with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
            while True:
                yield self._sink.pull()

    def flush(self) -> Iterator[Any]:
        """The frames that are left."""
        return self.filtered(None)
