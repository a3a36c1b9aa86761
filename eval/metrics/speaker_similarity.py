"""Likeness of a clip's voice to the voice that was given: cosine of two speaker embeddings.

    model = load(SpeakerSimilarityOptions())
    measure(ClipFile(Path("a.mp4"), voice=Path("voice.wav")), model)["speaker_similarity"]   # -1 to 1

The network is a speaker verification model of transformers (WavLM or Wav2Vec2 with an x-vector head), or any file that
turns audio into a vector. Values of different networks cannot be compared. Silence at both ends is cut off.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.clip_file import SILENT_PEAK, ClipFile, MeasurementError, NotMeasured
from eval.extractor import load_extractor, missing_extractor
from eval.fingerprint import fingerprint, local_model, missing_model
from eval.metrics.registry import Measurement, Metric, MissingDependency, missing_package
from magihuman.cli import option
from magihuman.errors import UserError

RATE = 16000
LONGEST = 30.0
"""Seconds of each voice that are used: more tells nothing new of it, and attention over it is slow."""
Embedding = Callable[[np.ndarray], np.ndarray]
"""fp32 [1,N] at `RATE` -> fp32 [1,D]."""


@dataclass(frozen=True)
class SpeakerSimilarityOptions:
    """Settings of the speaker network."""

    weights: str = option(
        "Hub name in the local cache or folder of a WavLM or Wav2Vec2 model with an x-vector head, or an .onnx or "
        "TorchScript file: audio fp32 [1,N] at 16 kHz to a vector [1,D]",
        "microsoft/wavlm-base-plus-sv",
    )
    device: str = option("auto, cpu, cuda or cuda:0", "auto")


def _is_file(weights: str) -> bool:
    return Path(weights).suffix in (".onnx", ".pt", ".pth", ".ts") or Path(weights).expanduser().is_file()


def missing(options: SpeakerSimilarityOptions) -> MissingDependency | None:
    """The network's weights."""
    if _is_file(options.weights):
        content = "a speaker network (.onnx or TorchScript)"
        return missing_extractor(options.weights, "speaker_similarity.weights", content)
    return missing_package("transformers") or missing_model(options.weights)


def identity(options: SpeakerSimilarityOptions) -> Mapping[str, Any]:
    """Fingerprint of the network."""
    path = Path(options.weights).expanduser() if _is_file(options.weights) else local_model(options.weights)
    return {"weights": path.name if path.is_file() else Path(options.weights).name, "revision": fingerprint(path)}


def load(options: SpeakerSimilarityOptions) -> Embedding:
    """The network as a function.

    Raises:
        UserError: absent, damaged, or no speaker network.
    """
    if _is_file(options.weights):
        return load_extractor(Path(options.weights), options.device)
    import torch
    from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

    from inference.loading import choose_device

    folder, place = local_model(options.weights), choose_device(options.device)
    try:
        extractor: Any = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        loaded: Any = AutoModelForAudioXVector.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # transformers raises many kinds for damaged or foreign files
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{options.weights} cannot be loaded as a speaker network: {reason}") from error
    network, report = loaded
    if report["missing_keys"]:  # transformers fills them with random numbers, as of a model without an x-vector head
        raise UserError(
            f"{options.weights} lacks {len(report['missing_keys'])} tensors of a speaker network; give one for speaker "
            "verification, such as microsoft/wavlm-base-plus-sv"
        )
    network = network.to(place).eval()

    def embed(wave: np.ndarray) -> np.ndarray:
        inputs = extractor(wave[0], sampling_rate=RATE, return_tensors="pt").to(place)
        with torch.inference_mode():
            return np.asarray(network(**inputs).embeddings.float().cpu())

    return embed


def _speech(wave: np.ndarray, what: str) -> np.ndarray:
    """The audio between its first and last sound, at most `LONGEST`: fp32 [1,N].

    Raises:
        NotMeasured: silence, or less than .25 s of sound.
    """
    loud = np.flatnonzero(np.abs(wave) >= SILENT_PEAK)
    if not len(loud):
        raise NotMeasured(f"{what} is silent")
    spoken = wave[loud[0] : loud[-1] + 1][: int(LONGEST * RATE)]
    if len(spoken) < RATE // 4:
        raise NotMeasured(f"{what} has {len(spoken) / RATE:.2f} s of sound; a voice needs at least 0.25 s")
    return spoken[None].astype(np.float32)


def measure(clip: ClipFile, embed: Embedding) -> Mapping[str, Any]:
    """Similarity of a clip's voice and the given one.

    Raises:
        NotMeasured: no voice was given, or one of both is silent.
        MeasurementError: the file of the voice cannot be read.
    """
    from magihuman.media.reading import read_audio

    if clip.voice is None:
        raise NotMeasured("no voice was given")
    own = _speech(clip.wave(RATE), "the clip")
    try:
        given = read_audio(clip.voice, RATE).numpy()[0]
    except (UserError, OSError) as error:
        raise MeasurementError(f"the voice {clip.voice.name} cannot be read: {error}") from error
    first, second = embed(own)[0], embed(_speech(given, "the given voice"))[0]
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    if not np.isfinite(length) or length == 0:
        raise MeasurementError("the network gives no finite vector that is not 0")
    return {"speaker_similarity": float(np.dot(first, second) / length)}


MEASUREMENTS = (
    Measurement(
        "speaker_similarity",
        (Metric("speaker_similarity", "likeness to the given voice (cosine)", "", "up", best=1, sees=("voice",)),),
        measure,
        inputs=("audio", "voice"),
        version=2,
        options=SpeakerSimilarityOptions,
        missing=missing,
        load=load,
        identity=identity,
        costly=True,
    ),
)
