"""TalkVid-Bench: 500 clips of talking people by age, gender, ethnicity and language, from a local copy.

Known by its public pages (github.com/FreedomIntelligence/TalkVid, README.md; the dataset's card):

- the branch `bench` of huggingface.co/datasets/FreedomIntelligence/TalkVid holds the 500 clips; licence CC BY-NC 4.0;
- age (0-19, 19-30, 31-45, 46-60, 60+) 105, gender 100, ethnicity (Black, White, Asian) 100, language (14 and others) 195;
- a record has `id`, `width`, `height`, `fps`, `start-time`, `end-time`, `description` and `info` with `Person ID`,
  `Ethnicity`, `Age Group`, `Gender`, `Language`. It has no transcript: the reference text of a WER comes from elsewhere.

Assumed: records are lists in .json files anywhere in the folder; the clip of a record is the file ID.mp4 anywhere in it; a
folder of the clip's path that is called after a part (age, gender, ethnicity, language) says which part it is of, as
`age/19-30/ID.mp4`, and clips without such a folder count for all parts.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.languages import language_code
from eval.suites.suite_items import Suite, SuiteItem, SuiteOptions, prompt_of
from magihuman.errors import UserError
from magihuman.io.text import load_json, read_rows

FETCH = (
    "hf download FreedomIntelligence/TalkVid --repo-type dataset --revision bench --local-dir talkvid "
    "(for non-commercial use)"
)
PARTS = ("age", "gender", "ethnicity", "language")
PUBLISHED_ITEMS = 500


def read_talkvid(options: SuiteOptions) -> Suite:
    """All clips of the chosen parts that have a record, sorted by name.

    Raises:
        UserError: no copy, no clips or records in it, two clips of the same name, or a table of transcripts that cannot be
            used.
    """
    folder, chosen = options.folder(FETCH), options.chosen_parts(PARTS)
    clips: dict[str, Path] = {}
    for path in _files(folder, "*.mp4"):
        if path.stem in clips:
            raise UserError(f"suite_path={folder} has two clips called {path.name}: {clips[path.stem]} and {path}")
        clips[path.stem] = path
    records = {str(record["id"]): record for record in _records(folder)}
    both = [name for name in clips if name in records]
    if not both:
        raise UserError(
            f"suite_path={folder} has {len(clips)} .mp4 and {len(records)} records, and no record's id is a clip's name; "
            f"fetch the suite with: {FETCH}"
        )
    texts = _transcripts(options.transcripts)
    items = [_item(name, clips[name], records[name], folder, texts, options) for name in both]
    items = [item for item in items if not item.part or item.part.split("/")[0] in chosen]
    notes = []
    if len(both) < len(clips):
        notes.append(f"{len(clips) - len(both)} of {len(clips)} clips in {folder} have no record and are left out")
    if chosen == PARTS and len(items) != PUBLISHED_ITEMS:
        notes.append(f"suite_path={folder} has {len(items)} clips with records; {PUBLISHED_ITEMS} are published")
    if options.transcripts is None:
        notes.append("TalkVid-Bench has no transcripts: prompts without dialogue and no WER; give transcripts=FILE")
    elif silent := sum(item.dialogue is None for item in items):
        notes.append(f"{silent} of {len(items)} clips have no text in transcripts={options.transcripts}")
    return Suite(
        "talkvid",
        tuple(items),
        facts={
            "parts": list(chosen),
            "published_items": PUBLISHED_ITEMS,
            "source": "FreedomIntelligence/TalkVid, bench",
        },
        notes=tuple(notes),
        prepare=_with_first_frame if options.first_frame else lambda item, folder: item,
        published=("word_error_rate",),
    )


def _files(folder: Path, pattern: str) -> list[Path]:
    """Files below a folder, without those that macOS adds, whose names begin with a dot."""
    return sorted(path for path in folder.rglob(pattern) if not path.name.startswith("."))


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    for path in _files(folder, "*.json"):
        try:
            content = load_json(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); fetch the suite with: {FETCH}") from error
        for record in content if isinstance(content, list) else [content]:
            if isinstance(record, dict) and "id" in record and isinstance(record.get("info"), dict):
                yield record


def _transcripts(file: str | None) -> dict[str, str]:
    if file is None:
        return {}
    texts = {}
    for row in read_rows(
        file, f"transcripts={file}", (("name", "id", "clip"), ("text", "transcript")), ("name", "text")
    ):
        try:
            if row.problem:
                raise ValueError(row.problem)
            name, text = row.text(("name", "id", "clip")), row.text(("text", "transcript"))
        except ValueError as error:
            raise UserError(f"transcripts={file} {row.where} {error}") from error
        texts[Path(name).stem if name.endswith(".mp4") else name] = text
    return texts


def _item(
    name: str, clip: Path, record: dict[str, Any], folder: Path, texts: dict[str, str], options: SuiteOptions
) -> SuiteItem:
    description, info = record.get("description"), record["info"]
    if not (isinstance(description, str) and description.strip()):
        raise UserError(f"the record {name} in {folder} has no description; fetch the suite with: {FETCH}")
    text = texts.get(name)
    try:
        language = language_code(str(info.get("Language", "")))
    except UserError:  # the group of all other languages
        language = None
    above = clip.relative_to(folder).parts[:-1]
    at = next((index for index, part in enumerate(above) if part.lower() in PARTS), None)
    speaker = {"male": "Man", "female": "Woman"}.get(str(info.get("Gender", "")).lower(), "Person")
    # Without the words, a block of sound alone would ask for nobody to speak.
    sound = None if text is None else ""
    return SuiteItem(
        name=name,
        prompt=prompt_of(
            description, text, speaker, language or options.speech_language, sound, template=options.template
        ),
        dialogue=text,
        language=language,
        reference=clip,
        part="" if at is None else "/".join([above[at].lower(), *above[at + 1 :]]),
    )


def _with_first_frame(item: SuiteItem, folder: Path) -> SuiteItem:
    """The item with the first frame of its clip as a picture, NAME.png in the folder."""
    path = folder / f"{item.name}.png"
    if not path.is_file():
        from PIL import Image

        from magihuman.io.files import atomic_path
        from magihuman.media.reading import read_clip

        assert item.reference is not None
        frame = read_clip(item.reference, fps=1000.0, frames=1).frames[0].numpy()
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as new:
            Image.fromarray(frame).save(new, format="png")
    return replace(item, image=path)
