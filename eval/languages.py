"""Languages by ISO code, and whether errors of speech are counted in characters or in words.

    language_code("Mandarin"), language_code("zh-Hant")   # "zh", "zh"
    LANGUAGES["yue"].unit                                  # "character"

The model was trained on seven languages. Others are scored, too, because TalkVid-Bench and users have them; `trained` tells
them apart. Names are compared as a whole: a search for parts finds "es" in "Chinese".
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Literal

from magihuman.errors import UserError

Unit = Literal["character", "word"]


@dataclass(frozen=True)
class Language:
    """A language that speech can be scored in.

    Attributes:
        code: ISO 639-1, or 639-3 where there is no code of two letters.
        names: English name first, then other names in any language.
        codes: its other codes (ISO 639-2 and 639-3).
        unit: of error rates; characters where words are not separated by spaces, and for Korean, as in the paper.
        elision: whether an apostrophe separates two words (l'été) instead of standing within one (it's).
        trained: whether it is one of the seven of the model.
    """

    code: str
    names: tuple[str, ...]
    codes: tuple[str, ...] = ()
    unit: Unit = "word"
    elision: bool = False
    trained: bool = False


_LANGUAGES = (
    Language("zh", (
        "Chinese", "Mandarin", "Mandarin Chinese", "Standard Chinese", "Standard Mandarin", "Putonghua", "Simplified Chinese",
        "Traditional Chinese", "中文", "汉语", "漢語", "普通话", "普通話", "国语", "國語", "华语", "華語", "官话", "官話",
        "简体中文", "繁體中文",
    ), ("cmn", "zho", "chi"), "character", trained=True),
    Language("yue", (
        "Cantonese", "Cantonese Chinese", "Yue Chinese", "粤语", "粵語", "广东话", "廣東話", "广州话", "廣州話", "白话",
    ), (), "character", trained=True),
    Language("ja", ("Japanese", "日本語", "にほんご", "日语", "日語"), ("jpn",), "character", trained=True),
    Language("ko", ("Korean", "한국어", "한국말", "조선말", "韩语", "韓語"), ("kor",), "character", trained=True),
    Language("en", (
        "English", "American English", "British English", "Australian English", "Indian English", "英语", "英語",
    ), ("eng",), trained=True),
    Language("de", ("German", "Deutsch", "Standard German", "Swiss German", "Austrian German", "德语", "德語"), (
        "deu", "ger",
    ), trained=True),
    Language("fr", ("French", "Français", "Canadian French", "Swiss French", "Belgian French", "法语", "法語"), (
        "fra", "fre",
    ), elision=True, trained=True),
    Language("ar", ("Arabic", "Modern Standard Arabic", "العربية", "عربي"), ("ara", "arb")),
    Language("bn", ("Bengali", "Bangla", "বাংলা"), ("ben",)),
    Language("cs", ("Czech", "Čeština"), ("ces", "cze")),
    Language("da", ("Danish", "Dansk"), ("dan",)),
    Language("el", ("Greek", "Ελληνικά"), ("ell", "gre")),
    Language("es", (
        "Spanish", "Castilian", "Español", "Castellano", "Latin American Spanish", "Mexican Spanish", "European Spanish",
    ), ("spa",)),
    Language("fa", ("Persian", "Farsi", "فارسی"), ("fas", "per")),
    Language("fi", ("Finnish", "Suomi"), ("fin",)),
    Language("he", ("Hebrew", "עברית"), ("heb",)),
    Language("hi", ("Hindi", "हिन्दी", "हिंदी"), ("hin",)),
    Language("hu", ("Hungarian", "Magyar"), ("hun",)),
    Language("id", ("Indonesian", "Bahasa Indonesia"), ("ind",)),
    Language("it", ("Italian", "Italiano"), ("ita",), elision=True),
    Language("ms", ("Malay", "Bahasa Melayu"), ("msa", "may", "zsm")),
    Language("nl", ("Dutch", "Nederlands", "Flemish"), ("nld", "dut")),
    Language("no", ("Norwegian", "Norsk", "Bokmål"), ("nor", "nb", "nob", "nn", "nno")),
    Language("pl", ("Polish", "Polski"), ("pol",)),
    Language("pt", ("Portuguese", "Português", "Brazilian Portuguese", "European Portuguese"), ("por",)),
    Language("ro", ("Romanian", "Română"), ("ron", "rum")),
    Language("ru", ("Russian", "Русский"), ("rus",)),
    Language("sv", ("Swedish", "Svenska"), ("swe",)),
    Language("th", ("Thai", "ไทย", "ภาษาไทย"), ("tha",), "character"),
    Language("tr", ("Turkish", "Türkçe"), ("tur",)),
    Language("uk", ("Ukrainian", "Українська"), ("ukr",)),
    Language("ur", ("Urdu", "اردو"), ("urd",)),
    Language("vi", ("Vietnamese", "Tiếng Việt"), ("vie",)),
)  # fmt: skip

LANGUAGES: dict[str, Language] = {language.code: language for language in _LANGUAGES}
"""All languages by code, the seven of the model first."""

# What may follow the language in a tag of BCP 47 or POSIX: zh-Hant-TW, en_US.UTF-8, es-419, de_DE@euro.
_SUBTAGS = re.compile(r"([a-z]{2,3})((?:[-_](?:[a-z]{3,4}|[a-z]{2}|\d{3}))*)(?:[.@][\w.@-]+)?")
_QUALIFIED = re.compile(r"([^()（）]+?)\s*[(（]\s*([^()（）]+?)\s*[)）]")


def _key(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@cache
def _names() -> dict[str, str]:
    return {_key(name): language.code for language in _LANGUAGES for name in language.names}


@cache
def _codes() -> dict[str, str]:
    return {code: language.code for language in _LANGUAGES for code in (language.code, *language.codes)}


def language_code(text: str) -> str:
    """Code of a language that is given by code ("zh", "cmn"), locale ("zh-Hant", "en_US"), or name ("Cantonese", "粤语").

    Of a name with a qualifier, the qualifier decides where it names a language: "Chinese (Cantonese)" is "yue", and
    "English (US)" is "en". A locale's country does not: "zh-HK" is written Chinese, "zh".

    Raises:
        UserError: not known; names what is.
    """
    key = _key(text)
    if (code := _names().get(key)) is not None:
        return code
    if qualified := _QUALIFIED.fullmatch(key):
        whole, part = (_names().get(name) for name in qualified.groups())
        if whole is not None:
            return part or whole
    if tag := _SUBTAGS.fullmatch(key):
        # An extended subtag is the language itself: zh-yue.
        extended = [
            _codes()[subtag] for subtag in re.split(r"[-_]", tag[2])[1:2] if len(subtag) == 3 and subtag in _codes()
        ]
        code = _codes().get(tag[1])
        if code is not None:
            return extended[0] if extended and code == "zh" else code
    trained = ", ".join(f"{language.code} ({language.names[0]})" for language in _LANGUAGES if language.trained)
    others = ", ".join(language.code for language in _LANGUAGES if not language.trained)
    raise UserError(
        f"language {text!r} is not known; write one of {trained}, or of {others}, or its name; leave it out to go by the "
        "script of the spoken text"
    )
