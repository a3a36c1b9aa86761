"""Offset between picture and sound without weights: changes around the mouth against the envelope of the speech; AV-Align.

The mouth is not detected: cells of the picture whose brightness goes with the sound's level, at any offset of the search, are
taken. That finds the offset of a face that speaks; without speech, or with the mouth out of sight, the confidence is low.
SyncNet, with weights, is the better judge of real clips.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from eval.clip_file import NotMeasured
from eval.metrics.registry import Measurement, Metric, missing_package
from eval.metrics.sound import RATE, integrated_loudness
from eval.optical_flow import motion_of

if TYPE_CHECKING:
    from eval.clip_file import ClipFile
    from eval.optical_flow import Motion

SEARCH = 15
"""Frames to each side."""
CELL = 6
"""Pixels of the small frames (shorter side 144): a mouth has a few cells."""
BEST_CELLS = 6
LEAST_SECONDS = 1.5
LEAST_FRAMES = 36
"""As many as `LEAST_SECONDS` have at 24 fps: at the ends of the search over a half of them still overlap."""
BAND = (250.0, 4000.0)
"""Hz of the envelope: formants, without hum."""
LEAST_CONFIDENCE = 1.3
"""Below it no offset is reported. Of made clips, 90 faces with other clips' sound reached up to 1.28, ten with their own at
least 1.47."""
APART = 3
"""Frames around the peak that are left out of the next highest."""


def measure_offset(clip: "ClipFile", options: Any = None) -> dict[str, float | NotMeasured]:
    """Values of `MEASUREMENTS` for a clip: the offset in ms, positive where the sound is late, and its confidence.

    With a confidence below `LEAST_CONFIDENCE` the offset is a `NotMeasured`.

    Raises:
        NotMeasured: too short, silent, or without motion.
    """
    motion = motion_of(clip)
    count = len(motion.luma)
    if count < LEAST_SECONDS * motion.fps:
        raise NotMeasured(f"an offset needs {LEAST_SECONDS} s of video, and the clip has {count / motion.fps:.2f} s")
    if count < LEAST_FRAMES:
        raise NotMeasured(f"an offset needs {LEAST_FRAMES} frames, and the clip has {count}")
    wave = _heard(clip)
    sound = level_change(wave, RATE, motion.fps, count - 1)
    correlations = offset_curve(luma_change(motion), sound)
    lags = np.arange(-SEARCH, SEARCH + 1)
    best = int(correlations.argmax())
    # By the root of the length: chance correlations shrink with it.
    confidence = float((correlations[best] - correlations[np.abs(lags - lags[best]) > APART].max()) * np.sqrt(count))
    values: dict[str, float | NotMeasured] = {"av_confidence": confidence}
    if confidence < LEAST_CONFIDENCE:
        unsure = NotMeasured(f"no mouth goes clearly with the sound: the confidence is below {LEAST_CONFIDENCE}")
        return values | {"av_offset": unsure, "av_offset_size": unsure}
    lag = lags[best] + _vertex(correlations, best)
    offset = float(lag * 1000 / motion.fps)
    return values | {"av_offset": offset, "av_offset_size": abs(offset)}


def _heard(clip: "ClipFile") -> np.ndarray:
    wave = clip.wave(RATE)
    if len(wave) < 0.4 * RATE or integrated_loudness(wave) is None:
        raise NotMeasured("its audio is silent")
    return wave


def level_change(wave: np.ndarray, rate: int, fps: float, count: int) -> np.ndarray:
    """Change of the speech's level from frame to frame: fp64 [count].

    The level is the RMS of `BAND` to the power of .3, as loudness, over the duration of a frame around its time.
    """
    from scipy.signal import butter, sosfiltfilt

    band = sosfiltfilt(butter(2, BAND, "bandpass", fs=rate, output="sos"), wave.astype(np.float64))
    energy = np.concatenate([[0.0], np.cumsum(band**2)])
    edges = (np.arange(count + 2) - 0.5) / fps * rate
    places = np.clip(np.rint(edges), 0, len(wave)).astype(int)
    level = (np.diff(energy[places]) / np.maximum(np.diff(places), 1)) ** 0.15
    return np.diff(level)


def luma_change(motion: "Motion") -> np.ndarray:
    """Change of the mean luma in cells of `CELL` pixels that motion does not explain: fp32 [F-1,rows,columns].

    An open mouth is darker than a closed one, so that opening and closing have opposite signs.

    Raises:
        NotMeasured: nothing changes.
    """
    import cv2

    height, width = motion.luma.shape[1:]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    down, across = height // CELL, width // CELL
    cells = np.zeros((len(motion.flow), down, across), np.float32)
    for index, (before, after) in enumerate(zip(motion.luma, motion.luma[1:], strict=False)):
        # The flow of the head or the camera: it is smoothed so that it cannot follow the lips.
        flow = cv2.blur(motion.flow[index].astype(np.float32), (4 * CELL + 1, 4 * CELL + 1))
        warped = cv2.remap(after, columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_LINEAR,
                           borderMode=cv2.BORDER_REPLICATE)  # fmt: skip
        change = (warped.astype(np.float32) - before)[: down * CELL, : across * CELL]
        cells[index] = change.reshape(down, CELL, across, CELL).mean((1, 3))
    if not cells.any():
        raise NotMeasured("its frames do not change")
    return cells


def offset_curve(cells: np.ndarray, sound: np.ndarray) -> np.ndarray:
    """Correlation, of either sign, of the best cells [N,rows,columns] with the sound [N] at -`SEARCH` to +`SEARCH` frames.

    Correlations are averaged over 3 x 3 cells, as a mouth has several and chance does not agree in them. Cells are chosen by
    the highest correlation at any offset, so that the choice favours none.
    """
    from scipy.ndimage import uniform_filter

    count = len(sound)
    curves = np.zeros((2 * SEARCH + 1, *cells.shape[1:]), np.float32)
    for row, lag in enumerate(range(-SEARCH, SEARCH + 1)):
        a = cells[max(0, -lag) : count - max(0, lag)]
        b = sound[max(0, lag) : count - max(0, -lag)]
        a = a - a.mean(0)
        b = b - b.mean()
        scale = np.sqrt((a**2).sum(0) * (b**2).sum())
        curves[row] = np.where(scale > 1e-9, np.tensordot(b, a, (0, 0)) / np.maximum(scale, 1e-9), 0)
    smooth = np.abs(uniform_filter(curves, (0, 3, 3))).reshape(len(curves), -1)
    chosen = np.argsort(smooth.max(0))[-BEST_CELLS:]
    return smooth[:, chosen].mean(1)


def _vertex(values: np.ndarray, at: int) -> float:
    """Place of the peak between the samples by a parabola, within half a sample; 0 at the ends."""
    if not 0 < at < len(values) - 1:
        return 0.0
    left, here, right = values[at - 1 : at + 2]
    bend = left - 2 * here + right
    return float(np.clip(0.5 * (left - right) / bend, -0.5, 0.5)) if bend < -1e-9 else 0.0


# ---- AV-Align ----

ONSET_RATE, HOP, WINDOW = 22050, 512, 2048
"""Samples per second, step and window of the onsets, as librosa has them by default."""
LEAST_FLOW = 0.1
"""Pixels: peaks of the flow below it do not count, as in the authors' code."""


def measure_av_align(clip: "ClipFile", options: Any = None) -> dict[str, float | None]:
    """AV-Align: onsets of the audio against peaks of the optical flow, intersection over union.

    Yariv et al. 2023 (TempoTokens): two meet where they are less than a frame apart. Differences: the flow is measured on the
    small frames of `eval.optical_flow`, and onsets by own code after librosa's defaults. As in the authors' code several onsets
    may meet one peak, so that dense onsets and few peaks give more than 1.

    Raises:
        NotMeasured: silent, or neither onsets nor peaks.
    """
    motion = motion_of(clip)
    onsets = onset_times(_heard(clip), RATE)
    peaks = flow_peaks(motion)
    if not len(onsets) and not len(peaks):
        raise NotMeasured("it has neither onsets of sound nor peaks of motion")
    meeting = sum(bool((np.abs(peaks - onset) < 1 / motion.fps).any()) for onset in onsets)
    return {"av_align": meeting / (len(onsets) + len(peaks) - meeting)}


def flow_peaks(motion: "Motion") -> np.ndarray:
    """Times in seconds of the frames whose mean flow is larger than before and after."""
    flow = motion.magnitude.mean((1, 2), dtype=np.float32) * motion.luma.shape[1] / motion.fps
    flow = np.concatenate([flow[:1], flow])
    inner = (flow[1:-1] > flow[:-2]) & (flow[1:-1] > flow[2:]) & (flow[1:-1] >= LEAST_FLOW)
    return (np.flatnonzero(inner) + 1) / motion.fps


def onset_times(wave: np.ndarray, rate: int) -> np.ndarray:
    """Onsets in seconds: peaks of the rise of a log-mel spectrum (Boeck et al. 2012, with librosa's parameters)."""
    from math import gcd

    from scipy.ndimage import maximum_filter1d, uniform_filter1d
    from scipy.signal import resample_poly, stft

    common = gcd(rate, ONSET_RATE)
    low = resample_poly(wave.astype(np.float64), ONSET_RATE // common, rate // common)
    _, _, spectrum = stft(low, ONSET_RATE, nperseg=WINDOW, noverlap=WINDOW - HOP)
    power = _mel_filters() @ np.abs(spectrum) ** 2
    decibels = 10 * np.log10(np.maximum(power, 1e-10))
    decibels = np.maximum(decibels, decibels.max() - 80)
    strength = np.concatenate([[0.0], np.maximum(np.diff(decibels, axis=1), 0).mean(0)])
    if np.ptp(strength) < 1e-9:
        return np.zeros(0)
    strength = (strength - strength.min()) / np.ptp(strength)
    frames = ONSET_RATE / HOP
    around, wide, wait = max(1, int(0.03 * frames)), max(1, int(0.1 * frames)), max(1, int(0.03 * frames))
    highest = maximum_filter1d(strength, around + 1, origin=around // 2, mode="nearest")
    mean = uniform_filter1d(strength, 2 * wide + 1, mode="nearest")
    found: list[int] = []
    for index in np.flatnonzero((strength >= highest) & (strength >= mean + 0.07)):
        if not found or index - found[-1] > wait:
            found.append(int(index))
    return np.array(found) * HOP / ONSET_RATE


def _mel_filters(bands: int = 128) -> np.ndarray:
    """Triangles on the mel scale over the bins of the spectrum, each of area 1: [bands,bins]."""
    frequencies = np.linspace(0, ONSET_RATE / 2, WINDOW // 2 + 1)
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + ONSET_RATE / 1400), bands + 2) / 2595) - 1)
    rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]


MEASUREMENTS = (
    Measurement(
        "av_offset",
        (
            Metric("av_offset", "sound after the picture (envelope)", "ms", "target", target=0.0, sees=("delay",)),
            Metric("av_offset_size", "offset of sound and picture, either way (envelope)", "ms", "down", best=0.0,
                   sees=("delay",)),
            Metric("av_confidence", "confidence of the offset: margin of the correlation", direction="up", per_frame=True),
        ),
        measure_offset,
        inputs=("frames", "audio"),
        version=3,
        missing=lambda options: missing_package("cv2", "opencv-python-headless"),
    ),
    Measurement(
        "av_align",
        (Metric("av_align", "AV-Align: onsets and peaks of motion", "IoU", "up", per_frame=True),),
        measure_av_align,
        inputs=("frames", "audio"),
        version=2,
        missing=lambda options: missing_package("cv2", "opencv-python-headless"),
    ),
)  # fmt: skip
