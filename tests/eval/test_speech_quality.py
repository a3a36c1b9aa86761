"""DNSMOS against values of speechmos 0.0.1.1's own code with librosa 0.11, made once in an environment that has both."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from wave_files import speech_like, write_wave

from eval.clip_file import ClipFile, NotMeasured
from eval.metrics import speech_quality
from eval.metrics.speech_quality import MEASUREMENTS, dnsmos, load, log_mel, measure

needs_networks = pytest.mark.skipif(
    not (find_spec("speechmos") and find_spec("onnxruntime")), reason="needs speechmos and onnxruntime: extra [eval]"
)
# (seconds, noise): overall, speech, background, P.808. 3 and 4.6 s are repeated, 12.3 s has four windows.
UPSTREAM = {
    (9.5, 0.01): (1.8025852175467352, 3.0151001191316995, 2.1480549212867857, 2.40665340423584),
    (4.6, 0.05): (1.088786965234777, 1.1933063371923762, 1.1295974135303184, 2.1249454021453857),
}
MORE = {
    (3.0, 0.0): (1.4904651071785748, 1.7119855987189938, 3.33300771721184, 2.7933356761932373),
    (12.3, 0.001): (1.8193176723868998, 2.2829840745824446, 2.914419813014684, 2.3522493839263916),
}
KEYS = ("dnsmos_ovrl", "dnsmos_sig", "dnsmos_bak", "dnsmos_p808")


@needs_networks
@pytest.mark.parametrize(
    ("case", "expected"), [*UPSTREAM.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in MORE.items())]
)
def test_scores_are_those_of_the_package(case: tuple[float, float], expected: tuple[float, ...]) -> None:
    found = dnsmos(speech_like(*case), load(None))
    assert [found[key] for key in KEYS] == pytest.approx(expected, abs=2e-4)


def test_mel_spectrogram_of_a_tone() -> None:
    """A tone peaks in the band around it; the loudest band is 1, and nothing is below -1."""
    time = np.arange(16000) / 16000
    found = log_mel(0.5 * np.sin(2 * np.pi * 500 * time))
    assert found.shape == (100, 120)
    assert found.max() == 1.0
    assert found.min() == -1.0
    # Slaney's scale: 500 Hz is mel 7.5 of 45.25, in 121 steps.
    highest = 15 + 27 * np.log(8) / np.log(6.4)
    assert abs(found[50].argmax() + 1 - 7.5 / highest * 121) < 0.6


def test_what_has_no_speech_quality(tmp_path: Path) -> None:
    silent = ClipFile(write_wave(tmp_path / "silent.wav", np.zeros(16000)))
    with pytest.raises(NotMeasured, match="the audio is silent"):
        measure(silent, None)  # type: ignore[arg-type]
    quiet = ClipFile(write_wave(tmp_path / "a.wav", speech_like(1.0)), dialogue=" ")
    with pytest.raises(NotMeasured, match="nobody should speak"):
        measure(quiet, None)  # type: ignore[arg-type]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install onnxruntime" in str(speech_quality.missing(None))


def test_other_networks_are_another_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values in the cache are not those of another version of the package."""
    (tmp_path / "dnsmos_models").mkdir()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    identity, found = MEASUREMENTS[0].identity, set()
    assert identity is not None
    for content in (b"old", b"new"):
        (tmp_path / "dnsmos_models" / "model_v8.onnx").write_bytes(content)
        found.add(str(identity(None)))
    assert len(found) == 2
