"""Lip sync in the tiny world: does the mouth in the picture follow the loudness of the voice?

Pearson correlation of mouth openness and voice envelope at frame rate. Two clips that have nothing to do with each
other still correlate, since every clip begins and ends in silence, so a bare correlation is never reported alone: it
stands beside the mean over circular shifts of the same clip and the mean over other clips' audio.
"""

from dataclasses import dataclass

import numpy as np

from data.puppets import FPS, SAMPLE_RATE

MAX_LAG = 8  # frames
NEAREST_SHIFT = 4  # a syllable lasts 5 to 7 frames: shifts nearer than this are not chance
BAND = (200.0, 3600.0)  # Hz: vowels, without the hum's fundamental and the hiss
SILENT_ENVELOPE = 2e-3


@dataclass(frozen=True)
class Sync:
    """Sync of one clip. `r` is the correlation at lag 0, `chance` the mean over circular shifts of at least
    `NEAREST_SHIFT` frames, `lag` the best lag in frames (positive: the picture is late) and `r_best` its correlation.

    All four are None unless `status` is "ok"; otherwise it is "static" (the mouth does not move) or "silent".
    """

    status: str
    r: float | None
    chance: float | None
    lag: int | None
    r_best: float | None


def voice_envelope(wave: np.ndarray, frames: int) -> np.ndarray:
    """Loudness of the voice band during each of `frames` pictures at 25 fps, from fp32 [N] at 16 kHz: fp64 [frames].

    Square root of the band's RMS over a raised-cosine window of two frames, centred on the picture's middle; sound
    that ends early counts as silence.
    """
    hop = SAMPLE_RATE // FPS
    wave = np.nan_to_num(np.asarray(wave, np.float64))[: frames * hop]
    padded = np.pad(wave, (hop // 2, frames * hop - len(wave) + hop // 2))
    pieces = padded[hop * np.arange(frames)[:, None] + np.arange(2 * hop)] * np.hanning(2 * hop)
    spectrum = np.fft.rfft(pieces, axis=1)
    frequency = np.fft.rfftfreq(2 * hop, 1 / SAMPLE_RATE)
    band = (frequency >= BAND[0]) & (frequency <= BAND[1])
    # Parseval, with 3/8 as the mean square of the window.
    power = 2 * np.sum(np.abs(spectrum[:, band]) ** 2, 1) / (2 * hop) ** 2 / 0.375
    return np.sqrt(np.sqrt(power))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; 0 where either side is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 1e-12 else 0.0


def measure(openness: np.ndarray, envelope: np.ndarray, static: bool) -> Sync:
    """Sync of a clip's mouth openness [F] with a voice envelope [F]."""
    if float(envelope.max()) ** 2 < SILENT_ENVELOPE:
        return Sync("silent", None, None, None, None)
    if static:
        return Sync("static", None, None, None, None)
    frames = len(openness)
    shifts = range(NEAREST_SHIFT, frames - NEAREST_SHIFT + 1)
    chance = float(np.mean([correlation(openness, np.roll(envelope, k)) for k in shifts])) if shifts else 0.0
    limit = min(MAX_LAG, frames // 2)
    by_lag = {}
    for lag in sorted(range(-limit, limit + 1), key=abs):  # ties go to the smaller lag
        late = openness[max(lag, 0) : frames + min(lag, 0)]
        by_lag[lag] = correlation(late, envelope[max(-lag, 0) : frames - max(lag, 0)])
    best = max(by_lag, key=lambda lag: by_lag[lag])
    return Sync("ok", by_lag[0], chance, best, by_lag[best])
