"""Recognisers: real architectures at a tiny random size through the same code as the released ones, and spoken digits."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_recognisers import WORDS, save_glm, save_qwen3, save_whisper

from eval import speech_recognition
from eval.edits import edits
from eval.speech_recognition import DIGITS, RATE, Recogniser, load_recogniser, missing_recogniser, recogniser_identity
from magihuman.errors import UserError

SAVED = {"glmasr": save_glm, "whisper": save_whisper, "qwen3_asr": save_qwen3}
EVERY = pytest.mark.parametrize("kind", SAVED)
TOKENS = 12


def tone(seconds: float, hertz: float) -> np.ndarray:
    time = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.RandomState(round(hertz)).standard_normal(len(time))
    return (0.3 * np.sin(2 * np.pi * hertz * time * (1 + time)) + 0.01 * noise).astype(np.float32)


WAVES = [tone(1, 200), tone(2.5, 1400), tone(0.5, 500)]
LANGUAGES = ["en", "zh", "en"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = SAVED[kind](tmp_path_factory.mktemp("models") / f"tiny-{kind}", 1)
        return made[kind]

    return folder


@pytest.fixture(scope="module")
def loaded(folders: Callable[[str], Path]) -> Callable[[str], Any]:
    made: dict[str, Recogniser] = {}

    def recogniser(kind: str) -> Any:
        if kind not in made:
            made[kind] = load_recogniser(str(folders(kind)), "cpu")
        return made[kind]

    return recogniser


@pytest.fixture(autouse=True)
def _limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(speech_recognition, "MAX_TOKENS", TOKENS)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@EVERY
def test_a_batch_gives_the_transcripts_of_single_calls(kind: str, loaded: Callable[[str], Any]) -> None:
    recogniser = loaded(kind)
    batch = recogniser.transcribe(WAVES, LANGUAGES)
    assert batch == [recogniser.transcribe([w], [code])[0] for w, code in zip(WAVES, LANGUAGES, strict=True)]
    assert batch == recogniser.transcribe(WAVES, LANGUAGES), "greedy decoding repeats"
    assert len({found.text for found in batch}) > 1, "other audio, other words"
    assert {word for found in batch for word in found.text.split()} <= set(WORDS)
    for found in batch:
        assert found.model == f"tiny-{kind}"
        assert found.revision.startswith("sha256 ")
        assert found.note == "cut at the longest transcript that is decoded"


@EVERY
def test_half_precision(kind: str, folders: Callable[[str], Path]) -> None:
    """The precision of a GPU, on the processor: features are cast, masks and tokens are not."""
    recogniser: Any = load_recogniser(str(folders(kind)), "cpu", "bfloat16")
    assert str(recogniser._network.dtype) == "torch.bfloat16"
    (found,) = recogniser.transcribe([WAVES[0]], ["en"])
    assert found.text
    assert set(found.text.split()) <= set(WORDS)


@EVERY
def test_audio_of_no_word_is_not_transcribed(kind: str, loaded: Callable[[str], Any]) -> None:
    first, second = loaded(kind).transcribe([np.zeros(0, np.float32), np.zeros(399, np.float32)], ["en", None])
    assert (first.text, first.note) == (second.text, second.note) == ("", "less than 25 ms of audio")


def test_whisper_decodes_more_than_its_window(loaded: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recogniser = loaded("whisper")
    monkeypatch.setattr(recogniser._network.generation_config, "suppress_tokens", None)  # which include times
    given: list[dict[str, Any]] = []
    generate = recogniser._network.generate
    monkeypatch.setattr(recogniser._network, "generate", lambda **kwargs: given.append(kwargs) or generate(**kwargs))
    long, short = recogniser.transcribe([tone(33, 300), WAVES[0]], ["en", "en"])
    assert long.note == ""
    assert [call["input_features"].shape[-1] for call in given] == [3300, 3000]
    assert [call.get("return_timestamps") for call in given] == [True, None]
    assert short == recogniser.transcribe([WAVES[0]], ["en"])[0]


def test_languages_are_told_to_models_that_take_one(
    loaded: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whisper, qwen = loaded("whisper"), loaded("qwen3_asr")
    assert [whisper._hint(code) for code in ("en", "zh", "yue", None)] == ["en", "zh", None, None]
    assert [qwen._hint(code) for code in ("en", "yue", "bn", None)] == ["English", "Cantonese", None, None]
    assert loaded("glmasr")._hint("en") is None
    given: list[dict[str, Any]] = []
    generate = whisper._network.generate
    monkeypatch.setattr(whisper._network, "generate", lambda **kwargs: given.append(kwargs) or generate(**kwargs))
    whisper.transcribe(WAVES, ["en", "zh", None])
    assert [(call.get("language"), call["do_sample"], call["num_beams"]) for call in given] == [
        ("en", False, 1), ("zh", False, 1), (None, False, 1),
    ]  # fmt: skip
    asked: list[Any] = []
    request = qwen._processor.apply_transcription_request
    monkeypatch.setattr(
        qwen._processor, "apply_transcription_request",
        lambda waves, language: asked.append(language) or request(waves, language=language),
    )  # fmt: skip
    qwen.transcribe(WAVES, ["en", "zh", "en"])
    assert asked == ["English", "Chinese"]


def test_text_before_the_transcript_of_qwen_is_left_out(
    loaded: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    qwen = loaded("qwen3_asr")
    monkeypatch.setattr(
        qwen._processor.tokenizer, "decode", lambda tokens, **_: ["language English<asr_text>hello world"]
    )
    assert qwen._decode(np.zeros((1, 3), int)) == ["hello world"]


@EVERY
def test_identity_follows_the_weights_and_loads_nothing(
    kind: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folders(kind)
    first = recogniser_identity(str(folder))
    assert first["model"] == f"tiny-{kind}"
    assert str(folder.parent) not in str(first)
    other = shutil.copytree(folder, tmp_path / f"tiny-{kind}")
    assert recogniser_identity(str(other)) == first
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert recogniser_identity(str(other))["revision"] != first["revision"]


def test_looking_for_a_model_imports_neither_torch_nor_transformers(folders: Callable[[str], Path]) -> None:
    code = (
        "import sys; from eval.speech_recognition import *; "
        f"assert missing_recogniser({str(folders('glmasr'))!r}) is None; recogniser_identity({str(folders('glmasr'))!r}); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: Callable[[str], Path]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, repository in speech_recognition.MODELS.items():
        assert f"hf download {repository}" in str(missing_recogniser(name))
        with pytest.raises(UserError, match=f"hf download {repository}"):
            load_recogniser(name)
    assert "there is no folder nowhere" in str(missing_recogniser("nowhere"))
    other = shutil.copytree(folders("glmasr"), tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "type 'llama', no speech recogniser that is known (glmasr, whisper, qwen3_asr)" in str(
        missing_recogniser(str(other))
    )
    (other / "config.json").write_text("{")
    assert "config.json cannot be read" in str(missing_recogniser(str(other)))
    monkeypatch.setitem(speech_recognition._CLASSES, "future_asr", "FutureAsr")
    (other / "config.json").write_text(json.dumps({"model_type": "future_asr"}))
    assert "has no FutureAsr; pip install -U transformers" in str(missing_recogniser(str(other)))


def test_damaged_weights_are_an_error(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders("glmasr"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(dict(list(tensors.items())[1:]), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 tensors; fetch it again"):
        load_recogniser(str(folder), "cpu")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"cannot be loaded \("):
        load_recogniser(str(folder), "cpu")
    with pytest.raises(UserError, match="device=tpu is unknown"):
        load_recogniser(str(folders("glmasr")), "tpu")


# ---- Spoken digits ----

needs_digits = pytest.mark.skipif(
    not (find_spec("pocketsphinx") and find_spec("espeakng_loader")),
    reason="needs pocketsphinx and espeakng-loader: extra [dev]",
)


@needs_digits
def test_spoken_digits_are_understood() -> None:
    from spoken_digits import speak_digits

    recogniser = load_recogniser("smoke")
    draw = np.random.RandomState(11)
    said = [[DIGITS[i] for i in draw.randint(0, 10, 4)] for _ in range(6)]
    heard = [found.text.split() for found in recogniser.transcribe([speak_digits(words) for words in said], ["en"] * 6)]
    own = sum(edits(a, b).errors for a, b in zip(said, heard, strict=True)) / 24
    other = sum(edits(a, b).errors for a, b in zip(said, heard[1:] + heard[:1], strict=True)) / 24
    assert own < 0.1
    assert other > 0.7


@needs_digits
def test_a_clip_does_not_depend_on_those_before() -> None:
    from spoken_digits import speak_digits

    recogniser = load_recogniser("smoke")
    first, second = speak_digits(("one", "two", "three")), speak_digits(("nine", "four"))
    alone = recogniser.transcribe([second], [None])[0]
    assert recogniser.transcribe([first, 0.1 * first, second], [None] * 3)[2] == alone
    assert (alone.text, alone.model) == ("nine four", "pocketsphinx digits")
    silence = recogniser.transcribe([np.zeros(RATE, np.float32), np.zeros(0, np.float32)], [None, None])
    assert [found.text for found in silence] == ["", ""]


def test_the_smoke_recogniser_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert str(missing_recogniser("smoke")) == "the package pocketsphinx is not installed; pip install pocketsphinx"
