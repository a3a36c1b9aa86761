"""A clip to be measured: a media file with its prompt, its reference and what else is known of it, decoded when asked for.

    clip = ClipFile(Path("a.mp4"), prompt="A woman ... Dialogue: ...")
    clip.frames, clip.fps, clip.wave(16000)

Frames are decoded at the file's own frame rate and size; audio is mixed to one channel, or comes in its own one or two.
Nothing longer than `MAX_SECONDS` and no frames of more than `MAX_BYTES` are decoded: the error says so before memory is taken.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from magihuman.media.reading import MediaInfo

MAX_SECONDS = 120.0
MAX_BYTES = 6 * 1024**3
RATES = (1.0, 240.0)
"""Frames per second of clips that are read. A container that says another number, 0 among them, is damaged or no clip."""
SILENT_PEAK = 1e-3
"""-60 dB of full scale: audio below counts as silent."""
CANCELLED = 0.1
"""The mean of two channels below this share of the louder one (-20 dB, both RMS) is not what is heard; of one channel alone it
has a half."""


class NotMeasured(Exception):
    """Raised by a measurement that does not apply to a clip: no audio, no reference, nobody speaks. The status is `skipped`.

    A measurement that cannot read or parse what it should raises `MeasurementError` instead: the status is `failed`.
    """


class MeasurementError(Exception):
    """Raised by a measurement that applies and gives no value: an answer that cannot be parsed. The status is `failed`.

    Any other exception of a measurement is recorded as failed, too, with its type.

    Args:
        texts: of the clip's row, as from `measure`, such as the answer; keys end in "_text".
    """

    def __init__(self, reason: str, texts: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.texts = dict(texts or {})


class UnreadableClip(Exception):
    """A file that is no readable clip, or a longer one than is read, with the reason."""


class _Media:
    """A media file; what was decoded is kept until `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waves: dict[int, np.ndarray] = {}
        self.pairs: dict[int, np.ndarray] = {}

    @cached_property
    def info(self) -> "MediaInfo":
        from magihuman.errors import UserError
        from magihuman.media.reading import probe

        try:
            info = probe(self.path)
        except (UserError, OSError) as error:
            raise UnreadableClip(_reason(error)) from error
        if info.seconds > MAX_SECONDS:
            raise UnreadableClip(f"it lasts {info.seconds:.0f} s, and {MAX_SECONDS:.0f} s is the most")
        if info.kind == "video" and not RATES[0] <= info.fps <= RATES[1]:  # also for NaN
            raise UnreadableClip(
                f"its container says {info.fps:g} frames per second, and {RATES[0]:g} to {RATES[1]:g} are read; write it anew, "
                "such as by ffmpeg -r 25"
            )
        return info

    @property
    def video(self) -> "MediaInfo":
        if self.info.kind == "audio":
            raise NotMeasured("the file has no video")
        if self.info.kind == "image":
            raise NotMeasured("the file has one frame")
        return self.info

    @cached_property
    def frames(self) -> np.ndarray:
        return self.read(self.video.fps, None)

    def read(self, fps: float, size: tuple[int, int] | None) -> np.ndarray:
        from magihuman.errors import UserError
        from magihuman.media.reading import read_clip

        info = self.video
        height, width = size or (info.height, info.width)
        needed = (info.seconds * fps + 1) * height * width * 3
        if needed > MAX_BYTES:
            raise UnreadableClip(
                f"its frames need {needed / 1024**3:.1f} GiB, and {MAX_BYTES / 1024**3:.0f} is the most"
            )
        try:
            return read_clip(self.path, fps=fps, size=size).frames.numpy()
        except (UserError, OSError) as error:
            raise UnreadableClip(_reason(error)) from error

    def wave(self, rate: int) -> np.ndarray:
        if not self.info.has_audio:
            raise NotMeasured("the file has no audio")
        if rate not in self.waves:
            wave = self._sound(rate, 1)[0]
            if self.info.audio_channels > 1:
                mean, own = (
                    np.sqrt(np.square(x).mean(-1)).max() if x.size else 0.0 for x in (wave, self.channels(rate))
                )
                if mean < CANCELLED * own and np.abs(self.channels(rate)).max() >= SILENT_PEAK:
                    raise MeasurementError(
                        f"its channels cancel: their mean has {mean / own:.1%} of the louder one, and one channel is measured"
                    )
            self.waves[rate] = wave
        return self.waves[rate]

    def channels(self, rate: int) -> np.ndarray:
        if self.info.audio_channels < 2:
            return self.wave(rate)[None]
        if rate not in self.pairs:
            self.pairs[rate] = self._sound(rate, 2)
        return self.pairs[rate]

    def _sound(self, rate: int, channels: int) -> np.ndarray:
        """fp32 [channels,N]."""
        from magihuman.errors import UserError
        from magihuman.media.reading import read_audio, read_sound

        try:
            if self.info.kind == "video":
                known = "frames" in self.__dict__
                count = len(self.frames) if known else round(self.info.seconds * self.info.fps)
                wave = read_sound(self.path, round(count * rate / self.info.fps), rate, channels)
            else:
                wave = read_audio(self.path, rate, channels)
        except (UserError, OSError) as error:
            raise UnreadableClip(_reason(error)) from error
        return np.zeros((channels, 0), np.float32) if wave is None else wave.numpy()

    def release(self) -> None:
        self.__dict__.pop("frames", None)
        self.waves.clear()
        self.pairs.clear()


@dataclass(eq=False)
class ClipFile:
    """A clip with what is known of it; frames and audio are decoded on first use and kept until `release`.

    Attributes:
        path: of the media file.
        name: identity in results; by default the file's name without its suffix.
        prompt: the whole text that it was made from, "" where unknown.
        dialogue: spoken words that are asked for, None where unknown, "" where nobody should speak.
        language: ISO 639 code ("en", "zh", "yue", ...) or a name ("Chinese"), None where not declared.
        group: clips of one group (a prompt) are alike and resampled together; by default the prompt, else the name.
        part: of a suite, such as "set1" or "age/19-30"; results are given by part, too.
        reference: the true clip, None without one.
        voice, image: files with the voice and the first frame that were given, None without.
    """

    path: Path
    name: str = ""
    prompt: str = ""
    dialogue: str | None = None
    language: str | None = None
    group: str = ""
    reference: "ClipFile | None" = None
    voice: Path | None = None
    image: Path | None = None
    part: str = ""
    media: _Media = field(default=None, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.name = self.name or self.path.stem
        self.group = self.group or self.prompt or self.name
        self.media = self.media or _Media(self.path)

    @property
    def info(self) -> "MediaInfo":
        """Size, frame rate, length, tracks.

        Raises:
            UnreadableClip: empty, truncated, no media, too long, or with an impossible frame rate.
        """
        return self.media.info

    @property
    def fps(self) -> float:
        """Frames per second of the file; of `frames`, too."""
        return self.media.info.fps

    @property
    def frames(self) -> np.ndarray:
        """All frames, uint8 [F,H,W,3] RGB.

        Raises:
            NotMeasured: the file has no video, or one frame.
            UnreadableClip: it cannot be decoded, or is larger than `MAX_BYTES`.
        """
        return self.media.frames

    def frames_at(self, fps: float, size: tuple[int, int] | None = None) -> np.ndarray:
        """Frames at another rate, scaled and cropped to `size` (height, width): uint8 [F,H,W,3]; errors as of `frames`."""
        return self.media.read(fps, size)

    @property
    def has_audio(self) -> bool:
        """Whether the file has an audio track; errors as of `info`."""
        return self.media.info.has_audio

    def wave(self, rate: int) -> np.ndarray:
        """The audio from the first frame on, mixed to one channel: fp32 [N] in [-1,1] at `rate` Hz.

        As long as the video, padded with silence; the whole track of a file without video.

        Raises:
            NotMeasured: the file has no audio.
            MeasurementError: two channels cancel each other, so that their mean is not what is heard.
            UnreadableClip: it cannot be decoded.
        """
        return self.media.wave(rate)

    def channels(self, rate: int) -> np.ndarray:
        """The audio as `wave` gives it, in its own channels: fp32 [1,N], or [2,N] of two or more.

        Raises:
            NotMeasured: the file has no audio.
            UnreadableClip: it cannot be decoded.
        """
        if not self.has_audio:
            raise NotMeasured("the file has no audio")
        return self.media.channels(rate)

    def only(self, inputs: Collection[str]) -> "ClipFile":
        """The clip with what a measurement declares that it uses: no reference, prompt, dialogue, voice or image besides.

        Args:
            inputs: as of `eval.metrics.registry.Measurement`; "dialogue" includes the language.
        """
        return replace(
            self,
            prompt=self.prompt if "prompt" in inputs else "",
            dialogue=self.dialogue if "dialogue" in inputs else None,
            language=self.language if "dialogue" in inputs else None,
            reference=self.reference if "reference" in inputs else None,
            voice=self.voice if "voice" in inputs else None,
            image=self.image if "image" in inputs else None,
        )

    def release(self) -> None:
        """Forget decoded frames and audio, the reference's too."""
        self.media.release()
        if self.reference is not None:
            self.reference.release()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
