"""Verse-Bench: 600 image-text pairs in three sets, from a local copy of huggingface.co/datasets/dorni/Verse-Bench.

Known by its public code (github.com/Dorniwang/Verse-Bench, calculate_metrics.py; Dorniwang/UniVerse-1-code, assets/prompts and
sample_universe.py):

- folders set1, set2, set3; in each, NAME.json with NAME.jpg; in set2 also NAME.wav, the sound that distances of
  distributions compare with;
- NAME.json: `video_prompt` (text), `audio_prompt` (list of texts, of which "", "none" and "no ambient ..." mean nothing),
  `speech_prompt` with `speaker` and `text` ("" where nobody speaks);
- clips are matched by NAME alone, so names are unique over the sets;
- its own scores are others than the paper's: no VideoScore2.

Assumed: other endings of pictures (.jpeg, .png, .webp) count, too; a clip NAME.mp4 is the reference where there is one, else
NAME.wav; the language is not declared and follows from the script of the text (`speech_language` for Latin letters).
"""

from pathlib import Path
from typing import Any

from eval.suites.suite_items import Suite, SuiteItem, SuiteOptions, language_of, prompt_of
from magihuman.errors import UserError
from magihuman.io.text import load_json

FETCH = "hf download dorni/Verse-Bench --repo-type dataset --local-dir verse_bench"
PARTS = ("set1", "set2", "set3")
PUBLISHED_ITEMS = 600
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
REFERENCES = (".mp4", ".wav")


def read_versebench(options: SuiteOptions) -> Suite:
    """All chosen sets, sorted by name within each.

    Raises:
        UserError: no copy, another layout, a record that cannot be read, or two of the same name.
    """
    folder, chosen = options.folder(FETCH), options.chosen_parts(PARTS)
    items, notes = [], []
    for part in chosen:
        records = sorted(path for path in (folder / part).glob("*.json") if not path.name.startswith("."))
        if not records:
            raise UserError(f"suite_path={folder} has no {part}/*.json; fetch the suite with: {FETCH}")
        items += [_item(path, part, options) for path in records]
    seen: dict[str, str] = {}
    for item in items:
        if item.name in seen:
            raise UserError(
                f"suite_path={folder} has {item.name}.json in {seen[item.name]} and in {item.part}; remove one"
            )
        seen[item.name] = item.part
    if chosen == PARTS and len(items) != PUBLISHED_ITEMS:
        notes.append(f"suite_path={folder} has {len(items)} image-text pairs; {PUBLISHED_ITEMS} are published")
    if options.first_frame and (bare := sum(item.image is None for item in items)):
        notes.append(
            f"{bare} of {len(items)} items of Verse-Bench have no picture here, so their clips get no first frame"
        )
    return Suite(
        "versebench",
        tuple(items),
        facts={"parts": list(chosen), "published_items": PUBLISHED_ITEMS, "source": "dorni/Verse-Bench"},
        notes=tuple(notes),
        published=("visual_quality", "text_alignment", "physical_consistency"),
    )


def _item(path: Path, part: str, options: SuiteOptions) -> SuiteItem:
    try:
        record = load_json(path)
        description, speech = record["video_prompt"], record["speech_prompt"]
        speaker, text = _text(speech, "speaker"), _text(speech, "text")
        sounds = record["audio_prompt"]
        sounds = [sounds] if isinstance(sounds, str) else sounds
        if not (isinstance(description, str) and description.strip()):
            raise ValueError("video_prompt is no text")
        if not (isinstance(sounds, list) and all(isinstance(sound, str) for sound in sounds)):
            raise ValueError("audio_prompt is no list of texts")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is no record of Verse-Bench ({what}); fetch the suite with: {FETCH}") from error
    language = language_of(text, options.speech_language)
    sound = ", ".join(sound.strip() for sound in sounds if sound.strip() and not _no_sound(sound))
    image = _beside(path, PICTURES)
    return SuiteItem(
        name=path.stem,
        prompt=prompt_of(description, text, speaker, language, sound, template=options.template),
        dialogue=text.strip(),
        language=language if text.strip() else None,
        image=image if options.first_frame else None,
        reference=_beside(path, REFERENCES),
        part=part,
    )


def _text(values: Any, key: str) -> str:
    found = values.get(key) or ""
    if not isinstance(found, str):
        raise ValueError(f"speech_prompt.{key} is no text")
    return found


def _no_sound(text: str) -> bool:
    """As the authors' sampler reads audio prompts."""
    return text.strip().lower() in ("none", "<none>", "none.") or "no ambient" in text.lower()


def _beside(path: Path, suffixes: tuple[str, ...]) -> Path | None:
    return next((file for suffix in suffixes if (file := path.with_suffix(suffix)).is_file()), None)
