"""seconds=auto: what is said, and how long it takes in its language."""

import pytest

from inference.prompting.format import seconds_for, speaking_seconds, spoken_text


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("A man walks.", ""),
        ('He says "hello there" and "bye".', "hello there\nbye"),
        ("Dialogue: <Woman, English>: Good morning. Background Sound: birds", "Good morning."),
        ('A "sign".\nDialogue:\nAnna (softly): "Yes."\nBen: "No."\nBackground Sound: rain', "Yes.\nNo."),
        ("dialogue:\nAnna: Yes, please\nBen: No", "Yes, please\n No"),
        ("她说：「你好」", "你好"),
        ("Er sagt „Guten Tag“.", "Guten Tag"),
        ("Dialogue: Background Sound: wind", ""),
    ],
)
def test_what_is_said(prompt: str, said: str) -> None:
    assert spoken_text(prompt) == said


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("ma bi so", 3 / 4.5),
        ("Good morning", 3 / 4.5),
        ("Здравствуйте", 3 / 4.5),
        ("你好吗", 3 / 4.5),
        ("こんにちは", 5 / 7),
        ("きょう", 2 / 7),  # the small kana belongs to the mora before it
        ("안녕하세요", 5 / 5),
        ("مرحبا", 5 / 11),
        ("42", 2 / 3),
        ("Yes. No!", 2 / 4.5 + 0.4),
        ("Yes, no", 2 / 4.5 + 0.2),
        ("Wait... go", 2 / 4.5 + 0.4),
        ("¿Qué tal?", 2 / 4.5),
    ],
)
def test_how_long_it_takes(text: str, seconds: float) -> None:
    assert speaking_seconds(text) == pytest.approx(seconds)


def test_whole_seconds() -> None:
    assert seconds_for("a street in rain") is None
    assert seconds_for('"Hi"') == 2
    assert seconds_for('"' + "la " * 27 + '"') == 7  # 6 s of speech, half a second around it on each side
