"""Scores of one puppet's clip: attributes, syllables, lip sync, shape of the lips, noise.

    score_clip(frames, wave, caption).vowels.hits

Lip sync is the Pearson correlation, at frame rate, of the mouth's visible opening with the opening that the audio calls for.
Metrics of a clip are in `eval.metrics.puppet_clips`, sets of clips in `eval.scores`.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data.tiny.puppets import BILABIALS, FPS, LIPS, MOUTHS, WORLDS, parse_caption
from eval.edits import Edits, edits
from eval.puppet_noise import background, hiss_level, hum_level
from eval.puppet_speech import Recognised, called_opening, pitch, recognise
from eval.puppet_vision import FrameMeasures, measure_frames

MAX_LAG = 8  # frames
LOW_VOICE = 157.5  # Hz; low voices lie below
NEAREST_SHIFT = 4  # a syllable lasts 5 to 7 frames: shifts nearer than this are not chance


@dataclass(frozen=True)
class Sync:
    """Lip sync of one clip.

    Attributes:
        status: ok, static (the mouth does not move) or silent; the others are None unless it is ok.
        r: correlation at lag 0.
        shifted: mean correlation over circular shifts of at least `NEAREST_SHIFT` frames.
        lag: best lag in frames, positive where the video is late; r_best: its correlation.
    """

    status: str
    r: float | None = None
    shifted: float | None = None
    lag: int | None = None
    r_best: float | None = None


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; 0 where either side is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 1e-12 else 0.0


def sync_of(shown: np.ndarray, called: np.ndarray | None, static: bool) -> Sync:
    """Lip sync of the visible opening [F] and the one that the audio calls for [F] (None: silent)."""
    if called is None:
        return Sync("silent")
    if static:
        return Sync("static")
    frames = len(shown)
    shifts = range(NEAREST_SHIFT, frames - NEAREST_SHIFT + 1)
    shifted = float(np.mean([correlation(shown, np.roll(called, k)) for k in shifts])) if shifts else 0.0
    limit = min(MAX_LAG, frames // 2)
    by_lag = {}
    for lag in sorted(range(-limit, limit + 1), key=abs):  # ties go to the smaller lag
        late = shown[max(lag, 0) : frames + min(lag, 0)]
        by_lag[lag] = correlation(late, called[max(-lag, 0) : frames - max(lag, 0)])
    best = max(by_lag, key=lambda lag: by_lag[lag])
    return Sync("ok", by_lag[0], shifted, best, by_lag[best])


def onset_edits(stated: tuple[str, ...], heard: tuple[str, ...]) -> Edits:
    """Edits from the stated to the heard onsets; place by place where there are as many.

    With three onsets, an alignment that may shift would call many wrong ones right.
    """
    if len(stated) != len(heard):
        return edits(stated, heard)
    return Edits(sum(a != b for a, b in zip(stated, heard, strict=True)), 0, 0, len(stated))


def _frames_within(span: tuple[float, float], count: int) -> np.ndarray:
    """Numbers of the frames in the middle of which a time lies in the span (seconds), or of the nearest one."""
    times = (np.arange(count) + 0.5) / FPS
    within = np.flatnonzero((times >= span[0]) & (times <= span[1]))
    return within if len(within) else np.array([int(np.abs(times - np.mean(span)).argmin())])


def lip_shape_error(aspect: np.ndarray, speech: Recognised) -> float | None:
    """Error of the lips' width over height [F] at the heard vowels, see `ClipScore`; an error of 0.1 is 10 %.

    The area of the mouth says nothing about its shape: i and o open it almost equally wide.
    """
    errors = []
    for vowel, (start, end) in zip(speech.vowels, speech.vowel_spans, strict=True):
        width, height = (radius + lip for radius, lip in zip(MOUTHS[vowel], LIPS, strict=True))
        # The mouth opens and shuts in the first and last hundredths of a second.
        shown = aspect[_frames_within((start + 0.02, end - 0.04), len(aspect))]
        if np.isfinite(shown).any():
            errors.append(abs(float(np.log(np.nanmean(shown) * height / width))))
    return float(np.mean(errors)) if errors else None


def opening_at_closures(openness: np.ndarray, speech: Recognised) -> float | None:
    """Opening of the mouth [F], as a share of the image, at the heard m and b, see `ClipScore`.

    The lips close for both: of each the frame with the smallest opening counts.
    """
    found = []
    for onset, vowel, span in zip(speech.onsets, speech.vowels, speech.onset_spans, strict=True):
        if onset in BILABIALS:
            least = float(openness[_frames_within(span, len(openness))].min())
            found.append(max(0.0, least) / (np.pi * float(np.prod(MOUTHS[vowel]))))
    return float(np.mean(found)) if found else None


@dataclass(frozen=True)
class ClipScore:
    """Measurements of one clip.

    Attributes:
        world: of the caption.
        vision, speech: attributes and mouth in the frames, syllables in the audio.
        shown: attribute -> value that the clip shows or sounds like; stated: attribute -> value of the caption.
        syllables, onsets, vowels: edits from the caption's to the recognised ones.
        called: mouth opening that the audio calls for [F], None where it is silent.
        sync: agreement of mouth and audio.
        lip_shape: mean error of the lips' width over height at the heard vowels, as the absolute natural logarithm of the
            ratio to the drawn one; None where no vowel is heard.
        lips_open: mean opening of the mouth at the heard m and b, as a share of the opening of their vowels; None where none
            is heard.
        hiss, hum: levels of noise in dB, see `eval.puppet_noise`; None where the clip is silent.
    """

    caption: str
    world: str
    vision: FrameMeasures
    speech: Recognised
    syllables: Edits
    onsets: Edits
    vowels: Edits
    shown: dict[str, str]
    stated: dict[str, str]
    called: np.ndarray | None
    sync: Sync
    lip_shape: float | None
    lips_open: float | None
    hiss: float | None
    hum: float | None

    @property
    def right(self) -> dict[str, bool]:
        """Attribute that the caption states -> whether the clip shows it."""
        return {name: self.shown[name] == value for name, value in self.stated.items()}

    @property
    def novel(self) -> bool:
        """Whether the caption names a pair of shirt and wall that no training sees."""
        return (self.stated["shirt"], self.stated["wall"]) in WORLDS[self.world].novel_pairs

    def to_dict(self) -> dict[str, Any]:
        return {
            "caption": self.caption,
            "attributes": self.shown,
            "right": self.right,
            "heard": list(self.speech.words),
            "vowel_hits": self.vowels.hits,
            "vowels_exact": self.vowels.errors == 0,
            "syllable_errors": self.syllables.errors,
            "sync": asdict(self.sync),
            **{key: getattr(self, key) for key in ("lip_shape", "lips_open", "hiss", "hum")},
            **{
                key: getattr(self.vision, key)
                for key in ("amplitude", "eyes", "sharpness", "mouth_sharpness", "flicker")
            },
        }


def _voice(wave: np.ndarray, speech: Recognised) -> str:
    hertz = pitch(wave, speech)
    return "none" if hertz is None else "low" if hertz < LOW_VOICE else "high"


def score_clip(frames: np.ndarray, wave: np.ndarray | None, caption: str) -> ClipScore:
    """Score one clip: frames uint8 [F,H,W,3] at 25 fps, wave fp32 [N] at 16 kHz (None: no audio track).

    Raises:
        ValueError: frames of another type or shape, or a caption of another form.
    """
    world, words, stated = parse_caption(caption)
    audio = np.zeros(0) if wave is None else np.asarray(wave)
    if audio.ndim != 1:
        raise ValueError(f"wave must be [N] (one channel), not {list(audio.shape)}")
    vision, speech = measure_frames(frames, world), recognise(audio, world)
    called = called_opening(audio, len(frames), world)
    shown = vision.attributes
    if world == "scene":
        shown = shown | {"voice": _voice(audio, speech), "sound": background(audio)}
    return ClipScore(
        caption=caption,
        world=world,
        vision=vision,
        speech=speech,
        syllables=edits(words, speech.words),
        onsets=onset_edits(tuple(word[0] for word in words), speech.onsets),
        vowels=edits(tuple(word[-1] for word in words), speech.vowels),
        shown=shown,
        stated=stated,
        called=called,
        sync=sync_of(vision.openness, called, vision.static),
        lip_shape=lip_shape_error(vision.lip_aspect, speech),
        lips_open=opening_at_closures(vision.openness, speech),
        hiss=None if speech.silent else hiss_level(audio),
        hum=None if speech.silent else hum_level(audio),
    )
