"""Lists of clips to score: a folder of media files, or a manifest, with prompts and references.

    clips = read_clips(Path("clips"), reference=Path("real"))

In a folder every media file is a clip, with its prompt from NAME.json (the record of `python -m magihuman.infer`) or NAME.txt
next to it; of an output folder of `eval.run`, which has references and codec bounds, too, the clips of its manifest. Names that
begin with a dot are skipped: macOS writes a `._NAME.mp4` for each NAME.mp4 on a disk of another system. A manifest is a table
(.csv, .tsv, .jsonl, .json) with the column `clip` and any of `COLUMNS`; its paths are relative to the file.
"""

import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from eval.clip_file import ClipFile
from eval.languages import language_code
from eval.suites.suite_items import MANIFEST, SETTINGS
from magihuman.errors import UserError

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
COLUMNS = ("clip", "name", "prompt", "dialogue", "language", "group", "reference", "voice", "image", "part")
"""Columns of a manifest that are used."""
NEAR = 0.65
"""Similarity from which on an unknown column is taken for a misspelt one (difflib): lang and language have 0.67."""
_TAG = re.compile(r"<[^<>\n]*,\s*([^<>,\n]+?)\s*>\s*[:：]")


def read_clips(source: Path, reference: Path | None = None) -> list[ClipFile]:
    """Clips of a folder or manifest, sorted by name.

    Args:
        source: folder (its subfolders, too) or manifest. Of a folder with `SETTINGS`, made by `eval.run`, the `MANIFEST` in it.
        reference: folder or manifest of true clips, matched by name; a manifest's own column `reference` goes first.

    Raises:
        UserError: nothing there, no clips, two of the same name, or a row that cannot be used.
    """
    clips = _listed(source, "clips")
    twice = _repeated([clip.name for clip in clips])
    if twice is not None:
        raise UserError(f"clips={source} has two clips called {twice!r}; give names in a manifest's column `name`")
    if reference is not None:
        found = _listed(reference, "reference")
        by_name = {clip.name: clip for clip in found}
        for clip in clips:
            clip.reference = clip.reference or by_name.get(clip.name)
        if all(clip.reference is None for clip in clips):
            example = f"{clips[0].name!r} here, {found[0].name!r} there"
            raise UserError(f"reference={reference} has no clip of the same name as one of clips={source} ({example})")
    return sorted(clips, key=lambda clip: clip.name)


def spoken(prompt: str) -> tuple[str | None, str | None]:
    """Dialogue and language that a prompt declares in its block `Dialogue:`; None for what it does not.

    A prompt that has a block of background sound and none of dialogue asks for nobody to speak: its dialogue is "".
    """
    from inference.prompting.format import spoken_text, uncelled

    text = uncelled(prompt)
    if not re.search(r"\bdialogues?\s*:", text, re.IGNORECASE):
        silent = re.search(r"^\W*background\s+sounds?\s*:", text, re.IGNORECASE | re.MULTILINE)
        return ("" if silent else None), None
    languages = set()
    for name in _TAG.findall(text):
        try:
            languages.add(language_code(name))
        except UserError:  # who speaks may be described with commas, too
            continue
    return spoken_text(text), languages.pop() if len(languages) == 1 else None


def _repeated(names: list[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def _clip(path: Path, **known: Any) -> ClipFile:
    """A clip whose dialogue and language come from its prompt where they are not given."""
    prompt = known.get("prompt") or ""
    if prompt and known.get("dialogue") is None:
        known["dialogue"], language = spoken(prompt)
        known["language"] = known.get("language") or language
    return ClipFile(path, **known)


def by_prompt(clips: Iterable[tuple[str, str]]) -> dict[tuple[str, int], str]:
    """Names of clips by prompt and number: several clips of a prompt are numbered in the order of their names.

    Args:
        clips: (name, prompt); clips without a prompt are left out.
    """
    seen: Counter[str] = Counter()
    found = {}
    for name, prompt in sorted(clips):
        if prompt:
            found[prompt, seen[prompt]] = name
            seen[prompt] += 1
    return found


def _listed(source: Path, setting: str) -> list[ClipFile]:
    if not source.is_dir():
        return _manifest(source, setting)
    if not (source / SETTINGS).is_file():
        return _folder(source, setting)
    manifest = source / MANIFEST
    if not manifest.is_file():
        raise UserError(
            f"{setting}={source} is a folder of eval.run without {MANIFEST}: its clips are not finished; repeat that command, "
            f"or give {setting}={source / 'clips'}"
        )
    clips = _manifest(manifest, setting)
    print(
        f"note: {setting}={source} is a folder of eval.run: its {MANIFEST} is read (clips: {len(clips)})",
        file=sys.stderr,
    )
    return clips


def _folder(folder: Path, setting: str) -> list[ClipFile]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    paths = sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not paths:
        raise UserError(f"{setting}={folder} has no media files ({', '.join(SUFFIXES)})")
    return [
        _clip(path, name=path.relative_to(folder).with_suffix("").as_posix(), prompt=_prompt_beside(path))
        for path in paths
    ]


def _prompt_beside(path: Path) -> str:
    """Prompt in the record or text file next to a clip; "" without either."""
    from magihuman.io.text import load_json, prompt_text, read_text

    record, text = path.with_suffix(".json"), path.with_suffix(".txt")
    try:
        if record.is_file():
            content = load_json(record)
            if isinstance(content, dict) and isinstance(content.get("prompt"), str):
                return str(content["prompt"])
    except ValueError as error:
        raise UserError(f"{record} cannot be read ({error}); mend or remove it") from error
    return prompt_text(read_text(text, str(text))) if text.is_file() else ""


def _manifest(file: Path, setting: str) -> list[ClipFile]:
    from magihuman.io.text import TABLES, read_rows

    if not file.exists():
        raise UserError(f"{setting}={file} does not exist; give a folder of clips or a manifest ({', '.join(TABLES)})")
    if file.suffix.lower() not in TABLES:
        raise UserError(f"{setting}={file} is neither a folder nor a manifest ({', '.join(TABLES)})")
    rows = list(read_rows(file, f"{setting}={file}", (["clip"],), ("clip", "prompt")))
    _require_columns(dict.fromkeys(name for row in rows for name in row.values), f"{setting}={file}")
    clips = []
    for row in rows:
        if row.problem:
            raise UserError(f"{setting}={file}: {row.where} {row.problem}")
        clips.append(_row_clip(row.values, f"{setting}={file}: {row.where}", file.parent))
    if not clips:
        raise UserError(f"{setting}={file} has no rows")
    return clips


def _require_columns(given: Collection[str], where: str) -> None:
    """Say which columns are not used.

    Raises:
        UserError: one is called nearly as a column that the table lacks: dialog, lang.
    """
    absent = [name for name in COLUMNS if name not in given]
    unused = [name for name in given if name not in COLUMNS]
    for name in unused:
        if near := get_close_matches(name, absent, n=1, cutoff=NEAR):
            raise UserError(f"{where}: unknown column {name!r}; did you mean {near[0]}? rename or remove it")
    if unused:
        print(f"note: {where}: columns that are not used: {', '.join(unused)}", file=sys.stderr)


def _row_clip(values: Mapping[str, Any], where: str, folder: Path) -> ClipFile:
    for column in COLUMNS:
        if not isinstance(values.get(column), str | None):
            raise UserError(f"{where}: {column} should be text, not {values[column]!r}")
    if not values.get("clip"):
        raise UserError(f"{where} has no clip; give the path of a media file")
    paths = {name: folder / values[name] for name in ("clip", "reference", "voice", "image") if values.get(name)}
    for name, path in paths.items():
        if not path.is_file():
            raise UserError(f"{where}: {name} {str(path)!r} does not exist")
    known: dict[str, Any] = {name: values.get(name) or "" for name in ("name", "prompt", "group", "part")}
    known["dialogue"] = values.get("dialogue")  # empty cells of .csv are left out: "" (silence) is stated in JSON only
    try:
        known["language"] = language_code(values["language"]) if values.get("language") else None
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if "reference" in paths:
        known["reference"] = ClipFile(paths["reference"], name=known["name"] or paths["clip"].stem)
    return _clip(paths["clip"], voice=paths.get("voice"), image=paths.get("image"), **known)
