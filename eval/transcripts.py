"""Errors of a transcript against the words that were asked for: normalisation, unit, error rates.

    scored = compare("你 好 世 界", "你好世界", "Chinese")
    scored.rate, scored.edits.reference, scored.unit_note    # 0.0, 4, "character, as zh"

The unit, and all rules, follow from the reference and its declared language alone, never from the transcript:

    zh, yue, ja   characters; NFKC, lower case, no white space, no punctuation or symbols
    ko            syllable blocks; NFC, else the same
    en, de, fr    words; NFKC, case folded; an apostrophe within a word is removed (it's = its) and in French separates
                  (l'été = l été); all other punctuation and symbols separate
    others        as en and de; Thai in characters; Italian as French

Voice marks of kana and the long mark stay; traditional and simplified characters differ; numbers stay as they are written.
"""

import re
import unicodedata
from dataclasses import dataclass

from eval.edits import Edits, edits
from eval.languages import LANGUAGES, Unit, language_code

# Letters of scripts without spaces between words, and hangul: Han, kana with their marks, hangul, Thai.
_HAN = (
    r"\u2e80-\u2fdf\u3005\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
)
_KANA = r"\u3041-\u3096\u3099\u309a\u309d\u309e\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_HANGUL = r"\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7a3\ud7b0-\ud7fb"
_THAI = r"\u0e01-\u0e5b"
_SCRIPTS = {
    name: re.compile(f"[{letters}]")
    for name, letters in {"hangul": _HANGUL, "kana": _KANA, "Han": _HAN, "Thai": _THAI}.items()
}
_MIXED = re.compile(rf"[{_HAN}{_KANA}{_HANGUL}{_THAI}]|[^\s{_HAN}{_KANA}{_HANGUL}{_THAI}]+")
# Before NFKC, which makes a space and an accent of U+00B4 and leaves the others.
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u201b\u02bc\u00b4\u0060\uff07", "'"))


@dataclass(frozen=True)
class Rules:
    """How a text is cut into units.

    Attributes:
        code: language, "" where it was not declared and its script has several.
        note: unit, and whether the language was declared or the script decided, for the row of results.
    """

    code: str
    unit: Unit
    note: str


@dataclass(frozen=True)
class TranscriptErrors:
    """A transcript compared with its reference.

    Attributes:
        edits: in the unit of the reference's language: the headline.
        mixed: with Han, kana, hangul and Thai as characters and everything else as words.
        korean_words: in words between spaces; None of other languages.
        unit_note: see `Rules.note`.
    """

    edits: Edits
    mixed: Edits
    korean_words: Edits | None
    unit_note: str

    @property
    def rate(self) -> float | None:
        """(S + D + I) / units of the reference, which may be above 1; None of a reference without units."""
        return error_rate(self.edits)


def error_rate(found: Edits) -> float | None:
    """(S + D + I) / units of the reference; None of a reference without units."""
    return found.errors / found.reference if found.reference else None


def rules_for(reference: str, language: str | None) -> Rules:
    """Rules for a reference: by its declared language, else by its script.

    Args:
        language: as `eval.languages.language_code` takes it; None or "": not declared.

    Raises:
        UserError: the language is not known.
    """
    script = _script(reference)
    if language:
        code = language_code(language)
        known = LANGUAGES[code]
        note = f"{known.unit}, as {code}"
        if known.unit == "word" and script != "other":
            note += f", though the text is in {script}"
        elif known.unit == "character" and script == "other" and normalise(reference, code):
            note += ", though the text has none of its characters"
        return Rules(code, known.unit, note if known.trained else f"{note}, not one of the seven trained languages")
    code = {"hangul": "ko", "kana": "ja", "Thai": "th"}.get(script, "")
    if script == "other":
        return Rules("", "word", "word, by rules of no language since none is declared")
    either = "; Mandarin and Cantonese look alike, and both are counted so" if script == "Han" else ""
    return Rules(code, "character", f"character, by the script {script} since no language is declared{either}")


def _script(text: str) -> str:
    """The script without spaces that has at least half of the text, each letter against a word of another script.

    Any kana make Han characters Japanese. "other" where it is none of these.
    """
    parts = _MIXED.findall(normalise(text, ""))
    counts = {name: sum(bool(pattern.match(part)) for part in parts) for name, pattern in _SCRIPTS.items()}
    if not parts or 2 * sum(counts.values()) < len(parts):
        return "other"
    if counts["kana"] and counts["hangul"] <= counts["kana"] + counts["Han"]:
        return "kana"
    return max(counts, key=lambda name: counts[name])


def normalise(text: str, code: str) -> str:
    """A text as it is compared: words with one space between them, by the rules of a language (see above).

    Args:
        code: of `eval.languages.LANGUAGES`; "": language-neutral, as en.
    """
    language = LANGUAGES.get(code)
    text = unicodedata.normalize("NFC" if code == "ko" else "NFKC", text.translate(_APOSTROPHES))
    text = text.lower() if language is not None and language.unit == "character" else text.casefold()
    # Invisible characters (soft hyphen, zero width) are not spoken; folding makes two characters of the Turkish İ.
    text = "".join(c for c in text if unicodedata.category(c) != "Cf").replace("i\u0307", "i")
    text = re.sub(r"(?<=\w)'(?=\w)", " " if language is not None and language.elision else "", text)
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PSZC" else c for c in text).split())


def units(text: str, rules: Rules) -> tuple[str, ...]:
    """Characters or words of a text by the rules of its reference."""
    words = normalise(text, rules.code)
    return tuple(words.replace(" ", "")) if rules.unit == "character" else tuple(words.split())


def compare(reference: str, transcript: str, language: str | None = None) -> TranscriptErrors:
    """Errors of a transcript.

    Args:
        reference: spoken words that were asked for; transcript: what was understood.
        language: of the reference, None where not declared.

    Raises:
        UserError: the language is not known.
    """
    rules = rules_for(reference, language)

    def words(text: str) -> list[str]:
        return normalise(text, rules.code).split()

    def mixed(text: str) -> list[str]:
        return _MIXED.findall(normalise(text, rules.code))

    return TranscriptErrors(
        edits=edits(units(reference, rules), units(transcript, rules)),
        mixed=edits(mixed(reference), mixed(transcript)),
        korean_words=edits(words(reference), words(transcript)) if rules.code == "ko" else None,
        unit_note=rules.note,
    )
