"""One track of an opened media file: frames of a video, samples of an audio stream, at any times.

Frames are deinterlaced and in BT.709 colours; audio is mixed to mono or stereo and resampled.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from magihuman.media import colour
from magihuman.media.container import (
    LONGEST_AUDIO,
    MOST_BYTES,
    MOST_PIXELS,
    MediaError,
    orientation,
    square_pixels,
    start_of,
)

# Seconds; a shorter gap is decoded and dropped, since a seek lands a key frame early anyway.
_SEEK_AFTER = 8.0
_RESYNC = 0.02  # seconds; audio time stamps that disagree by less are the container's rounding


def too_long(seconds: float) -> MediaError:
    """The error for audio longer than `LONGEST_AUDIO`."""
    return MediaError(f"it lasts {seconds:.0f} s, and {LONGEST_AUDIO:g} s is the most; cut the part you mean")


def conversion(frame: Any) -> str:
    """`colour.conversion` of a frame, whose ValueError becomes a MediaError."""
    try:
        return colour.conversion(int(frame.color_trc), int(frame.color_primaries), int(frame.colorspace))
    except ValueError as error:
        raise MediaError(str(error)) from error


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
            if images and (len(images) + 1) * images[0].nbytes > MOST_BYTES:
                raise MediaError(f"its frames from {start:.2f} s on need more than {MOST_BYTES >> 30} GB of memory")
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
        if height * width > MOST_PIXELS:
            raise MediaError(f"its frames, {width} x {height} with square pixels, are too large")
        # Untagged material follows the broadcast habit: BT.709 from 720 lines up, BT.601 below.
        transfer, primaries = int(frame.color_trc), int(frame.color_primaries)
        colours = None
        if int(frame.colorspace) == colour.UNKNOWN and primaries == colour.BT2020:
            colours = Colorspace.BT2020
        elif int(frame.colorspace) == colour.UNKNOWN:
            colours = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
        converted = conversion(frame)
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
                raise too_long(stamped / self._rate)
            for part in self._mixer.filtered(frame):
                values = part.to_ndarray()
                self._chunks.append((stamped, values))
                stamped += values.shape[1]
                self._held += values.nbytes
                if self._held > MOST_BYTES:
                    raise MediaError(f"its audio needs more than {MOST_BYTES >> 30} GB of memory at once")

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
