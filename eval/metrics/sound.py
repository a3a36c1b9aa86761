"""Sound of a clip without a reference: loudness, clipping, silence, balance, noise, hum, bandwidth, pitch.

Loudness adds the channels up as BS.1770 asks for, so one channel reads 3 LU below the same in two. Clipping and silence are of
the worst channel. Noise, hum, bandwidth and pitch are of the channels' mean, and have no value where these cancel.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from eval.clip_file import MeasurementError, NotMeasured
from eval.metrics.registry import Measurement, Metric

if TYPE_CHECKING:
    from eval.clip_file import ClipFile

RATE = 48000
"""Samples per second that everything here is measured at: the filters of BS.1770 are given for it."""
SHORTEST = 0.4
"""Seconds: one block of BS.1770."""
QUIETEST = -70.0
"""LUFS: the absolute gate of BS.1770. A clip below it is silent."""
FRAME = 0.02  # seconds
PAUSE = 40.0
"""dB below the loud frames from which on a frame counts as silent."""
MAINS = (50.0, 60.0)  # Hz
PITCHES = (60.0, 450.0)  # Hz
VOICED = 0.6
"""Autocorrelation from which on a frame counts as voiced."""


def measure_sound(clip: "ClipFile", options: Any = None) -> dict[str, Any]:
    """Values of `MEASUREMENTS` for a clip; of a silent one the share of silence, and the peak where it is finite.

    Raises:
        NotMeasured: no audio, or less than `SHORTEST` of it.
    """
    channels = clip.channels(RATE)
    length = channels.shape[1]
    if length < SHORTEST * RATE:
        raise NotMeasured(f"it has {length / RATE:.2f} s of audio, and {SHORTEST} s is the least")
    peak = float(np.abs(channels).max())
    if peak == 0:
        silent = NotMeasured("its audio is digital silence")
        return {**{metric.key: silent for metric in _METRICS}, "silence_share": 1.0}
    values: dict[str, Any] = {"peak_level": 20 * float(np.log10(peak)), "silence_share": 1.0}
    loudness = integrated_loudness(channels)
    if loudness is None:
        quiet = NotMeasured(f"its audio is below {QUIETEST:g} LUFS throughout")
        return {**{metric.key: quiet for metric in _METRICS}, **values}
    levels = [frame_levels(channel) for channel in channels]
    loud = max(loud_level(level) for level in levels)
    heard = [c for c, level in zip(channels, levels, strict=True) if loud_level(level) >= loud - PAUSE]
    values |= {
        "loudness": loudness,
        "silence_share": max(silence_share(level, loud) for level in levels),
        "clipped_audio": max(clipped_share(channel) for channel in heard),
        "channel_balance": balance(channels) if len(channels) == 2 else NotMeasured("it has one channel"),
    }
    try:
        wave = clip.wave(RATE)
    except MeasurementError as error:  # two channels that cancel each other
        mixed = ("audio_snr", "hum", "bandwidth", "pitch_median")
        return values | dict.fromkeys(mixed, NotMeasured(str(error)))
    return values | {
        "audio_snr": noise_distance(frame_levels(wave)),
        "hum": hum(wave),
        "bandwidth": bandwidth(wave),
        "pitch_median": pitch_median(wave) or NotMeasured("fewer than five of its frames are voiced"),
    }


def integrated_loudness(wave: np.ndarray, rate: int = RATE) -> float | None:
    """Integrated loudness in LUFS of [N] or [channels,N] (ITU-R BS.1770-4: K-weighting, blocks of 400 ms, both gates).

    Left, right and centre count alike. A sine of 997 Hz at full scale in one channel is -3.01 LUFS, in two 0. None where every
    block is below `QUIETEST`.

    Raises:
        ValueError: another rate than 48 kHz.
    """
    from scipy.signal import lfilter

    if rate != RATE:
        raise ValueError(f"the filters are given for {RATE} Hz, not {rate}")
    # Tables 1 and 2 of BS.1770-4: the head's shelf, then the high-pass.
    shelf = lfilter([1.53512485958697, -2.69169618940638, 1.19839281085285],
                    [1.0, -1.69065929318241, 0.73248077421585], wave.astype(np.float64))  # fmt: skip
    weighted = lfilter([1.0, -2.0, 1.0], [1.0, -1.99004745483398, 0.99007225036621], shelf)
    energy = np.concatenate([[0.0], np.cumsum(np.atleast_2d(weighted**2).sum(0))])
    block, step = round(0.4 * rate), round(0.1 * rate)
    starts = np.arange(0, wave.shape[-1] - block + 1, step)
    power = np.maximum((energy[starts + block] - energy[starts]) / block, 1e-30)
    loudness = -0.691 + 10 * np.log10(power)
    heard = loudness > QUIETEST
    if not heard.any():
        return None
    relative = -0.691 + 10 * np.log10(power[heard].mean()) - 10
    return float(-0.691 + 10 * np.log10(power[heard & (loudness > relative)].mean()))


def frame_levels(wave: np.ndarray, rate: int = RATE) -> np.ndarray:
    """Levels of frames of `FRAME` in dB to full scale, not below -100: fp64 [frames]."""
    size = round(FRAME * rate)
    frames = wave[: len(wave) // size * size].reshape(-1, size)
    return 10 * np.log10(np.maximum((frames.astype(np.float64) ** 2).mean(1), 1e-10))


def loud_level(levels: np.ndarray) -> float:
    """Level of the loud frames in dB: the 95th percentile."""
    return float(np.quantile(levels, 0.95))


def silence_share(levels: np.ndarray, loud: float) -> float:
    """Share of frames over `PAUSE` below the level `loud`, of the loud frames of the loudest channel: whatever the volume."""
    return float((levels < loud - PAUSE).mean())


def balance(channels: np.ndarray) -> float:
    """Level of the left channel over the right one in dB, at most 60 either way: exchanged channels have the other sign."""
    left, right = np.maximum(np.square(channels.astype(np.float64)).mean(1), 1e-12)
    return float(np.clip(10 * np.log10(left / right), -60, 60))


def noise_distance(levels: np.ndarray) -> float:
    """Loud frames (95th percentile) over the quiet ones (10th) in dB: the signal-to-noise ratio where speech pauses."""
    loud, quiet = np.quantile(levels, [0.95, 0.1])
    return float(loud - quiet)


def clipped_share(wave: np.ndarray) -> float:
    """Share of samples within 5 % of the top, their 99.9th percentile: 0.2 % of speech, 17 % of a sine, more when clipped.

    The top need not be full scale: clips are turned down after clipping, and lossy coding bends flat peaks.
    """
    size = np.abs(wave)
    return float((size >= 0.95 * np.quantile(size, 0.999)).mean())


def hum(wave: np.ndarray, rate: int = RATE) -> float:
    """Level of 50 or 60 Hz and their harmonics up to the sixth over the neighbouring frequencies, in dB, the mean of the six.

    Speech has lines, too, but its pitch moves: over the whole clip none is as narrow as hum. Per harmonic at least 0 dB.
    """
    windowed = wave.astype(np.float64) * np.hanning(len(wave))
    power = np.abs(np.fft.rfft(windowed)) ** 2
    bin_width = rate / len(wave)
    # Hann's main lobe is two bins to each side.
    found = []
    for base in MAINS:
        lines = []
        for harmonic in range(1, 7):
            centre = round(base * harmonic / bin_width)
            near = max(4, round(4 / bin_width))
            far = near + max(8, round(12 / bin_width))
            beside = np.concatenate(
                [power[max(centre - far, 0) : max(centre - near, 0)], power[centre + near : centre + far]]
            )
            line = power[centre - 1 : centre + 2].mean()
            lines.append(10 * np.log10(max(line / max(beside.mean(), 1e-20), 1.0)))
        found.append(float(np.mean(lines)))
    return max(found)


def bandwidth(wave: np.ndarray, rate: int = RATE) -> float:
    """Frequency in kHz below which 99 % of the energy over 200 Hz lies."""
    from scipy.signal import welch

    frequencies, power = welch(wave.astype(np.float64), rate, nperseg=2048)
    speech = frequencies >= 200
    cumulated = np.cumsum(power[speech])
    if cumulated[-1] <= 0:
        return 0.0
    return float(frequencies[speech][np.searchsorted(cumulated, 0.99 * cumulated[-1])] / 1000)


def pitch_median(wave: np.ndarray, rate: int = RATE) -> float | None:
    """Median pitch of the voiced frames in Hz, by autocorrelation at 16 kHz; None where fewer than five are voiced."""
    from scipy.signal import decimate

    low = decimate(wave.astype(np.float64), 3, ftype="fir")
    rate //= 3
    size, hop = round(0.05 * rate), round(0.01 * rate)
    if len(low) < size:
        return None
    frames = np.lib.stride_tricks.sliding_window_view(low, size)[::hop]
    frames = frames - frames.mean(1, keepdims=True)
    energy = (frames**2).mean(1)
    frames = frames[energy > 1e-3 * np.quantile(energy, 0.95)] * np.hanning(size)
    length = 1 << (2 * size - 1).bit_length()
    correlation = np.fft.irfft(np.abs(np.fft.rfft(frames, length)) ** 2)[:, :size]
    window = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(size), length)) ** 2)[:size]
    # Divided by the window's own: without it every frame looks less periodic at long lags (Boersma 1993).
    first, last = int(rate / PITCHES[1]), int(rate / PITCHES[0])
    normal = correlation[:, : last + 2] / np.maximum(correlation[:, :1], 1e-12) / (window[: last + 2] / window[0])
    inside = normal[:, first : last + 1]
    peaks = (inside >= normal[:, first - 1 : last]) & (inside >= normal[:, first + 1 : last + 2])
    # Multiples of the period are as good as the period: prefer short lags by .01 per octave (Boersma's octave cost).
    cost = 0.01 * np.log2(np.arange(first, last + 1) / first)
    scores = np.where(peaks, inside - cost, -1)
    best = scores.argmax(1)
    rows = np.arange(len(scores))
    voiced = scores[rows, best] > VOICED
    if voiced.sum() < 5:
        return None
    lags = best[voiced] + first
    left, here, right = (normal[rows[voiced], lags + step] for step in (-1, 0, 1))
    bend = left - 2 * here + right
    shift = np.where(np.abs(bend) > 1e-12, 0.5 * (left - right) / np.where(bend == 0, 1, bend), 0)
    return float(np.median(rate / (lags + np.clip(shift, -0.5, 0.5))))


_METRICS = (
    Metric("loudness", "loudness (BS.1770)", "LUFS", "target", sees=("volume",)),
    Metric("peak_level", "peak", "dB to full scale", "target", sees=("volume",)),
    Metric("clipped_audio", "samples at the top", "share", "down", sees=("clip_audio",)),
    Metric("silence_share", "silence", "share", "target", sees=("mute",)),
    Metric("channel_balance", "balance: left channel over right", "dB", "target"),
    Metric("audio_snr", "loud over quiet parts", "dB", "up", sees=("hiss", "hum")),
    Metric("hum", "hum: 50 or 60 Hz over neighbouring frequencies", "dB", "down", sees=("hum",)),
    Metric("bandwidth", "bandwidth: 99 % of the energy below", "kHz", "target", sees=("muffle",)),
    Metric("pitch_median", "median pitch", "Hz", "target", sees=("pitch",)),
)  # fmt: skip
MEASUREMENTS = (Measurement("sound", _METRICS, measure_sound, inputs=("audio",), version=3),)
