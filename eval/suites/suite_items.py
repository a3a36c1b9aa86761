"""Items of a suite, the settings with which it is read, and the prompts that are made of its texts.

prompt_of("A man sits.", "Hello there.", "Man", "en", "rain", template="blocks")
"""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.languages import LANGUAGES, language_code
from magihuman.cli import option
from magihuman.errors import UserError

BLOCKS, DESCRIPTION = "blocks", "description"
TEMPLATES = (BLOCKS, DESCRIPTION)
SETTINGS, MANIFEST = "suite.json", "manifest.jsonl"
"""Files in an output folder of `eval.run`: its settings, and its clips for `eval.clip_list`."""
_QUOTES = str.maketrans(dict.fromkeys('"“”„«»「」『』', "'"))


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """Settings of reading a suite. Those that the paper leaves open are recorded in every result."""

    suite: str = option(
        "versebench, talkvid, puppets, or a file of prompts (.txt, or a .csv, .tsv, .jsonl or .json with prompt and any of "
        "name, dialogue, language, image, audio, voice, reference, seconds, seed, negative_prompt)"
    )
    checkpoint: str | None = option(
        "as of python -m magihuman.infer; suite=puppets takes the puppets of its world", None
    )
    suite_path: str | None = option("folder of the suite's local copy (versebench, talkvid)", None)
    parts: str | None = option(
        "parts of the suite, by commas: set1,set2,set3 of versebench, age,gender,ethnicity,language of talkvid; none is all",
        None,
    )
    template: str = option(
        "prompts from the suite's texts: blocks (the form that MagiHuman is trained on, with Dialogue: and Background "
        "Sound:) or description (the description alone)",
        BLOCKS,
    )
    first_frame: bool = option("the suite's picture is the first frame of the clip", True)
    transcripts: str | None = option(
        "table with name and text of the speech, for talkvid, whose records have none; without it there is no WER", None
    )
    speech_language: str = option(
        "language of spoken text in Latin letters where the suite declares none; other scripts tell theirs", "en"
    )

    def check(self) -> None:
        """Raises UserError for an unknown template or language."""
        if self.template not in TEMPLATES:
            raise UserError(f"template={self.template} is unknown; choose {' or '.join(TEMPLATES)}")
        language_code(self.speech_language)

    def chosen_parts(self, known: Sequence[str]) -> tuple[str, ...]:
        """`parts` as a tuple in the order of `known`, all of them where it is None.

        Raises:
            UserError: an unknown part.
        """
        given = [name.strip() for name in (self.parts or ",".join(known)).split(",") if name.strip()]
        if unknown := [name for name in given if name not in known]:
            raise UserError(f"parts={unknown[0]} is unknown; suite={self.suite} has {', '.join(known)}")
        return tuple(name for name in known if name in given)

    def folder(self, fetch: str) -> Path:
        """The local copy.

        Args:
            fetch: the command that makes one.

        Raises:
            UserError: not given, or no folder.
        """
        if self.suite_path is None:
            raise UserError(f"suite={self.suite} needs suite_path=FOLDER, a local copy; fetch it with: {fetch}")
        folder = Path(self.suite_path).expanduser()
        if not folder.is_dir():
            raise UserError(f"suite_path={self.suite_path} is no folder; fetch the suite with: {fetch}")
        return folder


@dataclass(frozen=True)
class SuiteItem:
    """One prompt of a suite.

    Attributes:
        name: unique in the suite; file name of its clips.
        dialogue: spoken words, "" where nobody should speak, None where unknown.
        language: of the dialogue, as an ISO code or a name, None where unknown.
        image, audio: condition the clip; voice: of the wanted speaker; reference: the true clip.
        seconds, seed, negative_prompt: of this item, None for the run's.
        group: items of one group are alike, and their clips are resampled together; "": items of one prompt are a group.
        part: of the suite, such as "set1" or "age/19-30".
    """

    name: str
    prompt: str
    dialogue: str | None = None
    language: str | None = None
    image: Path | None = None
    audio: Path | None = None
    voice: Path | None = None
    reference: Path | None = None
    seconds: float | str | None = None
    seed: int | None = None
    negative_prompt: str | None = None
    group: str = ""
    part: str = ""


@dataclass(frozen=True)
class Suite:
    """Items of a suite with what its results say of it.

    Attributes:
        facts: recorded in every result: parts, number of items as published, and the like.
        notes: what is missing or differs from the publication, for the user.
        prepare: (item, folder) -> the item with files that have to be made first, such as a reference clip, which
            are written into the folder unless they are there.
        published: keys of the rows in `eval.published` that this suite is for.
    """

    name: str
    items: tuple[SuiteItem, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    prepare: Callable[[SuiteItem, Path], SuiteItem] = lambda item, folder: item
    published: tuple[str, ...] = ()


def language_of(text: str, latin: str) -> str:
    """ISO code of spoken text by its script: ko for any hangul, ja for any kana, zh for any Chinese character, else `latin`.

    Cantonese cannot be told from Mandarin so.
    """
    scripts = {unicodedata.name(letter, "").split(" ")[0].split("-")[0] for letter in text if letter.isalpha()}
    for code, known in (("ko", {"HANGUL"}), ("ja", {"HIRAGANA", "KATAKANA"}), ("zh", {"CJK"})):
        if scripts & known:
            return code
    return latin


def prompt_of(
    description: str,
    dialogue: str | None,
    speaker: str = "",
    language: str = "en",
    sound: str | None = "",
    *,
    template: str = BLOCKS,
) -> str:
    """A prompt from a suite's texts.

    The template `blocks` (see `inference.prompting.format`): the description as one paragraph, which quotes the speech; the
    block `Dialogue:` with `<speaker, language>: "words"`; the block `Background Sound:`. East Asian characters are spaced.
    Quotation marks within the speech become apostrophes.

    Args:
        dialogue: spoken words; "" or None: no block.
        speaker: as the suite calls them; "" is "Person".
        language: ISO code or name, see `eval.languages`.
        sound: the background sound; "" says that there is none, None leaves the block out.
        template: `description` gives the description alone.

    Raises:
        UserError: an unknown language.
    """
    from inference.prompting.format import NO_SOUND, letters, spaced

    paragraph = " ".join(description.split())
    if template == DESCRIPTION:
        return paragraph
    words, who = " ".join((dialogue or "").translate(_QUOTES).split()), speaker.strip() or "Person"
    blocks = []
    if words:
        if f'"{words}"' not in paragraph:
            # Quotes of the description would be speech that the block does not have.
            paragraph = f'{paragraph.translate(_QUOTES)} {who} says, "{words}"'
        blocks.append(f'Dialogue:\n<{who}, {LANGUAGES[language_code(language)].names[0]}>: "{words}"')
    else:
        paragraph = paragraph.translate(_QUOTES)
    if sound is not None:
        blocks.append(
            f"Background Sound:\n<{' '.join(sound.split())}>" if letters(sound) else f"Background Sound:\n{NO_SOUND}"
        )
    return spaced("\n\n".join([paragraph, *blocks]))
