"""Speech quality without a reference: DNSMOS P.835 and P.808, networks that predict opinion scores of listeners.

    measure(ClipFile(Path("a.mp4")), load(None))["dnsmos_ovrl"]   # 1 to 5

Reddy et al. 2021 and 2022. Weights and method are those of the package speechmos, its dependency librosa is not needed:
windows of 9.01 s every second, shorter audio repeated, the published polynomials from network outputs to scores, means
over windows. The networks were trained on English in noise; of other voices and languages compare models, not values.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.clip_file import SILENT_PEAK, ClipFile, NotMeasured
from eval.fingerprint import fingerprint
from eval.metrics.registry import Measurement, Metric, MissingDependency, missing_package

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

RATE = 16000
WINDOW = int(9.01 * RATE)
_POLYNOMIALS = {
    "dnsmos_sig": (-0.08397278, 1.22083953, 0.0052439),
    "dnsmos_bak": (-0.13166888, 1.60915514, -0.39604546),
    "dnsmos_ovrl": (-0.06766283, 1.11546468, 0.04602535),
}
_MEL_WINDOW, _MEL_HOP, _MEL_BANDS = 321, 160, 120


def missing(options: None) -> MissingDependency | None:
    """The packages with the networks and their runtime."""
    return missing_package("onnxruntime") or missing_package("speechmos")


def _networks() -> Path:
    """Folder of the networks in the package."""
    from importlib.util import find_spec

    spec = find_spec("speechmos")  # importing its modules would import librosa
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "dnsmos_models"


def identity(options: None) -> Mapping[str, Any]:
    """The networks by their fingerprint: another version of the package may have others."""
    return {"networks": fingerprint(_networks())}


def load(options: None) -> tuple["InferenceSession", "InferenceSession"]:
    """The networks of P.835 and P.808."""
    import onnxruntime

    folder = _networks()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1  # tiny networks; and the same sum in the same order everywhere
    first, second = (
        onnxruntime.InferenceSession(str(folder / name), settings, providers=["CPUExecutionProvider"])
        for name in ("sig_bak_ovr.onnx", "model_v8.onnx")
    )
    return first, second


def dnsmos(wave: np.ndarray, networks: tuple["InferenceSession", "InferenceSession"]) -> dict[str, float]:
    """The four scores of audio: fp32 [N] at 16 kHz in [-1,1], N > 0."""
    quality, overall = networks
    while len(wave) < WINDOW:
        wave = np.append(wave, wave)
    scores: dict[str, list[float]] = {key: [] for key in (*_POLYNOMIALS, "dnsmos_p808")}
    for start in range(0, RATE * (int(len(wave) // RATE - 9.01) + 1), RATE):
        window = wave[start : start + WINDOW].astype(np.float32)
        if len(window) < WINDOW:
            continue
        raw = quality.run(None, {"input_1": window[None]})[0][0]
        for (key, polynomial), value in zip(_POLYNOMIALS.items(), raw, strict=True):
            scores[key].append(float(np.polyval(polynomial, value)))
        spectrum = log_mel(window[:-_MEL_HOP]).astype(np.float32)
        scores["dnsmos_p808"].append(float(overall.run(None, {"input_1": spectrum[None]})[0][0, 0]))
    return {key: float(np.mean(values)) for key, values in scores.items()}


@cache
def _mel_filters() -> np.ndarray:
    """Triangles of equal area on Slaney's scale (linear to 1 kHz, then logarithmic), as librosa has: fp64 [bins,bands]."""

    def to_hertz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    highest = 15 + 27 * np.log(RATE / 2 / 1000) / np.log(6.4)
    edges = to_hertz(np.linspace(0, highest, _MEL_BANDS + 2))
    bins = np.fft.rfftfreq(_MEL_WINDOW, 1 / RATE)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.clip(np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)), 0, None)
    return triangles * 2 / (high - low)


def log_mel(wave: np.ndarray) -> np.ndarray:
    """Mel spectrogram in dB under its maximum, down to -80, scaled to [-1,1]: [N] at 16 kHz to fp64 [ceil(N / 160), 120]."""
    padded = np.pad(np.asarray(wave, np.float64), _MEL_WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _MEL_WINDOW)[::_MEL_HOP]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_MEL_WINDOW) / _MEL_WINDOW)
    power = np.abs(np.fft.rfft(frames * window, axis=1)) ** 2 @ _mel_filters()
    decibels = 10 * np.log10(np.maximum(power, 1e-10) / max(power.max(), 1e-10))
    return (np.maximum(decibels, -80) + 40) / 40


def measure(clip: ClipFile, networks: tuple["InferenceSession", "InferenceSession"]) -> Mapping[str, Any]:
    """Scores of a clip's audio.

    Raises:
        NotMeasured: no audio, silence, or nobody should speak.
    """
    if clip.dialogue is not None and not clip.dialogue.strip():
        raise NotMeasured("nobody should speak (the dialogue is empty)")
    wave = clip.wave(RATE)
    if not len(wave) or np.abs(wave).max() < SILENT_PEAK:
        raise NotMeasured("the audio is silent")
    return dnsmos(wave, networks)


MEASUREMENTS = (
    Measurement(
        "speech_quality",
        (
            Metric("dnsmos_ovrl", "DNSMOS P.835, overall", "1 to 5", "up", best=5, sees=("hiss", "clip_audio")),
            Metric("dnsmos_sig", "DNSMOS P.835, speech", "1 to 5", "up", best=5),
            Metric("dnsmos_bak", "DNSMOS P.835, background", "1 to 5", "up", best=5, sees=("hiss",)),
            Metric("dnsmos_p808", "DNSMOS P.808", "1 to 5", "up", best=5, sees=("clip_audio",)),
        ),
        measure,
        inputs=("audio",),
        version=2,
        optional=("dialogue",),
        missing=missing,
        load=load,
        identity=identity,
        costly=True,
    ),
)
