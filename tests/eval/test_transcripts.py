"""Error rates of transcripts: the traps of ../shared/research/eval.md by name, each with its true value."""

import random

import pytest

from eval.edits import edits
from eval.languages import LANGUAGES
from eval.transcripts import compare, normalise, rules_for, units
from magihuman.errors import UserError


def rate(reference: str, transcript: str, language: str | None = None) -> float | None:
    return compare(reference, transcript, language).rate


@pytest.mark.parametrize("language", ["zh", "yue", "ja", "ko", "Chinese", "Mandarin", None])
def test_spaces_between_cjk_characters_do_not_count(language: str | None) -> None:
    assert rate("你 好 世 界", "你好世界", language) == 0
    assert rate("你 好", "你好", language) == 0
    assert rate("你 好 世 界", "你好世间", language) == 0.25


def test_a_language_name_is_not_searched_for_codes() -> None:
    """ "es" is a part of "Chinese"; scored as Spanish words the pair would be all wrong."""
    assert compare("你 好 世 界", "你好世界", "Chinese").edits.reference == 4
    assert rate("你 好 世 界", "你好世界", "Spanish") == 1.0


@pytest.mark.parametrize(
    ("reference", "transcript", "language"),
    [
        ("It’s “fine”", "It's fine", "en"), ("It’s “fine”", "its fine", "English"), ("It's fine.", "IT’S FINE", None),
        ("‘Fine’, she said – now!", "fine she said now", "en"), ("Der Hund’s Napf", "der hund's napf", "de"),
        ("Straße", "STRASSE", "de"), ("a well-known man", "a well known man", "en"), ("one—two", "one two", "en"),
        ("dogs' tails", "dogs tails", "en"), ("soft\u00adware", "software", "en"), ("cafe\u0301", "café", "fr"),
        ("„Guten Tag“", "guten tag", "de"), ("it´s", "it's", "en"), ("ﬁne ２", "fine 2", "en"),
    ],
)  # fmt: skip
def test_quotes_marks_and_capitals_do_not_count(reference: str, transcript: str, language: str | None) -> None:
    assert rate(reference, transcript, language) == 0


@pytest.mark.parametrize("transcript", ["l'été", "l’été", "l été", "L'ÉTÉ", "l'été."])
def test_french_apostrophe_separates(transcript: str) -> None:
    assert units("l'été", rules_for("l'été", "fr")) == ("l", "été")
    assert rate("l'été", transcript, "French") == 0
    assert rate("l’été", "l'hiver", "fr") == 0.5


def test_english_apostrophe_does_not_separate() -> None:
    assert units("It's the dog's", rules_for("", "en")) == ("its", "the", "dogs")
    assert rate("isn't it", "is not it", "en") == 1.0, "contractions are not expanded"


@pytest.mark.parametrize("transcript", ["", "x y", "你好"])
def test_empty_reference_has_no_rate(transcript: str) -> None:
    for reference in ("", " ", "…!", "\u200b"):
        found = compare(reference, transcript, "en")
        assert found.rate is None
        assert found.edits.reference == 0
    assert compare("", "x y", "en").edits.insertions == 2


def test_rates_above_one_are_not_clipped() -> None:
    assert rate("two words", "now there are six words here", "en") == 2.5
    found = compare("two words", "a b c d e f", "en").edits
    assert (found.substitutions, found.deletions, found.insertions) == (2, 0, 4)


def test_pooled_and_mean_of_clips_differ() -> None:
    """One word with five insertions, and twenty words without an error: .238 pooled, 2.5 as a mean."""
    clips = [compare("yes", "yes a b c d e", "en"), compare("w " * 20, "w " * 20, "en")]
    pooled = sum(clip.edits.errors for clip in clips) / sum(clip.edits.reference for clip in clips)
    assert pooled == pytest.approx(5 / 21)
    assert [clip.rate for clip in clips] == [5.0, 0.0]


@pytest.mark.parametrize("language", [None, "en", "zh"])
def test_the_unit_follows_from_the_reference_alone(language: str | None) -> None:
    english, chinese = "good morning to you", "早上好你们大家"
    counts = {compare(english, transcript, language).edits.reference for transcript in (english, chinese, "", "12")}
    assert counts == ({4} if language != "zh" else {16})
    notes = {compare(chinese, transcript, language).unit_note for transcript in (english, chinese, "")}
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("reference", "unit", "code", "note"),
    [
        ("你好 world", "character", "", "Han since no language is declared; Mandarin and Cantonese look alike"),
        ("東京へ行く", "character", "ja", "kana"), ("안녕하세요 hello", "character", "ko", "hangul"),
        ("สวัสดี", "character", "th", "Thai"), ("good morning", "word", "", "no language"),
        ("доброе утро", "word", "", "no language"), ("I say 你好 to all my old friends", "word", "", "no language"),
        ("", "word", "", "no language"), ("123", "word", "", "no language"),
    ],
)  # fmt: skip
def test_script_decides_where_no_language_is_declared(reference: str, unit: str, code: str, note: str) -> None:
    for undeclared in (None, ""):
        rules = rules_for(reference, undeclared)
        assert (rules.unit, rules.code) == (unit, code)
        assert note in rules.note


def test_notes_say_what_is_odd() -> None:
    assert rules_for("hello", "en").note == "word, as en"
    assert "though the text is in Han" in rules_for("你好", "en").note
    assert "has none of its characters" in rules_for("hello", "zh").note
    assert "not one of the seven" in rules_for("dzień dobry", "pl").note
    with pytest.raises(UserError, match="'Klingon' is not known"):
        compare("hello", "hello", "Klingon")


def test_mixed_error_rate_counts_latin_words_and_cjk_characters() -> None:
    found = compare("我 用 GPU 训练", "我用CPU训练", "zh")
    assert (found.edits.errors, found.edits.reference) == (1, 7)
    assert (found.mixed.errors, found.mixed.reference) == (1, 5)
    english = compare("we train on it", "we trained it", "en")
    assert english.mixed == english.edits


def test_korean_has_words_besides_syllable_blocks() -> None:
    found = compare("안녕 하세요 여러분", "안녕하세요 여러분", "ko")
    assert found.rate == 0
    assert found.korean_words is not None
    assert (found.korean_words.errors, found.korean_words.reference) == (2, 3)
    assert compare("안녕", "\u110b\u1161\u11ab\u1102\u1167\u11bc", "ko").rate == 0, "jamo are composed"
    assert compare("hello", "hello", "en").korean_words is None


def test_japanese_marks_stay_and_widths_do_not() -> None:
    assert normalise("ｶﾞｰﾄﾞ", "ja") == "ガード"
    assert rate("かき", "がき", "ja") == 0.5
    assert rate("ビル", "ビール", "ja") == 0.5
    assert rate("「行く」。", "行く", "ja") == 0


def test_scripts_are_not_folded() -> None:
    assert rate("汉语", "漢語", "zh") == 1.0
    assert rate("二十", "20", "zh") == 1.0, "numbers stay as they are written"


@pytest.mark.parametrize("code", ["zh", "ja", "ko", "en", "de", "fr", ""])
def test_normalisation_is_idempotent(code: str) -> None:
    text = "L’été “İß” 你 好ｶﾞ 안녕 don't — ½ ３．５ \u200bx\u00ady ´ ` a'b'c"
    once = normalise(text, code)
    assert normalise(once, code) == once
    assert once == " ".join(once.split())


def test_counts_agree_with_torchmetrics_and_characters_with_jiwer() -> None:
    """On normalised units; torchmetrics takes (prediction, target), jiwer (reference, hypothesis)."""
    import jiwer
    from torchmetrics.functional.text import char_error_rate, word_error_rate

    draw = random.Random(0)
    for language, letters in (("en", ["the", "cat", "sat", "on", "it's"]), ("zh", list("你好世界人"))):
        glue = " " if LANGUAGES[language].unit == "word" else ""
        pairs = [[draw.choices(letters, k=draw.randint(1, 12)) for _ in range(2)] for _ in range(40)]
        texts = [(glue.join(a), glue.join(b)) for a, b in pairs]
        found = [compare(a, b, language) for a, b in texts]
        references, recognised = ([normalise(text, language) for text in side] for side in zip(*texts, strict=True))
        measure = word_error_rate if language == "en" else char_error_rate
        pooled = sum(f.edits.errors for f in found) / sum(f.edits.reference for f in found)
        assert pooled == pytest.approx(float(measure(recognised, references)), abs=1e-6)
        for clip, a, b in zip(found, references, recognised, strict=True):
            assert clip.rate == pytest.approx(float(measure([b], [a])), abs=1e-6)
        process = jiwer.process_words if language == "en" else jiwer.process_characters
        whole = process(references, recognised)
        counted = [
            sum(getattr(f.edits, key) for f in found) for key in ("substitutions", "deletions", "insertions", "hits")
        ]
        assert counted == [whole.substitutions, whole.deletions, whole.insertions, whole.hits]


def test_swapping_the_arguments_swaps_deletions_and_insertions() -> None:
    assert (edits("abc", "a").deletions, edits("a", "abc").insertions) == (2, 2)
    assert edits("", "").errors == 0
