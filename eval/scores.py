"""Scores of tiny-world clips: what they show, say and how mouth and voice agree, with intervals over clips.

`score_clips(frames, waves, captions, reference=bound).table["vowels"].value`, and so on for all of `ROWS`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data.tiny.puppets import SKINS, Puppet, parse_caption
from eval import stats
from eval.lip_sync import Sync, correlation, measure
from eval.puppet_speech import Edits, Heard, called_opening, edits, hear
from eval.puppet_vision import PROMPTED, Seen, see
from eval.stats import Measure, unavailable

# Other clips' voices that each clip is compared with: a fixed number, so that retrieval means the same for
# every n.
CANDIDATES = 20

# Every row of the table: what it says and which way is better ("" where neither is).
ROWS = {
    "attributes": ("face, hair, shirt and wall as the caption says", "up"),
    "face": ("face shape right", "up"),
    "hair": ("hair colour right", "up"),
    "shirt": ("shirt colour right", "up"),
    "wall": ("wall colour right", "up"),
    "vowels": ("vowels right, of those the caption states", "up"),
    "vowels_exact": ("whole vowel sequence right, none added", "up"),
    "syllable_error": ("(S + D + I) / syllables; can exceed 1", "down"),
    "words_exact": ("all syllables right, none added", "up"),
    "sync_r": ("mouth against own voice, correlation at lag 0", "up"),
    "sync_other": ("mouth against other clips' voices: chance", ""),
    "sync_shifted": ("mouth against its own voice shifted in a circle", ""),
    "sync_skill": ("0: a real mouth beside another's voice, 1: the codec bound", "up"),
    "sync_skill_shifted": ("0: a real mouth beside its voice shifted, 1: the codec bound", "up"),
    "sync_lag0": ("best lag is 0 frames, of clips with mouth and voice", "up"),
    "sync_retrieval": (f"own voice found among {CANDIDATES}", "up"),
    "static": ("clips whose mouth does not move", "down"),
    "silent": ("clips without sound", "down"),
    "amplitude": ("mouth opening's range, share of the picture", ""),
    "sharpness": ("variance of the Laplacian", ""),
    "mouth_sharpness": ("the same around the mouth", ""),
    "flicker": ("change between frames away from the mouth", "down"),
    "skin_distance": ("skin tones' total variation from equal shares", "down"),
}


@dataclass(frozen=True)
class ClipScore:
    """One clip: its caption, what was seen and heard, and how both agree with the caption and each other."""

    caption: str
    seen: Seen
    heard: Heard
    syllables: Edits
    vowels: Edits
    right: dict[str, bool]
    called: np.ndarray | None
    sync: Sync

    def to_dict(self) -> dict[str, Any]:
        return {
            "caption": self.caption,
            "attributes": self.seen.attributes,
            "right": self.right,
            "heard": list(self.heard.words),
            "vowel_hits": self.vowels.hits,
            "vowels_exact": self.vowels.errors == 0,
            "syllable_errors": self.syllables.errors,
            "sync": asdict(self.sync),
            "amplitude": self.seen.amplitude,
            "sharpness": self.seen.sharpness,
            "mouth_sharpness": self.seen.mouth_sharpness,
            "flicker": self.seen.flicker,
        }


@dataclass(frozen=True)
class Scores:
    """Scores of a set of clips. `table` has every name of `ROWS`; `own`, `other` and `shifted` [n] are each
    clip's correlations, in which a static or silent clip counts 0: it does not follow its voice; `found` [n] is 1
    where a clip's own voice fits best."""

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
        total = [clip.syllables for clip in self.clips]
        return {
            "n": len(self.clips),
            "table": {name: m.to_dict() for name, m in self.table.items()},
            "skins": self.skins,
            "skin_uniform_p": self.skin_p,
            "edits": {
                "substitutions": sum(e.substitutions for e in total),
                "deletions": sum(e.deletions for e in total),
                "insertions": sum(e.insertions for e in total),
                "syllables": sum(e.reference for e in total),
            },
        }


def score_clip(frames: np.ndarray, wave: np.ndarray | None, caption: str) -> ClipScore:
    """Score one clip: frames uint8 [F,H,W,3] at 25 fps, wave fp32 [N] at 16 kHz (None: no sound).

    Raises:
        ValueError: frames of another type or shape, or a caption of another form.
    """
    stated = parse_caption(caption)
    words = tuple(stated["words"])
    if not words:
        raise ValueError(f"the caption says no syllable: {caption!r}")
    sound = np.zeros(0) if wave is None else np.asarray(wave)
    if sound.ndim != 1:
        raise ValueError(f"wave must be [N] (one channel), not {list(sound.shape)}")
    seen, heard, called = see(frames), hear(sound), called_opening(sound, len(frames))
    return ClipScore(
        caption=caption,
        seen=seen,
        heard=heard,
        syllables=edits(words, heard.words),
        vowels=edits(tuple(word[-1] for word in words), heard.vowels),
        right={name: seen.attributes[name] == stated[name] for name in PROMPTED},
        called=called,
        sync=measure(seen.openness, called, seen.static),
    )


def _against_others(clips: Sequence[ClipScore]) -> tuple[np.ndarray, np.ndarray]:
    """Mean correlation with other clips' voices [n], and whether the own voice fits best [n].

    The others are the next `CANDIDATES` - 1 clips of the same length that have a voice, in a circle.
    """
    other, found = np.zeros(len(clips)), np.zeros(len(clips))
    for i, clip in enumerate(clips):
        if clip.sync.r is None:
            continue
        around = [clips[(i + k) % len(clips)].called for k in range(1, len(clips))]
        voices = [v for v in around if v is not None and len(v) == len(clip.seen.openness)][: CANDIDATES - 1]
        if voices:
            values = [correlation(clip.seen.openness, voice) for voice in voices]
            other[i] = np.mean(values)
            found[i] = clip.sync.r > max(values)
    return other, found


def _skill(own: np.ndarray, reference: Scores | None, chance: str, paired: bool) -> Measure:
    """(own - chance) / (bound - chance), chance being the reference's mean `other` or `shifted`.

    Chance is the reference's for both, because one's own can be low for a bad reason: pictures that lose the
    rhythm of speech agree less with every voice. Clips are resampled in pairs where both sets have the same
    captions, else the reference counts as known.
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
    """The table's two skill rows for correlations `own` [n]; see `_skill`."""
    return {
        "sync_skill": _skill(own, reference, "other", paired),
        "sync_skill_shifted": _skill(own, reference, "shifted", paired),
    }


def score_clips(
    frames: Sequence[np.ndarray],
    waves: Sequence[np.ndarray | None],
    truths: Sequence[str | Puppet],
    reference: Scores | None = None,
) -> Scores:
    """Score clips against their captions.

    Args:
        frames: uint8 [F,H,W,3] per clip, square, 25 fps.
        waves: fp32 [N] at 16 kHz per clip; None where there is no sound.
        truths: captions, or the puppets whose captions were asked for.
        reference: scores of ground truth through the codec (skill 1); without it, skill is unavailable.

    Raises:
        ValueError: lists of different lengths, no clips, or a clip that `score_clip` refuses.
    """
    if not len(frames) == len(waves) == len(truths):
        raise ValueError(
            f"{len(frames)} clips, {len(waves)} waves, {len(truths)} captions: not the same number"
        )
    if not frames:
        raise ValueError("no clips to score")
    captions = [truth.caption if isinstance(truth, Puppet) else truth for truth in truths]
    clips = tuple(score_clip(f, w, c) for f, w, c in zip(frames, waves, captions, strict=True))
    own = np.array([clip.sync.r or 0.0 for clip in clips])
    shifted = np.array([clip.sync.shifted or 0.0 for clip in clips])
    other, found = _against_others(clips)
    lags = np.array([clip.sync.lag == 0 for clip in clips if clip.sync.lag is not None], float)
    counts = Counter(clip.seen.attributes["skin"] for clip in clips)
    skins = np.array([counts[name] for name in SKINS])

    table = {"attributes": stats.share(np.array([np.mean(list(clip.right.values())) for clip in clips]))}
    for name in PROMPTED:
        table[name] = stats.share(np.array([clip.right[name] for clip in clips]))
    table["vowels"] = stats.share(np.array([clip.vowels.hits / clip.vowels.reference for clip in clips]))
    table["vowels_exact"] = stats.share(np.array([clip.vowels.errors == 0 for clip in clips]))
    errors = np.array([clip.syllables.errors for clip in clips])
    syllables = np.array([clip.syllables.reference for clip in clips])
    table["syllable_error"] = stats.ratio(errors, syllables) if errors.any() else stats.share(errors)
    table["words_exact"] = stats.share(np.array([clip.syllables.errors == 0 for clip in clips]))
    measurable = sum(clip.sync.status == "ok" for clip in clips)
    if measurable == 0:
        nothing = unavailable("no clip has both a moving mouth and a voice", len(clips))
        table |= {name: nothing for name in ROWS if name.startswith("sync_")}
    else:
        alone = unavailable("needs other clips to compare with", len(clips))
        paired = reference is not None and reference.captions == tuple(captions)
        table["sync_r"] = stats.mean(own)
        table["sync_other"] = stats.mean(other) if len(clips) > 1 else alone
        table["sync_shifted"] = stats.mean(shifted)
        table |= skills(own, reference, paired)
        table["sync_lag0"] = stats.share(lags)
        table["sync_retrieval"] = stats.share(found) if len(clips) > 1 else alone
    table["static"] = stats.share(np.array([clip.seen.static for clip in clips]))
    table["silent"] = stats.share(np.array([clip.heard.silent for clip in clips]))
    for name in ("amplitude", "sharpness", "mouth_sharpness", "flicker"):
        table[name] = stats.mean(np.array([getattr(clip.seen, name) for clip in clips]))
    table["skin_distance"] = stats.distance_to_uniform(skins)
    return Scores(
        clips=clips,
        table={name: table[name] for name in ROWS},
        skins=dict(zip(SKINS, skins.tolist(), strict=True)),
        skin_p=stats.uniformity(skins),
        own=own,
        other=other,
        shifted=shifted,
        found=found,
    )
