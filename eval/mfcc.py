"""Mel-frequency cepstral coefficients as python_speech_features 0.6 computes them, which SyncNet was trained with.

mfcc(wave)   # fp64 [T,13], 100 rows per second
"""

import numpy as np

RATE = 16000
STEP = 160  # samples: 10 ms
_WINDOW = 400  # 25 ms, rectangular
_FFT = 512
_FILTERS = 26
_KEPT = 13
_LIFTER = 22
_EMPHASIS = 0.97


def mfcc(wave: np.ndarray) -> np.ndarray:
    """Coefficients fp64 [T,13] of audio fp32 [N] in [-1,1] at 16 kHz, N > 0; the last window is filled with zeros.

    The first coefficient is the log energy. Samples count as 16-bit integers, as from a WAV file.
    """
    from scipy.fft import dct

    signal = np.clip(np.round(np.asarray(wave, np.float64) * 32768), -32768, 32767)
    signal = np.append(signal[0], signal[1:] - _EMPHASIS * signal[:-1])
    count = 1 + max(0, -(-(len(signal) - _WINDOW) // STEP))
    signal = np.pad(signal, (0, max(0, (count - 1) * STEP + _WINDOW - len(signal))))
    windows = np.lib.stride_tricks.sliding_window_view(signal, _WINDOW)[: count * STEP : STEP]
    power = np.abs(np.fft.rfft(windows, _FFT)) ** 2 / _FFT
    energy, bands = power.sum(1), power @ _filters().T
    tiny = np.finfo(float).eps
    energy, bands = np.where(energy == 0, tiny, energy), np.where(bands == 0, tiny, bands)
    found = dct(np.log(bands), type=2, axis=1, norm="ortho")[:, :_KEPT]
    found *= 1 + _LIFTER / 2 * np.sin(np.pi * np.arange(_KEPT) / _LIFTER)
    found[:, 0] = np.log(energy)
    return found


def _filters() -> np.ndarray:
    """Triangles [26,257] over the bins of the spectrum, evenly spaced in mel from 0 to 8 kHz, corners on whole bins."""
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, top, _FILTERS + 2) / 2595) - 1)
    corners = np.floor((_FFT + 1) * hertz / RATE)
    bins = np.arange(_FFT // 2 + 1)
    left, middle, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        rising, falling = (bins - left) / (middle - left), (right - bins) / (right - middle)
    inside = np.where((bins >= left) & (bins < middle), rising, 0)
    return np.where((bins >= middle) & (bins < right), falling, inside)
