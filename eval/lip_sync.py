"""Lip sync in the tiny world: correlation of the visible mouth with the mouth that the audio calls for.

Pearson correlation, at frame rate, of the mouth's visible opening (`eval.puppet_vision`) with the opening that the audio
calls for (`eval.puppet_speech.called_opening`). A bare correlation says little: clips share their rhythm (silence at both
ends, three syllables), so a mouth still reaches about .6 with another clip's audio. Two chance levels are therefore
measured: the mean over circular shifts of the clip's own audio, and the mean over other clips' audio. The second is the
harder one, and the right one for "the mouth follows *this* audio".
"""

from dataclasses import dataclass

import numpy as np

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
