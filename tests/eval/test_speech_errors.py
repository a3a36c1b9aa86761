"""Error rates of clips: pooled and mean, what is skipped and why, the cache, and spoken digits from clip to rate."""

import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_recognisers import save_glm, save_whisper
from wave_files import speech_like, write_wave

from eval import speech_recognition
from eval.clip_file import ClipFile, MeasurementError, NotMeasured
from eval.metrics.registry import measurements
from eval.metrics.speech_errors import NO_REFERENCE, SpeechErrorsOptions, identity, load, measure
from eval.score_rows import ClipRow, Value
from eval.score_summary import summarise
from eval.scoring import score
from eval.speech_recognition import Transcript, TransformersRecogniser
from magihuman.errors import UserError


class Planted:
    """A recogniser that hears what it is told to."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = list(texts), []

    def transcribe(self, waves: Any, languages: Any) -> list[Transcript]:
        self.asked += list(languages)
        return [Transcript(self.texts.pop(0), "planted/model", "commit 1", "cut") for _ in waves]


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write_wave(tmp_path / "a.wav", speech_like(1.0))


def found(sound: Path, heard: str, **known: Any) -> dict[str, Any]:
    return dict(measure(ClipFile(sound, **known), Planted(heard)))


def row(name: str, values: dict[str, Any]) -> ClipRow:
    kept = {key: Value(float(v)) for key, v in values.items() if isinstance(v, int | float)}
    return ClipRow(name, name, "", None, None, kept)


def test_values_of_one_clip_by_hand(sound: Path) -> None:
    values = found(sound, "a black cat sat down there", dialogue="The black cat sat.", language="English")
    assert values["wer"] == values["wer_clip_mean"] == 3 / 4
    assert [values[f"wer_{kind}"] for kind in ("substitutions", "deletions", "insertions")] == [0.25, 0, 0.5]
    assert (values["wer_units"], values["mer"], values["mer_units"]) == (4, 3 / 4, 4)
    assert values["speech_recognised"] == 1
    assert values["transcript_text"] == "a black cat sat down there"
    assert values["recogniser_text"] == "planted/model, commit 1; cut"
    assert values["unit_text"] == "word, as en"
    assert str(values["hallucinated_speech"]) == "words are asked for"
    assert str(values["korean_wer"]) == "the dialogue is not Korean"
    declared = {metric.key for metric in measurements()["speech_errors"].metrics}
    assert {key for key in values if not key.endswith("_text")} == declared


def test_pooled_is_the_headline_and_the_mean_stands_beside_it(sound: Path) -> None:
    short = found(sound, "yes a b c d e", dialogue="yes", language="en")
    long = found(sound, "w " * 20, dialogue="w " * 20, language="en")
    summary = summarise([row("short", short), row("long", long)])
    assert summary["wer"]["value"] == pytest.approx(5 / 21)
    assert summary["wer_clip_mean"]["value"] == pytest.approx(2.5)
    assert summary["wer_insertions"]["value"] == pytest.approx(5 / 21)
    assert short["wer"] == 5.0, "not clipped"


def test_cjk_in_characters_and_the_hint(sound: Path) -> None:
    recogniser = Planted("你好世间")
    values = measure(ClipFile(sound, dialogue="你 好 世 界", language="Chinese"), recogniser)
    assert (values["wer"], values["wer_units"]) == (0.25, 4)
    assert recogniser.asked == ["zh"]
    undeclared = Planted("你好")
    assert "Mandarin and Cantonese" in measure(ClipFile(sound, dialogue="你 好"), undeclared)["unit_text"]
    assert undeclared.asked == [None]


def test_korean_words_beside_blocks(sound: Path) -> None:
    values = found(sound, "안녕하세요 여러분", dialogue="안녕 하세요 여러분", language="ko")
    assert (values["wer"], values["korean_wer"], values["korean_words"]) == (0, 2 / 3, 3)


@pytest.mark.parametrize(("heard", "hallucinated"), [("", 0), ("...", 0), ("thank you for watching", 1), ("你好", 1)])
@pytest.mark.parametrize("dialogue", ["", "  ", "…"])
def test_empty_dialogue_has_no_rate_and_is_counted(sound: Path, dialogue: str, heard: str, hallucinated: int) -> None:
    values = found(sound, heard, dialogue=dialogue)
    assert values["hallucinated_speech"] == hallucinated
    for key in ("wer", "wer_clip_mean", "wer_units", "mer", "speech_recognised"):
        assert isinstance(values[key], NotMeasured)
        assert str(values[key]) == "nobody should speak (the dialogue is empty); see hallucinated_speech"


def test_the_prompt_is_never_the_reference(sound: Path) -> None:
    recogniser = Planted()
    with pytest.raises(NotMeasured, match="no reference text; give a manifest with dialogue or prompts with a block"):
        measure(ClipFile(sound, prompt="A woman stands in the rain."), recogniser)
    (scored,) = score(
        [ClipFile(sound, prompt="A woman")], ["speech_errors"], {"speech_errors": {"model": "smoke"}}
    ).rows
    assert {(value.value, value.reason) for value in scored.values.values()} == {(None, NO_REFERENCE)}


def test_unknown_language_fails_with_the_known_ones(sound: Path) -> None:
    with pytest.raises(MeasurementError, match=r"'Klingon' is not known; write one of zh \(Chinese\)"):
        found(sound, "", dialogue="nuqneH", language="Klingon")


def test_silence_is_all_missing_and_no_recogniser_is_asked(tmp_path: Path) -> None:
    silent = ClipFile(write_wave(tmp_path / "silent.wav", np.zeros(16000)), dialogue="good morning")
    values = measure(silent, Planted())
    assert (values["wer"], values["wer_deletions"], values["speech_recognised"]) == (1, 1, 0)
    assert values["recogniser_text"] == "none, the audio is silent"


def test_a_whole_run_with_a_real_architecture_and_its_cache(
    tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(speech_recognition, "MAX_TOKENS", 8)
    folder = save_glm(tmp_path / "tiny-glm", 1)
    options = {"speech_errors": {"model": str(folder), "device": "cpu"}}
    clips = [
        ClipFile(sound, "speaks", dialogue="hello world", language="en"),
        ClipFile(sound, "silent", dialogue=""),
        ClipFile(sound, "unknown"),
        ClipFile(tmp_path / "none.wav", "lost", dialogue="hello"),
    ]
    first = score(clips, ["speech_errors"], options, tmp_path / "cache", progress=False)
    speaks, silent, unknown, lost = first.rows
    assert len(speaks.texts["transcript_text"].split()) == 8
    assert speaks.texts["recogniser_text"].startswith("tiny-glm, sha256 ")
    assert speaks.values["wer"].value is not None
    assert speaks.values["wer_insertions"].value >= 3  # eight words for two
    assert silent.values["hallucinated_speech"].value == 1
    assert silent.values["wer"] == Value(
        None, "skipped", "nobody should speak (the dialogue is empty); see hallucinated_speech"
    )
    assert unknown.values["wer"] == Value(None, "skipped", NO_REFERENCE)
    assert lost.values["wer"].status == "failed"
    summary = first.summary()["wer"]
    assert (summary["n"], summary["total"], summary["skipped"], summary["failed"]) == (1, 4, 2, 1)

    monkeypatch.setattr(speech_recognition, "TransformersRecogniser", None)  # nothing is loaded again
    again = score(clips[:3], ["speech_errors"], options, tmp_path / "cache", progress=False)
    assert again.measured == 0
    assert [r.to_dict() for r in again.rows] == [r.to_dict() for r in first.rows[:3]]
    before = identity(SpeechErrorsOptions(str(folder)))
    save_glm(folder, 2)
    assert identity(SpeechErrorsOptions(str(folder))) != before


@pytest.mark.parametrize("save", [save_glm, save_whisper], ids=["glm", "whisper"])
def test_a_batch_gives_the_rows_of_single_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[[Path, int], Path]
) -> None:
    """Clips of other lengths and languages together with silence, a broken file, and what cannot be compared."""
    monkeypatch.setattr(speech_recognition, "MAX_TOKENS", 8)
    inner, asked = TransformersRecogniser.transcribe, []
    monkeypatch.setattr(
        TransformersRecogniser, "transcribe", lambda self, *given: asked.append(len(given[0])) or inner(self, *given)
    )
    (tmp_path / "broken.wav").write_bytes(b"broken")
    clips = [
        ClipFile(write_wave(tmp_path / "a.wav", speech_like(1.0)), dialogue="hello world", language="en"),
        ClipFile(tmp_path / "broken.wav", dialogue="hello", language="en"),
        ClipFile(write_wave(tmp_path / "b.wav", speech_like(2.3, 0.1)), dialogue="你好", language="zh"),
        ClipFile(write_wave(tmp_path / "silent.wav", np.zeros(16000)), dialogue="good morning"),
        ClipFile(write_wave(tmp_path / "c.wav", speech_like(0.5, 0.2)), dialogue=""),
        ClipFile(write_wave(tmp_path / "d.wav", speech_like(0.7, 0.05)), dialogue="nuqneH", language="Klingon"),
        ClipFile(write_wave(tmp_path / "e.wav", speech_like(1.7, 0.4)), dialogue="blue river", language="en"),
    ]
    options = {"model": str(save(tmp_path / "model", 1)), "device": "cpu"}

    def rows(batch: int) -> list[ClipRow]:
        asked.clear()
        return score(clips, ["speech_errors"], {"speech_errors": {**options, "batch": batch}}, progress=False).rows

    together = rows(8)
    assert asked == [4], "neither silence nor what failed before"
    assert len({row.texts["transcript_text"] for row in together if "transcript_text" in row.texts}) >= 3
    assert [row.values["hallucinated_speech"].status for row in together] == [
        "skipped", "failed", "skipped", "skipped", "ok", "failed", "skipped",
    ]  # fmt: skip
    assert rows(3) == together
    assert asked == [2, 2], "a place of the first batch is the silent clip's"
    assert rows(1) == together
    assert asked == [1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [{}, {"dtype": "bfloat16"}])
def test_the_precision_in_the_identity_is_the_one_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: dict[str, str]
) -> None:
    folder = save_glm(tmp_path / "model", 1)
    given = SpeechErrorsOptions(str(folder), **dtype)
    for device in ("cpu", "meta"):  # as if it were a GPU
        monkeypatch.setattr("inference.loading.choose_device", lambda _, device=device: torch.device(device))
        network = load(given)._network
        assert (network.device.type, str(network.dtype)) == (device, f"torch.{identity(given)['dtype']}")


def test_options_are_checked_and_the_size_of_a_batch_is_no_part_of_the_identity(tmp_path: Path) -> None:
    folder = save_glm(tmp_path / "model", 1)
    assert identity(SpeechErrorsOptions(str(folder), batch=1)) == identity(SpeechErrorsOptions(str(folder), batch=9))
    with pytest.raises(UserError, match=r"^speech_errors.batch=0 must be at least 1"):
        SpeechErrorsOptions(batch=0)
    with pytest.raises(UserError, match="dtype"):
        score([], ["speech_errors"], {"speech_errors": {"dtype": "auto"}}, progress=False)


needs_digits = pytest.mark.skipif(
    not (find_spec("pocketsphinx") and find_spec("espeakng_loader")),
    reason="needs pocketsphinx and espeakng-loader: extra [dev]",
)


@needs_digits
def test_spoken_digits_from_clip_to_rate(tmp_path: Path) -> None:
    from spoken_digits import speak_digits

    texts = [
        "three one four one",
        "five nine two six",
        "five three five eight",
        "nine seven nine three",
        "two three eight four",
    ]
    files = [write_wave(tmp_path / f"{i}.wav", speak_digits(text.split())) for i, text in enumerate(texts)]
    options = {"speech_errors": {"model": "smoke"}}

    def pooled(order: list[str]) -> float:
        clips = [ClipFile(file, dialogue=text, language="en") for file, text in zip(files, order, strict=True)]
        value = score(clips, ["wer"], options, progress=False).summary()["wer"]["value"]
        return float(value)

    assert pooled(texts) < 0.1
    assert pooled(texts[1:] + texts[:1]) > 0.7


@pytest.mark.slow
@needs_digits
def test_more_replaced_words_are_more_errors(tmp_path: Path) -> None:
    """The claim of `wer`: the strengths of the fault "words", spoken anew."""
    from spoken_digits import speak_digits

    from eval.faults import FAULTS

    texts = [text.split() for text in ("three one four one", "five nine two six", "two seven one eight")]
    options = {"speech_errors": {"model": "smoke"}}
    rates = []
    for share in (0.0, *FAULTS["words"].strengths):
        clips = []
        for index, words in enumerate(texts):
            said = [
                speech_recognition.DIGITS[(speech_recognition.DIGITS.index(word) + 5) % 10] if i < share * 4 else word
                for i, word in enumerate(words)
            ]
            file = write_wave(tmp_path / f"{index}-{share}.wav", speak_digits(said))
            clips.append(ClipFile(file, dialogue=" ".join(words), language="en"))
        rates.append(score(clips, ["wer"], options, progress=False).summary()["wer"]["value"])
    assert rates == sorted(set(rates)), rates
    assert rates[0] < 0.1
    assert rates[-1] > 0.9
