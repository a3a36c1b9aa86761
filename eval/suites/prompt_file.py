"""A suite of one's own: a file of prompts with whatever is known of each."""

from pathlib import Path

from eval.languages import language_code
from eval.suites.suite_items import Suite, SuiteItem, SuiteOptions
from inference.requests import check_length, check_name, check_seconds, check_seed, slug
from magihuman.errors import UserError
from magihuman.io.text import CAPTION_COLUMNS, TABLES, TableRow, prompt_rows

PATHS = ("image", "audio", "voice", "reference")
TEXTS = ("name", "dialogue", "language", "negative_prompt", "group", "part")
IGNORED = ("clip",)
"""Columns of a manifest of clips (`eval.clip_list`) that mean nothing here, where clips are made."""


def read_prompt_file(options: SuiteOptions) -> Suite:
    """Items of a .txt (a prompt a line) or a table; paths in it are relative to the file.

    The prompts are taken as they are: no template. Where a row has no dialogue, the scorer takes what stands in the
    prompt's block `Dialogue:`.

    Raises:
        UserError: a missing file, an option that does not apply, or a row that cannot be used.
    """
    file = Path(options.suite).expanduser()
    if file.suffix.lower() not in (".txt", *TABLES):
        raise UserError(
            f"suite={options.suite} is unknown; choose versebench, talkvid or puppets, or give a file of prompts "
            f"(.txt, {', '.join(TABLES)})"
        )
    for name in ("suite_path", "parts", "transcripts"):
        if (value := getattr(options, name)) is not None:
            raise UserError(f"{name}={value} is not for a file of prompts; leave it out")
    items: list[SuiteItem] = []
    seen: dict[str, str] = {}
    for row in prompt_rows(file, f"suite={options.suite}"):
        item = _item(row, len(items), file, options.first_frame)
        if item.name in seen:
            raise UserError(f"{file}: the name {item.name!r} is used in {seen[item.name]} and again in {row.where}")
        seen[item.name] = row.where
        items.append(item)
    if not items:
        raise UserError(f"suite={options.suite} holds no prompt")
    return Suite(file.stem, tuple(items))


def _item(row: TableRow, index: int, file: Path, first_frame: bool) -> SuiteItem:
    where = f"{file} {row.where}"
    known = {*CAPTION_COLUMNS, *PATHS, *TEXTS, *IGNORED, "seconds", "seed"}
    if unknown := sorted(set(row.values) - known):
        raise UserError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}")
    try:
        if row.problem:
            raise ValueError(row.problem)
        prompt = row.text(("prompt", *CAPTION_COLUMNS))
        texts = {key: row.text((key,)) for key in (*TEXTS, *PATHS) if row.values.get(key) is not None}
    except ValueError as error:
        raise UserError(f"{where} {error}") from None
    if not prompt:
        raise UserError(f"{where}: the prompt is missing or empty")
    check_length(prompt, f"{where}: the prompt")
    name = texts.get("name") or f"{index:04d}-{slug(prompt)}"
    check_name(name, where)  # before the list of prompts is made of it, whose lines the user does not know
    paths = {key: file.parent / texts[key] for key in PATHS if texts.get(key)}
    for key, path in paths.items():
        if not path.is_file():
            raise UserError(f"{where}: {key} {path} does not exist")
    values = row.values
    if texts.get("language"):
        try:
            language_code(texts["language"])  # before clips are made
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return SuiteItem(
        name=name,
        prompt=prompt,
        dialogue=texts.get("dialogue"),
        language=texts.get("language") or None,
        image=paths.get("image") if first_frame else None,
        audio=paths.get("audio"),
        voice=paths.get("voice"),
        reference=paths.get("reference"),
        seconds=check_seconds(values["seconds"], where) if values.get("seconds") is not None else None,
        seed=check_seed(values["seed"], where) if values.get("seed") is not None else None,
        negative_prompt=texts.get("negative_prompt"),
        group=texts.get("group", ""),
        part=texts.get("part", ""),
    )
