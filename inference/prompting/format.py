"""The form of a prompt: where its three parts are, what is wrong with them, and how to put it right.

The form (SPEC 5 and the release's guide): one paragraph of description, in which speech is quoted where it is said; a block
`Dialogue:` with the same speech, left out when nobody speaks; a block `Background Sound:`. Chinese, Japanese and Korean
characters have a space between them. inference/README.md says what to write. A prompt may be a quoted cell of a CSV table
(in quotation marks, those inside doubled), as the release's own example is. Also: what a prompt lets people say, and how
long that takes, the rule behind seconds=auto.

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
from dataclasses import dataclass

from inference.requests import check_length
from magihuman.errors import UserError

NO_SOUND = "<No prominent background sound>"

_HEADINGS = {"Dialogue": r"dialogues?\s*:", "Background Sound": r"background\s+sounds?\s*:"}
_NOBODY = re.compile(r"[<(\[]\s*(?:no|none|nobody|silence|silent)\b[^<>()\[\]]*[>)\]]\s*\.?", re.IGNORECASE)
_SPEAKER = re.compile(r"\s*(<[^<>]*>|[^\s:：][^:：]{0,79}?)\s*[:：]\s*")
_MARKUP = re.compile(r"\*\*|__|```|^\s*#+\s|^\s*[-*•]\s+(?=<|\w)", re.MULTILINE)
_MARKS = '"“”„«»「」『』'
# Chinese characters and kana stand in one Japanese sentence.
_CJK = (
    r"[\u3005\u3007\u3041-\u3096\u309d\u309e\u30a1-\u30fa\u30fc-\u30ff\u3131-\u318e\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    r"\uac00-\ud7a3\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af]"
)
_CJK_PAIR = re.compile(rf"({_CJK})(?={_CJK})")
_SCRIPTS = {"CJK": "Chinese or Japanese", "HIRAGANA": "Chinese or Japanese", "KATAKANA": "Chinese or Japanese"}


@dataclass(frozen=True)
class Report:
    """The verdict on one prompt.

    Attributes:
        faults: what has to be put right, each with its remedy behind "; ", in the order of the text; none: the form is good.
        notes: what may be intended.
        seconds: whole seconds that the clip needs, None where nothing is said.
    """

    faults: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: int | None


def check_form(prompt: str, seconds: float | None = None) -> Report:
    """Judge the form of one prompt.

    Args:
        prompt: its text.
        seconds: the clip's length if it is fixed; a dialogue that takes longer is a fault.
    """
    faults: list[str] = []
    prompt = uncelled(prompt)
    try:
        check_length(prompt, "the prompt")
    except UserError as error:
        faults.append(str(error))
    if _MARKUP.search(prompt):
        faults.append("the prompt has markup (such as ** or # or list marks); write plain text")

    places = {name: _places(prompt, pattern) for name, pattern in _HEADINGS.items()}
    starts = sorted((start, end, name) for name, found in places.items() for start, end in found)
    ends = [*(start for start, _, _ in starts), len(prompt)][1:]
    bodies = [(name, prompt[end:until].strip()) for (_, end, name), until in zip(starts, ends, strict=False)]
    main = prompt[: starts[0][0]].strip() if starts else prompt.strip()
    faults += _heading_faults(places, main)
    faults += _main_faults(main)
    for name, body in bodies:
        faults += [*_dialogue_faults(body), *_woven_faults(body, main)] if name == "Dialogue" else _sound_faults(body)
    if _CJK_PAIR.search(unicodedata.normalize("NFC", prompt)):
        faults.append(
            "Chinese, Japanese or Korean characters stand side by side; put a space between each two (你 好), as in training"
        )

    needed = seconds_for(prompt)
    if seconds is not None and needed is not None and needed > seconds:
        faults.append(
            f"the dialogue takes about {needed} s and the clip has {seconds:g} s; shorten it or allow more seconds"
        )
    return Report(tuple(faults), tuple(_notes(prompt, main, places)), needed)


def _places(prompt: str, pattern: str) -> list[tuple[int, int]]:
    """(start, end) of every heading, bold or not; where one starts a line, those within sentences are prose."""
    at_line = [
        m.span() for m in re.finditer(rf"^[^\S\n#*_]*[#*_]*[^\S\n]*{pattern}", prompt, re.IGNORECASE | re.MULTILINE)
    ]
    return at_line or [m.span() for m in re.finditer(rf"\b{pattern}", prompt, re.IGNORECASE)]


def uncelled(prompt: str) -> str:
    """The text of a prompt that is a quoted cell of a CSV table, and of any other as it is."""
    text = prompt.strip()
    if len(text) > 1 and text[0] == text[-1] == '"' and '""' in text and not re.search(r'(?<!")"(?!")', text[1:-1]):
        return text[1:-1].replace('""', '"')
    return prompt


def spaced(text: str) -> str:
    """`text` with a space between neighbouring Chinese, Japanese or Korean characters, as the release's guide demands."""
    return _CJK_PAIR.sub(r"\1 ", unicodedata.normalize("NFC", text))


def letters(text: str) -> str:
    """Letters and digits of a text, for comparisons that spaces, marks and capitals do not matter in."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def _heading_faults(places: dict[str, list[tuple[int, int]]], main: str) -> list[str]:
    faults = []
    for name, found in places.items():
        if not found and name == "Dialogue":
            if quote := QUOTED.search(main):  # nobody speaks: there is no block
                remedy = "add a block that starts with 'Dialogue:', with <speaker, language>: \"words\""
                faults.append(f"the description quotes {_short(quote.group())} without a block 'Dialogue:'; {remedy}")
        elif not found:
            added = f"add a block that starts with '{name}:' (if there is none: '{name}: {NO_SOUND}')"
            faults.append(f"the block '{name}:' is missing; {added}")
        elif len(found) > 1:
            faults.append(f"'{name}:' stands {len(found)} times; join its blocks into one")
    if all(places.values()) and places["Dialogue"][0] > places["Background Sound"][0]:
        faults.append("'Background Sound:' stands before 'Dialogue:'; put 'Dialogue:' first and the sound last")
    return faults


def _main_faults(main: str) -> list[str]:
    if not re.search(r"\w", main):
        return ["no description stands before the blocks; start with a paragraph that says what is seen"]
    if re.search(r"\n\s*\n", main):
        return ["the description has several paragraphs; make it one, without introduction or headings"]
    return []


def _sound_faults(body: str) -> list[str]:
    if not re.search(r"\w", body):
        return [f"'Background Sound:' is empty; name the sounds other than the voices, or {NO_SOUND}"]
    if re.search(r"\n\s*\n", body):
        return ["text follows the block 'Background Sound:'; end there, descriptions belong to the start"]
    return []


def _dialogue_faults(body: str) -> list[str]:
    if _NOBODY.fullmatch(body):
        return []
    if not re.search(r"\w", body):
        return [
            "'Dialogue:' is empty; write a line such as <Woman, English>: \"Good morning.\", or leave the block out"
        ]
    # A speaker alone on a line speaks the next one.
    joined = re.sub(rf"([:：])[^\S\n]*\n\s*(?=[{_MARKS}])", r"\1 ", body)
    return [fault for line in joined.splitlines() if line.strip() for fault in _line_faults(line)]


def _woven_faults(body: str, main: str) -> list[str]:
    """Speech of the block that the description does not quote."""
    known = letters(main)
    return [
        f"the words {_short(quote.group())} are not in the description; quote them there too, where they are said"
        for quote in QUOTED.finditer(body)
        if known and letters(quote.group()) not in known
    ]


def _line_faults(line: str) -> list[str]:
    """Faults of one line of dialogue: `speaker: "words"`, once or several times."""
    faults, position, spoken = [], 0, False
    for quote in QUOTED.finditer(line):
        before = line[position : quote.start()]
        speaker = _SPEAKER.fullmatch(before)
        if not spoken and not speaker:
            if re.search(r"\w", before):
                faults.append(_unquoted(before))
            else:
                said = _short(quote.group())
                faults.append(f"{said} has no speaker; write who says it before it: <Woman, English>: {said}")
        if not re.search(r"\w", quote.group()):
            faults.append(_without_line(speaker.group(1) if speaker else "a speaker"))
        position, spoken = quote.end(), True
    rest = line[position:]
    speaker = _SPEAKER.match(rest)
    words = rest[speaker.end() :] if speaker else rest
    if any(mark in rest for mark in _MARKS) and re.search(r"\w", words):
        remedy = "put each speech on one line, between two marks"
        faults.append(f"a quotation mark in {_short(line)} has no partner; {remedy}")
    elif speaker and not re.search(r"\w", words):
        faults.append(_without_line(speaker.group(1)))
    elif re.fullmatch(r"\s*<[^<>]*>\s*", rest):
        faults.append(_without_line(rest.strip()))
    elif re.search(r"\w", words) and (speaker or not spoken):
        faults.append(_unquoted(words))
    return faults


def _without_line(speaker: str) -> str:
    remedy = 'write the words after the colon as "...", or take the speaker out'
    return f"the speaker {_short(speaker)} has no line; {remedy}"


def _unquoted(words: str) -> str:
    remedy = 'put spoken words in "..." after the speaker and a colon'
    return f"speech without quotation marks: {_short(words)}; {remedy}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:39].rstrip() + "…"


def _notes(prompt: str, main: str, places: dict[str, list[tuple[int, int]]]) -> list[str]:
    notes = []
    said = spoken_text(prompt)
    scripts = _scripts(said)
    if len(scripts) > 1:
        notes.append(f"the dialogue mixes languages ({', '.join(scripts)}); one per clip is spoken best")
    elif len(tongues := _languages_named(prompt)) > 1:
        notes.append(f"the speakers have several languages ({', '.join(tongues)}); one per clip is spoken best")
    if places["Dialogue"] and not re.search(r"\w", said) and QUOTED.search(main):
        notes.append("the description quotes words that 'Dialogue:' does not have; only those there are timed")
    return notes


def _scripts(text: str) -> list[str]:
    """Scripts of which `text` has at least two letters."""
    counts: dict[str, int] = {}
    for letter in text:
        if letter.isalpha():
            first = unicodedata.name(letter, "OTHER").split()[0]
            name = _SCRIPTS.get(first, first.capitalize())
            counts[name] = counts.get(name, 0) + 1
    return [name for name, count in counts.items() if count > 1]


def _languages_named(prompt: str) -> list[str]:
    """What stands after the last comma of each <speaker, language> before a colon, without repeats."""
    found = re.findall(r"<[^<>]*,\s*([^<>,]+?)\s*>\s*[:：]", prompt)
    return list(dict.fromkeys(name.capitalize() for name in found))


_BLOCK = re.compile(r"\bdialogues?\s*:(.*?)(?=\bbackground\s+sounds?\s*:|\Z)", re.IGNORECASE | re.DOTALL)
QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|「([^」]+)」|『([^』]+)』')
_TAG = re.compile(r"<[^<>\n]*>\s*:?|\[[^\[\]\n]*\]\s*:?|\([^()\n]*\)\s*:?")
_SPEAKER_PREFIX = re.compile(r"^[^\S\n]*[^:：\n]{1,40}[:：]", re.MULTILINE)
_VOWELS = re.compile("[aeiouyœæøıаеёиоуыэюяєіїαεηιουω]+")
_SENTENCE, _CLAUSE = ".!?…。！？؟।", ",;:–—，、；：،"

_AROUND = 1.0
_PAUSES = {_SENTENCE: 0.4, _CLAUSE: 0.2}
_SYLLABLES, _HAN, _KANA, _HANGUL, _LETTERS, _DIGITS = 4.5, 4.5, 7.0, 5.0, 11.0, 3.0


def spoken_text(prompt: str) -> str:
    """The words that are to be said; empty where the prompt does not mark any."""
    prompt = uncelled(prompt)
    blocks = _BLOCK.findall(prompt)
    text = "\n".join(blocks) if blocks else prompt
    quoted = [next(filter(None, groups)) for groups in QUOTED.findall(text)]
    if quoted:
        return "\n".join(quoted).strip()
    # In a block without quotation marks, who speaks and how stands before a colon or in brackets.
    return _SPEAKER_PREFIX.sub("", _TAG.sub("", text)).strip() if blocks else ""


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
