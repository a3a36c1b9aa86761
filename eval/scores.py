"""Scores of puppets' clips: attributes, syllables and lip sync, with 95 % intervals over clips.

    score_clips(frames, waves, captions, reference=bound).table["vowels"].value

One clip is scored by `eval.puppet_scores`; metrics are in `eval.metrics.puppet_clips`.

A bare correlation of mouth and audio says little: clips share their rhythm (silence at both ends, three syllables), so a
mouth still reaches about .6 with another clip's audio. Two chance levels are therefore measured: the mean over circular
shifts of the clip's own audio, and over other clips' audio; the second is the harder one, and the right one for "the mouth
follows *this* audio".
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.tiny.puppets import SKINS, WORLDS
from eval import stats
from eval.edits import Edits
from eval.metrics.puppet_clips import CANDIDATES, CLIP_METRICS, METRICS, PuppetMetric
from eval.processes import in_processes
from eval.puppet_scores import ClipScore, correlation, score_clip
from eval.stats import Measure, unavailable


@dataclass(frozen=True)
class Scores:
    """Scores of a set of clips.

    Attributes:
        table: key of a metric -> measure over all clips.
        skins: skin tone -> clips; skin_p: p-value that they come from the world's shares.
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


def clip_values(metric: PuppetMetric, clips: Sequence[ClipScore]) -> np.ndarray:
    """Values of a metric, NaN where a clip has none: fp64 [n]."""
    return np.array([metric.of(clip) for clip in clips], float)


def _average(metric: PuppetMetric, values: np.ndarray) -> Measure:
    """Mean of the clips that have a value."""
    known = values[np.isfinite(values)]
    if not len(known):
        return unavailable("no clip has a value", len(values))
    return stats.share(known) if metric.share else stats.mean(known)


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
    clips = tuple(in_processes(_score, zip(frames, waves, captions, strict=True)))
    own = np.array([clip.sync.r or 0.0 for clip in clips])
    shifted = np.array([clip.sync.shifted or 0.0 for clip in clips])
    other, found = _against_others(clips)
    counts = Counter(clip.vision.attributes["skin"] for clip in clips)
    skins = np.array([counts[name] for name in SKINS])
    table = {name: _average(metric, clip_values(metric, clips)) for name, metric in CLIP_METRICS.items()}
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
    shares = np.array(WORLDS[clips[0].world].attributes["skin"].expected)
    table["skin_distance"] = stats.distance_to_shares(skins, shares)
    return Scores(
        clips=clips,
        table={metric.key: table[metric.key] for metric in METRICS if metric.key in table},
        skins=dict(zip(SKINS, skins.tolist(), strict=True)),
        skin_p=stats.fit_of_shares(skins, shares),
        own=own,
        other=other,
        shifted=shifted,
        found=found,
    )


def _score(clip: tuple[np.ndarray, np.ndarray | None, str]) -> ClipScore:
    return score_clip(*clip)
