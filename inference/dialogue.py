"""What a prompt lets people say, and how long that takes: the rule behind seconds=auto.

The spoken text is what stands in the `Dialogue:` block (up to `Background Sound:`), there within quotation
marks if it has any; without such a block, all text in quotation marks. Its length is counted in the unit of
each script and divided by an unhurried speaking rate; pauses and a moment before and after are added:

    script                                unit                        per second
    Latin, Greek, Cyrillic                syllables (vowel groups)    4.5
    Chinese characters                    characters                  4.5
    kana                                  morae                       7
    Hangul                                blocks                      5
    all others (Arabic, Thai, Hindi ...)  letters                     11
    digits                                digits                      3

    end of a sentence 0.4 s, comma and the like 0.2 s, before and after all 0.5 s each

Rates are about two thirds of those of read-aloud texts (Pellegrino et al. 2011: 5.2 to 7.8 syllables a second),
because actors pause within phrases.
"""

import math
import re
import unicodedata

_BLOCK = re.compile(r"\bdialogues?\s*:(.*?)(?=\bbackground\s+sounds?\s*:|\Z)", re.IGNORECASE | re.DOTALL)
QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|「([^」]+)」|『([^』]+)』')
_TAG = re.compile(r"<[^<>\n]*>\s*:?|\[[^\[\]\n]*\]\s*:?|\([^()\n]*\)\s*:?")
_SPEAKER = re.compile(r"^[^\S\n]*[^:：\n]{1,40}[:：]", re.MULTILINE)
_VOWELS = re.compile("[aeiouyœæøıаеёиоуыэюяєіїαεηιουω]+")
_SENTENCE, _CLAUSE = ".!?…。！？؟।", ",;:–—，、；：،"

_AROUND = 1.0
_PAUSES = {_SENTENCE: 0.4, _CLAUSE: 0.2}
_SYLLABLES, _HAN, _KANA, _HANGUL, _LETTERS, _DIGITS = 4.5, 4.5, 7.0, 5.0, 11.0, 3.0


def spoken_text(prompt: str) -> str:
    """The words that are to be said; empty where the prompt does not mark any."""
    blocks = _BLOCK.findall(prompt)
    text = "\n".join(blocks) if blocks else prompt
    quoted = [next(filter(None, groups)) for groups in QUOTED.findall(text)]
    if quoted:
        return "\n".join(quoted).strip()
    # In a block without quotation marks, who speaks and how stands before a colon or in brackets.
    return _SPEAKER.sub("", _TAG.sub("", text)).strip() if blocks else ""


def speaking_seconds(text: str) -> float:
    """How long `text` takes to say, by the table above, without the moments before and after it."""
    total = sum(speech for word in re.findall(r"\w+", text.lower()) for speech in _word(word))
    for marks, pause in _PAUSES.items():
        # A row of marks is one pause, and the last needs none: silence follows.
        total += pause * len(re.findall(f"[{re.escape(marks)}]+(?=.*\\w)", text, re.DOTALL))
    return total


def seconds_for(prompt: str) -> int | None:
    """Whole seconds that a clip of this prompt needs, at least 2; None where nothing is said."""
    text = spoken_text(prompt)
    if not re.search(r"\w", text):
        return None
    return max(2, math.ceil(round(speaking_seconds(text) + _AROUND, 6)))


def _word(word: str) -> list[float]:
    """Seconds of each script's part of a word."""
    times, alphabetic = [], ""
    for letter in word:
        name = unicodedata.name(letter, "")
        if name.startswith("CJK"):
            times.append(1 / _HAN)
        elif name.startswith(("HIRAGANA", "KATAKANA")):
            times.append(0 if " SMALL Y" in name else 1 / _KANA)
        elif name.startswith("HANGUL"):
            times.append(1 / _HANGUL)
        elif letter.isdecimal():
            times.append(1 / _DIGITS)
        elif name.startswith(("LATIN", "GREEK", "CYRILLIC", "COMBINING")):
            alphabetic += letter
        elif unicodedata.category(letter).startswith("L"):
            times.append(1 / _LETTERS)
    if alphabetic:
        plain = "".join(c for c in unicodedata.normalize("NFD", alphabetic) if not unicodedata.combining(c))
        times.append(max(1, len(_VOWELS.findall(plain))) / _SYLLABLES)
    return times
