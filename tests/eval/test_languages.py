import pytest

from eval.languages import LANGUAGES, language_code
from magihuman.errors import UserError

KNOWN = {
    "zh": (
        "zh", "ZH", "Chinese", "chinese", "Mandarin", "Mandarin Chinese", "zh-Hant", "zh_CN", "zh-Hans-CN", "zh_TW.UTF-8",
        "cmn", "cmn-Hans-CN", "zho", "中文", "普通话", "國語", "zh-HK", " Chinese ", "Chinese (Simplified)",
    ),
    "yue": ("yue", "Cantonese", "粤语", "粵語", "廣東話", "zh-yue", "yue-Hant-HK", "Chinese (Cantonese)", "中文（粤语）"),
    "ja": ("ja", "jpn", "Japanese", "日本語", "ja_JP"),
    "ko": ("ko", "kor", "Korean", "한국어", "ko-KR"),
    "en": ("en", "English", "en_US", "en-GB", "eng", "British English", "English (US)", "English (de)"),
    "de": ("de", "German", "Deutsch", "DEUTSCH", "ger", "de_DE@euro", "de-AT"),
    "fr": ("fr", "French", "français", "Franc\u0327ais", "fr-CA"),
    "es": ("es", "Spanish", "es-419"),
    "pt": ("pt-BR", "Portuguese (Brazil)"),
    "th": ("th", "Thai"),
    "ar": ("Arabic", "ar-EG"),
}  # fmt: skip


@pytest.mark.parametrize(("code", "text"), [(code, text) for code, texts in KNOWN.items() for text in texts])
def test_codes_locales_and_names(code: str, text: str) -> None:
    assert language_code(text) == code


@pytest.mark.parametrize(
    "text", ["", "Klingon", "Chin", "Chinese food", "Englisch", "es in Chinese", "xx", "en us", "zh--CN"]
)
def test_nothing_is_found_by_a_part_of_it(text: str) -> None:
    with pytest.raises(UserError, match=r"zh \(Chinese\), yue .*fr \(French\).* or its name; leave it out") as error:
        language_code(text)
    assert repr(text) in str(error.value)


def test_the_seven_of_the_model_and_their_units() -> None:
    assert {code: language.unit for code, language in LANGUAGES.items() if language.trained} == {
        "zh": "character", "yue": "character", "ja": "character", "ko": "character",
        "en": "word", "de": "word", "fr": "word",
    }  # fmt: skip
    assert LANGUAGES["th"].unit == "character"
    assert LANGUAGES["pl"].unit == "word"


def test_every_name_and_code_is_of_one_language() -> None:
    names = [
        name.casefold() for language in LANGUAGES.values() for name in (*language.names, *language.codes, language.code)
    ]
    assert len(names) == len(set(names))
