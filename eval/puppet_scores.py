"""Scores of one tiny-world clip: attributes, syllables and lip sync.

    score_clip(frames, wave, caption).vowels.hits

Lip sync is the Pearson correlation, at frame rate, of the mouth's visible opening with the opening that the audio calls for.
Metrics of a clip are in `eval.metrics.puppet_clips`, sets of clips in `eval.scores`.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data.tiny.puppets import parse_caption
from eval.edits import Edits, edits
from eval.puppet_speech import Recognised, called_opening, recognise
from eval.puppet_vision import PROMPTED, FrameMeasures, measure_frames

MAX_LAG = 8  # frames
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


@dataclass(frozen=True)
class ClipScore:
    """Measurements of one clip.

    Attributes:
        vision, speech: attributes and mouth in the frames, syllables in the audio.
        syllables, vowels: edits from the caption's to the recognised ones.
        right: attribute -> whether it is as the caption states.
        called: mouth opening that the audio calls for [F], None where it is silent.
        sync: agreement of mouth and audio.
    """

    caption: str
    vision: FrameMeasures
    speech: Recognised
    syllables: Edits
    vowels: Edits
    right: dict[str, bool]
    called: np.ndarray | None
    sync: Sync

    def to_dict(self) -> dict[str, Any]:
        return {
            "caption": self.caption,
            "attributes": self.vision.attributes,
            "right": self.right,
            "heard": list(self.speech.words),
            "vowel_hits": self.vowels.hits,
            "vowels_exact": self.vowels.errors == 0,
            "syllable_errors": self.syllables.errors,
            "sync": asdict(self.sync),
            **{key: getattr(self.vision, key) for key in ("amplitude", "sharpness", "mouth_sharpness", "flicker")},
        }


def score_clip(frames: np.ndarray, wave: np.ndarray | None, caption: str) -> ClipScore:
    """Score one clip: frames uint8 [F,H,W,3] at 25 fps, wave fp32 [N] at 16 kHz (None: no audio track).

    Raises:
        ValueError: frames of another type or shape, or a caption of another form.
    """
    stated = parse_caption(caption)
    words = tuple(stated["words"])
    if not words:
        raise ValueError(f"the caption says no syllable: {caption!r}")
    audio = np.zeros(0) if wave is None else np.asarray(wave)
    if audio.ndim != 1:
        raise ValueError(f"wave must be [N] (one channel), not {list(audio.shape)}")
    vision, speech = measure_frames(frames), recognise(audio)
    called = called_opening(audio, len(frames))
    return ClipScore(
        caption=caption,
        vision=vision,
        speech=speech,
        syllables=edits(words, speech.words),
        vowels=edits(tuple(word[-1] for word in words), speech.vowels),
        right={name: vision.attributes[name] == stated[name] for name in PROMPTED},
        called=called,
        sync=sync_of(vision.openness, called, vision.static),
    )
