"""Audio files for tests, written without a codec."""

import wave
from pathlib import Path

import numpy as np


def write_wave(path: Path, samples: np.ndarray, rate: int = 16000) -> Path:
    """fp32 [N] in [-1,1] as a 16-bit file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes())
    return path


def speech_like(seconds: float, noise: float = 0.0, rate: int = 16000) -> np.ndarray:
    """Syllables of a harmonic tone over white noise: fp32 [N], the same on every machine."""
    time = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(120 + 20 * np.sin(2 * np.pi * 0.7 * time)) / rate
    tone = np.sum([np.sin(k * phase) / k**1.2 for k in range(1, 30)], axis=0)
    syllables = tone * np.clip(np.sin(2 * np.pi * 3.1 * time), 0, None) * 0.1
    return (syllables + noise * np.random.RandomState(0).standard_normal(len(time))).astype(np.float32)
