"""Opening media files through PyAV: containers, the streams to show and to hear, limits and errors."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from magihuman.errors import UserError

LONGEST_AUDIO = 300.0
"""Seconds of the longest audio that `read_audio` reads."""
LONGEST_VIDEO = 86_400.0
"""Seconds of the longest video that `data.prepare` cuts into clips; a sparse file can claim years."""

# Limits that are checked before memory is taken.
MOST_PIXELS = 1 << 27  # of an image or frame; the largest phone cameras that are not pixel-binned have 108 million
MOST_BYTES = 1 << 32  # of one clip's frames, or of the audio held at once
_MOST_CHANNELS = 64  # libswresample's own limit
_MOST_RATE = 1_000_000  # Hz
_MOST_STREAMS = 100
_TIMEOUT = 60.0  # seconds without progress in opening or reading a file

# Demuxers that may be chosen from a file's content. Playlists (hls, concat, dash) are left out on purpose: a text
# file named .mp4 must not make us open other files or the network. So are `tty` and image patterns.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,flv,asf,ogg,wav,w64,aiff,mp3,flac,aac,"
    "ivf,mxf,caf,amr,ac3,eac3,obu,dv,rm,nut,au,apng"
)
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
            "max_pixels": str(MOST_PIXELS),  # of the decoders that look at the first frames
        }
        with av.open(full, options=options, metadata_errors="replace", timeout=_TIMEOUT) as container:
            for stream in container.streams.video:
                if stream.codec_context is not None:
                    stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
            yield container
    except (av.error.FFmpegError, OSError, EOFError) as error:
        raise MediaError(f"cannot be read: {reason(error)}") from error


def video_stream(container: Any) -> Any | None:
    """The video stream to show: no cover image, with more than one frame, flagged as default, the largest.

    Raises:
        MediaError: its frames are too large.
    """
    from av.stream import Disposition

    streams = [s for s in container.streams.video if s.codec_context is not None and not is_cover(s)]
    moving = _moving(container, streams) if len(streams) > 1 else set()

    def cost(stream: Any) -> tuple[bool, bool, int, int]:
        area = stream.codec_context.width * stream.codec_context.height
        return stream.index not in moving, not stream.disposition & Disposition.default, -area, stream.index

    chosen = min(streams, key=cost, default=None)
    if chosen is not None and chosen.codec_context.width * chosen.codec_context.height > MOST_PIXELS:
        raise MediaError(f"its frames of {chosen.codec_context.width} x {chosen.codec_context.height} are too large")
    return chosen


def is_cover(stream: Any) -> bool:
    """Whether a video stream is flagged as a cover, preview or still image of the file."""
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


def is_open_ended(path: str | Path) -> bool:
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
