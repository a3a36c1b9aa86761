"""Speaker similarity by a planted network, a real architecture at a tiny random size, and a TorchScript file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_recognisers import save_wavlm
from wave_files import write_wave

from eval.clip_file import ClipFile, MeasurementError, NotMeasured
from eval.metrics.speaker_similarity import RATE, SpeakerSimilarityOptions, identity, load, measure, missing
from eval.scoring import score
from magihuman.errors import UserError


def voice(hertz: float, seconds: float = 1.0) -> np.ndarray:
    time = np.arange(int(seconds * RATE)) / RATE
    return 0.2 * np.sign(np.cos(2 * np.pi * hertz * time)) * (1 + 0.3 * np.sin(2 * np.pi * 3 * time))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    sounds = {"low": voice(100), "high": voice(310), "silent": np.zeros(RATE), "short": voice(100, 0.2)}
    return {name: write_wave(tmp_path / f"{name}.wav", wave) for name, wave in sounds.items()}


def clip(files: dict[str, Path], own: str, given: str) -> ClipFile:
    return ClipFile(files[own], voice=files[given])


def test_cosine_of_planted_vectors(files: dict[str, Path]) -> None:
    vectors = iter([np.array([[3.0, 0.0]]), np.array([[2.0, 2.0]])])
    value = measure(clip(files, "low", "high"), lambda wave: next(vectors))["speaker_similarity"]
    assert value == pytest.approx(2**-0.5)


def test_silence_at_the_ends_and_what_is_long_is_left_out(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def embed(wave: np.ndarray) -> np.ndarray:
        seen.append(wave.shape)
        return np.ones((1, 2))

    padded = write_wave(tmp_path / "padded.wav", np.pad(voice(100), (8000, 4000)))
    long = write_wave(tmp_path / "long.wav", voice(100, 31))
    assert measure(ClipFile(padded, voice=long), embed)["speaker_similarity"] == pytest.approx(1)
    assert seen == [(1, 16000), (1, 480000)]


def test_what_cannot_be_compared(files: dict[str, Path], tmp_path: Path) -> None:
    def one(wave: np.ndarray) -> np.ndarray:
        return np.zeros((1, 2))

    for own, given, reason in (
        ("silent", "low", "the clip is silent"), ("low", "silent", "the given voice is silent"),
        ("low", "short", r"the given voice has 0.20 s of sound; a voice needs at least 0.25 s"),
    ):  # fmt: skip
        with pytest.raises(NotMeasured, match=reason):
            measure(clip(files, own, given), one)
    with pytest.raises(NotMeasured, match="no voice was given"):
        measure(ClipFile(files["low"]), one)
    with pytest.raises(MeasurementError, match="no finite vector"):
        measure(clip(files, "low", "high"), one)
    (tmp_path / "broken.wav").write_text("no audio")
    with pytest.raises(MeasurementError, match=r"the voice broken.wav cannot be read"):
        measure(ClipFile(files["low"], voice=tmp_path / "broken.wav"), one)


def test_a_network_of_transformers(files: dict[str, Path], tmp_path: Path) -> None:
    folder = save_wavlm(tmp_path / "tiny-wavlm")
    options = {"speaker_similarity": {"weights": str(folder), "device": "cpu"}}
    clips = [clip(files, "low", "low"), clip(files, "low", "high"), ClipFile(files["low"])]
    clips = [ClipFile(c.path, name, voice=c.voice) for name, c in zip(("same", "other", "none"), clips, strict=True)]
    scored = score(clips, ["speaker_similarity"], options, tmp_path / "cache", progress=False)
    same, other, none = (r.values["speaker_similarity"] for r in scored.rows)
    assert same.value == pytest.approx(1, abs=1e-5)
    assert other.value is not None
    assert other.value < 0.9999
    assert (none.status, "voice" in none.reason) == ("skipped", True)
    assert score(clips, ["speaker_similarity"], options, tmp_path / "cache", progress=False).measured == 0
    before = identity(SpeakerSimilarityOptions(str(folder)))
    assert before["weights"] == "tiny-wavlm"
    save_wavlm(folder, 1)
    assert identity(SpeakerSimilarityOptions(str(folder)))["revision"] != before["revision"]


def test_a_network_without_the_head_is_refused(tmp_path: Path) -> None:
    from transformers import WavLMModel

    folder = save_wavlm(tmp_path / "wavlm")
    WavLMModel.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(UserError, match="tensors of a speaker network; give one for speaker verification"):
        load(SpeakerSimilarityOptions(str(folder), "cpu"))


class Spectrum(torch.nn.Module):
    """Magnitudes of the first second as a vector."""

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(wave[:, :16000], n=16000).abs()[:, 20:2000]


def test_a_torchscript_file(files: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "speaker.pt"
    torch.jit.script(Spectrum()).save(str(file))
    embed = load(SpeakerSimilarityOptions(str(file), "cpu"))
    assert measure(clip(files, "low", "low"), embed)["speaker_similarity"] == pytest.approx(1)
    assert measure(clip(files, "low", "high"), embed)["speaker_similarity"] < 0.3
    assert identity(SpeakerSimilarityOptions(str(file)))["weights"] == "speaker.pt"


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert "hf download microsoft/wavlm-base-plus-sv" in str(missing(SpeakerSimilarityOptions()))
    assert "speaker_similarity.weights=none.onnx is no file" in str(missing(SpeakerSimilarityOptions("none.onnx")))
