"""Result folders of scored clips: written by `eval.score` and `eval.run`, read by `eval.compare_scores`.

    write_scores(Path("out"), {"clips": scored}, {"suite": None})
    read_rows_of(Path("out"))["clips"]

| file | content |
|---|---|
| results.jsonl | a line per clip of every column: values, each with status and reason, and texts |
| summary.json, summary.md, summary.png | averages with intervals, the suite's settings, versions, provenance |
"""

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import tables
from eval.metrics.registry import metrics
from eval.output import publish
from eval.score_rows import ClipRow
from eval.score_summary import by_language, by_part
from eval.scoring import Scored
from magihuman.errors import UserError
from magihuman.io.files import write_atomically

RESULTS, SUMMARY = "results.jsonl", "summary.json"
FORMAT = "magihuman-clip-scores/1"


def write_scores(
    folder: Path,
    columns: Mapping[str, Scored],
    facts: Mapping[str, Any] | None = None,
    published: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Print the table and write a result folder.

    Args:
        columns: "clips", and "reference" and "bound" where they were scored.
        facts: further content of summary.json, such as "suite".
        published: name -> metric -> value, of others' publications.

    Returns:
        The content of summary.json.

    Raises:
        OSError: it cannot be written.
    """
    lines = [
        json.dumps({"column": name, **row.to_dict()}, ensure_ascii=False)
        for name, scored in columns.items()
        for row in scored.rows
    ]
    folder.mkdir(parents=True, exist_ok=True)
    content = "".join(line + "\n" for line in lines)
    summaries = {name: scored.summary() for name, scored in columns.items()}
    used = next(iter(columns.values())).used
    values: dict[str, Any] = {
        "format": FORMAT, "clips": len(next(iter(columns.values())).rows), "suite": None, **(facts or {}),
        "fps": {name: _rates(scored.rows) for name, scored in columns.items()},
        "columns": summaries, "by_language": by_language(columns["clips"].rows),
        "parts": by_part(columns["clips"].rows), "measurements": used,
    }  # fmt: skip
    values["labels"] = {key: metrics()[key].heading for key in summaries["clips"]}
    if published:
        values["published"] = published
    if (before := _unchanged(folder, content, values)) is not None:
        print(f"{tables.clip_scores_text(values)}\n{folder} holds these results already", flush=True)
        return before
    write_atomically(folder / RESULTS, content)
    rows = {name: scored.rows for name, scored in columns.items()}

    def draw() -> Any:
        from eval.score_figures import score_panels

        return score_panels(rows, summaries)

    return publish(folder, "summary", values, {"summary": draw}, tables.clip_scores_text(values))


def _rates(rows: Sequence[ClipRow]) -> list[float]:
    """The frame rates among clips, ascending."""
    return sorted({round(row.fps, 2) for row in rows if row.fps})


def _unchanged(folder: Path, content: str, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary in a folder whose results and settings are these; drawing them again would take seconds for nothing."""
    if not (folder / "summary.png").is_file():
        return None
    try:
        if (folder / RESULTS).read_text(encoding="utf-8") != content:
            return None
        before = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = {key: before.get(key) for key in values} == json.loads(json.dumps(values))
    return before if same else None


def read_rows_of(folder: Path) -> dict[str, list[ClipRow]]:
    """Rows of a result folder by column.

    Raises:
        UserError: there is no results.jsonl, or a line of another form.
    """
    file = folder / RESULTS if folder.is_dir() else folder
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{folder} has no readable {RESULTS} ({error}); give the output folder of eval.score"
        ) from error
    columns: dict[str, list[ClipRow]] = {}
    collecting = gc.isenabled()
    gc.disable()  # 10,000 clips are half a million objects: looking through them again and again takes most of the time
    try:
        for number, line in enumerate(lines, 1):
            try:
                content = json.loads(line)
                columns.setdefault(str(content.get("column", "clips")), []).append(ClipRow.from_dict(content))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"{file} line {number} is no result of a clip ({type(error).__name__}: {error})"
                ) from error
    finally:
        gc.freeze()  # nor are they looked through later: they are read to the end of a command
        if collecting:
            gc.enable()
    if not columns:
        raise UserError(f"{file} is empty; run eval.score again")
    return columns
