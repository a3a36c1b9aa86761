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
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval import clip_tables
from eval.metrics.registry import SetMeasurement, measurements, metrics
from eval.output import publish
from eval.score_rows import ClipRow
from eval.score_summary import by_language, by_part
from eval.scoring import Scored
from magihuman.errors import UserError
from magihuman.io.files import write_atomically
from magihuman.io.text import load_json

RESULTS, SUMMARY = "results.jsonl", "summary.json"
FORMAT = "magihuman-clip-scores/1"


def write_scores(
    folder: Path,
    columns: Mapping[str, Scored],
    facts: Mapping[str, Any] | None = None,
    published: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Print the table and write a result folder.

    Metrics of earlier results in the folder, which this run did not measure, are kept where clips and inputs are the same;
    "kept" in summary.json lists them. Without any value nothing is written over earlier results.

    Args:
        columns: "clips", and "reference" and "bound" where they were scored.
        facts: further content of summary.json, such as "suite".
        published: name -> metric -> value, of others' publications.

    Returns:
        The content of summary.json.

    Raises:
        OSError: it cannot be written.
    """
    columns, kept, lost = _with_earlier(folder, columns)
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
        "parts": by_part(columns["clips"].rows), "measurements": used, "kept": kept,
    }  # fmt: skip
    values["labels"] = {key: metrics()[key].heading for key in summaries["clips"]}
    if published:
        values["published"] = published
    if (folder / RESULTS).is_file() and all(
        measure["value"] is None for s in summaries.values() for measure in s.values()
    ):
        print(
            f"{clip_tables.clip_scores_text(values)}\nno metric has a value: the earlier results in {folder} stay",
            flush=True,
        )
        return values
    if lost:
        print(lost, file=sys.stderr)
    if (before := _unchanged(folder, content, values)) is not None:
        print(f"{clip_tables.clip_scores_text(values)}\n{folder} holds these results already", flush=True)
        return before
    write_atomically(folder / RESULTS, content)
    rows = {name: scored.rows for name, scored in columns.items()}

    def draw() -> Any:
        from eval.score_figures import score_panels

        return score_panels(rows, summaries)

    return publish(folder, "summary", values, {"summary": draw}, clip_tables.clip_scores_text(values))


def _with_earlier(folder: Path, columns: Mapping[str, Scored]) -> tuple[Mapping[str, Scored], list[str], str]:
    """The columns with what a folder's earlier results have beyond them, the keys of these metrics, and which are not kept.

    Kept are metrics of single clips by measurements of today's version, if every clip has the content and the inputs that it
    had then.
    """
    if not (folder / RESULTS).is_file():
        return columns, [], ""
    try:
        rows = {(name, row.clip): row for name, part in read_rows_of(folder).items() for row in part}
        used = dict(load_json(folder / SUMMARY)["measurements"])
        versions = {name: one["version"] for name, one in used.items()}
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        print(f"note: the earlier results in {folder} cannot be read and are replaced ({error})", file=sys.stderr)
        return columns, [], ""
    known, asked = (
        measurements(),
        {key for row in columns["clips"].rows for key in row.values} | columns["clips"].sets.keys(),
    )
    keys = {name: [metric.key for metric in known[name].metrics] if name in known else [name] for name in used}
    left = {name: keys[name] for name in used if not asked & {*keys[name]}}
    now = [(row, rows.get((name, row.clip))) for name, scored in columns.items() for row in scored.rows]
    same = all(
        old is not None and row.inputs and (old.sha256, old.inputs) == (row.sha256, row.inputs) for row, old in now
    )
    fresh = {
        n for n in left if n in known and not isinstance(known[n], SetMeasurement) and versions[n] == known[n].version
    }
    kept = [key for name in left if name in fresh and same for key in left[name]]
    lost = [key for name in left if name not in fresh or not same for key in left[name]]
    why = "they are of another version, or of sets" if same else "clips, prompts or references are others"
    note = f"earlier values of {', '.join(lost[:4])}{' ...' if len(lost) > 4 else ''} in {folder} are replaced: {why}; "
    note = f"note: {note}name their metrics to measure them, too" if lost else ""
    if not kept:
        return columns, [], note
    print(f"kept {len(kept)} metrics of the earlier results in {folder}", file=sys.stderr)
    for row, old in now:
        assert old is not None
        found = {**{key: old.values[key] for key in kept if key in old.values}, **row.values}
        row.values = {key: found[key] for key in metrics() if key in found}
        row.texts = {**({} if lost else old.texts), **row.texts}
    earlier = {name: used[name] for name in left if name in fresh}
    return {name: replace(scored, used={**earlier, **scored.used}) for name, scored in columns.items()}, kept, note


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
