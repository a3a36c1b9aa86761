"""Scores of tiny-world clips: attributes, syllables and lip sync, with 95 % intervals over clips.

    score_clips(frames, waves, captions, reference=bound).table["vowels"].value

Names and directions of all metrics are in `eval.tables.METRICS`.

Lip sync is the Pearson correlation, at frame rate, of the mouth's visible opening with the opening that the audio calls for.
A bare correlation says little: clips share their rhythm (silence at both ends, three syllables), so a mouth still reaches
about .6 with another clip's audio. Two chance levels are therefore measured: the mean over circular shifts of the clip's own
audio, and over other clips' audio; the second is the harder one, and the right one for "the mouth follows *this* audio".
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from data.tiny.puppets import SKINS, parse_caption
from eval import stats
from eval.edits import Edits, edits
from eval.puppet_speech import Recognised, called_opening, recognise
from eval.puppet_vision import PROMPTED, FrameMeasures, measure_frames
from eval.stats import Measure, unavailable
from eval.tables import CANDIDATES, METRICS

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


@dataclass(frozen=True)
class Scores:
    """Scores of a set of clips.

    Attributes:
        table: key of `METRICS` -> measure over all clips.
        skins: skin tone -> clips; skin_p: p-value that they come from equal shares.
        own, other, shifted [n]: correlation of each clip's mouth with its own audio, in the mean with other clips'
            audio, and with its own audio shifted. A static or silent clip counts 0: it does not follow its audio.
        found [n]: 1 where a clip's own audio fits best of `CANDIDATES`, 0 where it does not, NaN where there are fewer.
    """

    clips: tuple[ClipScore, ...]
    table: dict[str, Measure]
    skins: dict[str, int]
    skin_p: float
    own: np.ndarray
    other: np.ndarray
    shifted: np.ndarray
    found: np.ndarray

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(clip.caption for clip in self.clips)

    def to_dict(self) -> dict[str, Any]:
        edits = {key: sum(getattr(clip.syllables, key) for clip in self.clips) for key in Edits.__annotations__}
        return {
            "n": len(self.clips),
            "table": {name: m.to_dict() for name, m in self.table.items()},
            "skins": self.skins,
            "skin_uniform_p": self.skin_p,
            "edits": {"syllables" if key == "reference" else key: number for key, number in edits.items()},
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


@dataclass(frozen=True)
class ClipMetric:
    """A metric with one value per clip.

    Attributes:
        of: value of a clip.
        average: measure of all clips' values [n]; `stats.share` for values in [0,1].
        compared: whether `eval.dmd2` compares it between columns.
    """

    of: Callable[[ClipScore], float]
    average: Callable[[np.ndarray], Measure] = stats.mean
    compared: bool = False


def _is_right(name: str, clip: ClipScore) -> float:
    return float(clip.right[name])


# Key of METRICS -> value per clip. A new metric is an entry here and one in METRICS (eval/README.md).
CLIP_METRICS = {
    "attributes": ClipMetric(lambda clip: float(np.mean(list(clip.right.values()))), stats.share, compared=True),
    **{name: ClipMetric(partial(_is_right, name), stats.share) for name in PROMPTED},
    "vowels": ClipMetric(lambda clip: clip.vowels.hits / clip.vowels.reference, stats.share, compared=True),
    "vowels_exact": ClipMetric(lambda clip: float(clip.vowels.errors == 0), stats.share, compared=True),
    "words_exact": ClipMetric(lambda clip: float(clip.syllables.errors == 0), stats.share),
    "static": ClipMetric(lambda clip: float(clip.vision.static), stats.share),
    "silent": ClipMetric(lambda clip: float(clip.speech.silent), stats.share),
    "amplitude": ClipMetric(lambda clip: clip.vision.amplitude, compared=True),
    "sharpness": ClipMetric(lambda clip: clip.vision.sharpness, compared=True),
    "mouth_sharpness": ClipMetric(lambda clip: clip.vision.mouth_sharpness, compared=True),
    "flicker": ClipMetric(lambda clip: clip.vision.flicker, compared=True),
}  # fmt: skip


def _against_others(clips: Sequence[ClipScore]) -> tuple[np.ndarray, np.ndarray]:
    """Mean correlation with other clips' audio [n], and whether the own audio fits best [n], NaN with too few others.

    The others are the next `CANDIDATES` - 1 clips of the same length with audio, in a circle.
    """
    other, found = np.zeros(len(clips)), np.zeros(len(clips))
    for i, clip in enumerate(clips):
        if clip.sync.r is None:
            continue
        around = [clips[(i + k) % len(clips)].called for k in range(1, len(clips))]
        tracks = [v for v in around if v is not None and len(v) == len(clip.vision.openness)][: CANDIDATES - 1]
        values = [correlation(clip.vision.openness, track) for track in tracks]
        other[i] = np.mean(values) if values else 0.0
        found[i] = clip.sync.r > max(values) if len(values) == CANDIDATES - 1 else np.nan
    return other, found


def _retrieval(found: np.ndarray) -> Measure:
    """Share of clips whose own audio fits best; as a share among fewer than `CANDIDATES` it would mean less."""
    if np.isfinite(found).all():
        return stats.share(found)
    return unavailable(f"needs {CANDIDATES} clips of one length with audio", len(found))


def _skill(own: np.ndarray, reference: Scores | None, chance: str, paired: bool) -> Measure:
    """Skill (own - chance) / (bound - chance), chance being the reference's mean `other` or `shifted`.

    Chance is the reference's for both, because one's own can be low for a bad reason: frames that lose the rhythm of
    speech agree less with any audio. Clips are resampled in pairs where both sets have the same captions, else the
    reference counts as known.
    """
    if reference is None:
        return unavailable("needs the bound: ground truth through the codec", len(own))
    level = getattr(reference, chance)
    if float((reference.own - level).mean()) < 0.05:
        return unavailable("the bound itself is not above chance", len(own))
    if paired:
        return stats.ratio(own - level, reference.own - level)
    return stats.ratio(own - level.mean(), np.full(len(own), (reference.own - level).mean()))


def skills(own: np.ndarray, reference: Scores | None, paired: bool) -> dict[str, Measure]:
    """Both lip-sync skills for correlations `own` [n]; see `_skill`."""
    return {
        "sync_skill": _skill(own, reference, "other", paired),
        "sync_skill_shifted": _skill(own, reference, "shifted", paired),
    }


def score_clips(
    frames: Sequence[np.ndarray],
    waves: Sequence[np.ndarray | None],
    captions: Sequence[str],
    reference: Scores | None = None,
) -> Scores:
    """Score clips against their captions.

    Args:
        frames: uint8 [F,H,W,3] per clip, square, 25 fps.
        waves: fp32 [N] at 16 kHz per clip; None where there is no audio.
        reference: scores of ground truth through the codec (skill 1); without it, skill is unavailable.

    Raises:
        ValueError: lists of different lengths, no clips, or a clip that `score_clip` refuses.
    """
    if not len(frames) == len(waves) == len(captions):
        raise ValueError(f"{len(frames)} clips, {len(waves)} waves, {len(captions)} captions: not the same number")
    if not frames:
        raise ValueError("no clips to score")
    clips = tuple(score_clip(f, w, c) for f, w, c in zip(frames, waves, captions, strict=True))
    own = np.array([clip.sync.r or 0.0 for clip in clips])
    shifted = np.array([clip.sync.shifted or 0.0 for clip in clips])
    other, found = _against_others(clips)
    counts = Counter(clip.vision.attributes["skin"] for clip in clips)
    skins = np.array([counts[name] for name in SKINS])
    table = {
        name: metric.average(np.array([metric.of(clip) for clip in clips], float))
        for name, metric in CLIP_METRICS.items()
    }
    errors = np.array([clip.syllables.errors for clip in clips])
    stated = np.array([clip.syllables.reference for clip in clips])
    table["syllable_error"] = stats.ratio(errors, stated) if errors.any() else stats.share(errors)  # of 0: Wilson's
    lags = np.array([clip.sync.lag == 0 for clip in clips if clip.sync.lag is not None], float)
    sync = {
        "sync_r": stats.mean(own),
        "sync_other": stats.mean(other),
        "sync_shifted": stats.mean(shifted),
        **skills(own, reference, paired=reference is not None and reference.captions == tuple(captions)),
        "sync_lag0": stats.share(lags),
        "sync_retrieval": _retrieval(found),
    }
    if not len(lags):
        sync = dict.fromkeys(sync, unavailable("no clip has both a moving mouth and audio", len(clips)))
    elif len(clips) == 1:
        sync["sync_other"] = unavailable("needs other clips to compare with", 1)
    table |= sync
    table["skin_distance"] = stats.distance_to_uniform(skins)
    return Scores(
        clips=clips,
        table={name: table[name] for name in METRICS if name in table},
        skins=dict(zip(SKINS, skins.tolist(), strict=True)),
        skin_p=stats.uniformity(skins),
        own=own,
        other=other,
        shifted=shifted,
        found=found,
    )
