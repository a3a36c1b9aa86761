"""Made clips of talking faces: they speak, the mouth follows the phonemes, and faults of the speech change what they say."""

import numpy as np
import pytest

pytest.importorskip("cv2", reason="needs opencv-python-headless (extra eval)")
pytest.importorskip("espeakng_loader", reason="needs espeakng-loader (extra dev)")

from eval.talking_faces import FPS, RATE, SECONDS, SENTENCES, SIZE, TalkingFace, draw_clips, speak


@pytest.fixture(scope="module")
def face() -> TalkingFace:
    return draw_clips(1)[0]


@pytest.mark.parametrize("language", SENTENCES)
def test_every_language_is_spoken_with_phonemes(language: str) -> None:
    speech = speak(SENTENCES[language][0], language)
    assert 0.5 < len(speech.wave) / RATE < 3
    assert np.abs(speech.wave).max() > 0.1
    assert len(speech.phonemes) > 6
    assert [time for time, _ in speech.phonemes] == sorted(time for time, _ in speech.phonemes)


def test_an_unknown_voice_is_refused() -> None:
    with pytest.raises(ValueError, match="no voice tlh"):
        speak("nuqneH", "tlh")


def test_the_mouth_is_open_where_the_voice_is_loud(face: TalkingFace) -> None:
    samples = round(RATE / FPS)
    count = round(SECONDS * FPS)
    level = np.sqrt((face.wave[: count * samples].reshape(count, samples) ** 2).mean(1)) ** 0.3
    assert np.corrcoef(level, face.opening)[0, 1] > 0.4
    # Of the frames, the dark inside of the mouth shows the same.
    mouth = face.frames[:, SIZE // 2 + 12 : SIZE // 2 + 42, SIZE // 2 - 15 : SIZE // 2 + 15].mean((1, 2, 3))
    assert np.corrcoef(mouth, face.opening)[0, 1] < -0.8


def test_clips_follow_from_their_number(face: TalkingFace) -> None:
    again, other = draw_clips(1)[0], draw_clips(1, seed=1)[0]
    assert face.frames.shape == (round(SECONDS * FPS), SIZE, SIZE, 3)
    assert np.array_equal(again.wave, face.wave)
    assert np.array_equal(again.frames[:3], face.frames[:3])
    assert not np.array_equal(other.wave, face.wave)
    assert {clip.language for clip in draw_clips(7)} == set(SENTENCES)


def test_replaced_words_grow_with_the_strength(face: TalkingFace) -> None:
    words = face.sentence.split()
    counts = []
    for strength in (0.0, 0.25, 0.5, 1.0):
        said = face.spoken("words", strength).said.split()
        assert len(said) == len(words)
        counts.append(sum(a != b for a, b in zip(said, words, strict=True)))
    assert counts == [0, round(0.25 * len(words)), round(0.5 * len(words)), len(words)]


def test_another_voice_speaks_the_last_share(face: TalkingFace) -> None:
    changed = face.spoken("voice", 0.5).wave
    noise = 10 ** (-62 / 20)
    differs = np.abs(changed - face.wave) > 10 * noise
    assert not differs[: len(face.wave) // 4].any()
    assert differs[len(face.wave) // 2 :].mean() > 0.2
