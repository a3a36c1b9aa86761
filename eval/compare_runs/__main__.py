"""The command line: which runs, and what is written."""

import json
import sys
import time
from pathlib import Path
from typing import Any

PROGRAM = "python -m eval.compare_runs"
PRINTED = 30


def compare_runs(
    runs: list[str] | None = None,
    sweep: str | None = None,
    wandb: str | None = None,
    baseline: str | None = None,
    output: str | None = None,
    clips: str = "copy",
) -> dict[str, Any]:
    """Compare trainings: settings that differ, curves, scores, cost, clips side by side, lineage.

      python -m eval.compare_runs runs/dmd2/a runs/dmd2/b       run folders, or W&B's offline folders
      python -m eval.compare_runs runs/pretrain/*               all trainings of a recipe
      python -m eval.compare_runs sweep=dmd2_lr                 the points of a sweep
      python -m eval.compare_runs 'wandb=ENTITY/PROJECT?group=dmd2_lr'

    Writes index.html, which opens in any browser without a network, table.csv, table.md and curves.png, and prints the
    table. Runs that are broken, unfinished or of another recipe are shown as such. Exit status: 0 when the page is
    written, 2 for wrong input.

    Args:
        runs: folders, given by their paths alone
        sweep: name of a sweep in runs/sweeps, or its folder
        wandb: ENTITY/PROJECT at W&B, with filters behind ?: group, job_type, state, tag or a setting, joined by &
        baseline: run that the others are compared with, by name or path; none is the first finished one
        output: folder of the page; none is comparison/ in a sweep's folder, else runs/compare_runs/NAMES
        clips: copy: into the page's folder (hard links where possible), which may then be moved; link: where they lie

    Raises:
        UserError: no runs, a folder that is none, an unknown baseline, or a page of somebody else at `output`.
    """
    from eval.compare_runs.run_page import check_page, comparison, write_page
    from eval.compare_runs.run_sources import baseline_of, find_runs
    from eval.compare_runs.run_tables import table_rows, write_tables
    from magihuman.errors import UserError
    from magihuman.io.markdown import aligned

    if clips not in ("copy", "link"):
        raise UserError(f"clips={clips} is unknown; choose copy or link")
    start = time.perf_counter()
    asked = find_runs(runs or [], sweep, wandb)
    folder = Path(output) if output else asked.output
    check_page(folder)
    found = comparison(asked.runs, baseline_of(asked.runs, baseline), asked.title, asked.goal)
    placed = write_page(folder, found, clips == "copy")
    write_tables(folder, found)
    rows = table_rows(found)
    print("\n".join(aligned(rows[: PRINTED + 1])))
    if len(rows) > PRINTED + 1:
        print(f"... and {len(rows) - PRINTED - 1} more in {folder / 'table.md'}")
    for line in asked.notes:
        print(f"note: {line}")
    if placed:
        print(placed)
    print(f"{folder / 'index.html'}: {found.counts} ({time.perf_counter() - start:.1f} s)")
    return {"page": str(folder / "index.html")}


def arguments(words: list[str]) -> list[str]:
    """The command line with the folders, which are given by their paths alone, as one setting."""
    known = ("sweep", "wandb", "baseline", "output", "clips", "runs")

    def is_folder(word: str) -> bool:
        if word == "help" or word.startswith("-") or word.partition("=")[0] in known:
            return False
        return "/" in word.partition("=")[0] or "=" not in word or Path(word).exists()  # a misspelt setting is none

    folders = [word for word in words if is_folder(word)]
    others = [word for word in words if word not in folders]
    return [*([f"runs={json.dumps(folders)}"] if folders else []), *others]


if __name__ == "__main__":
    from magihuman.cli import run

    run(compare_runs, PROGRAM, arguments(sys.argv[1:]))
