"""Output of the evaluation commands, the same for all: a result file, its table, its figures.

    values = {"format": "magihuman-scores/1", ...}                          # measured
    publish(folder, "scores", values, {"scores": partial(figures.score_bars, values)})

Every command checks its options, measures, and hands plain values to `publish`; tables and figures are made from these.
"""

import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import clip_tables, puppet_tables
from magihuman.errors import UserError
from magihuman.io.files import write_atomically, write_result
from magihuman.io.provenance import code_version, portable, processor
from magihuman.io.text import load_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BY_FORMAT: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "magihuman-scores/1": puppet_tables.scores,
    "magihuman-sr/1": puppet_tables.super_resolution,
    "magihuman-decoders/1": puppet_tables.decoders,
    "magihuman-ablation/1": puppet_tables.ablation,
    "magihuman-conditions/1": puppet_tables.conditioning,
    "magihuman-compare/2": puppet_tables.comparison,
    "magihuman-verdict-power/1": puppet_tables.verdict_power,
    "magihuman-sensitivity/1": clip_tables.sensitivity,
    "magihuman-world-checks/1": puppet_tables.world_checks,
    "magihuman-clip-scores/1": clip_tables.clip_scores,
    "magihuman-clip-comparison/1": clip_tables.clip_comparison,
}
"""Format of a result file -> its .md."""


def require_at_least(**given: tuple[int, int]) -> None:
    """Check options, each name=(value, least).

    Raises:
        UserError: the first value below its least.
    """
    for name, (value, least) in given.items():
        if value < least:
            raise UserError(f"{name}={value} is impossible; give at least {least}")


def folder_for(kind: str, *names: str) -> Path:
    """Default folder of results: `kind` in a run folder, else runs/`kind` under the names of what was measured."""
    if len(names) == 1 and (Path(names[0]) / "export").is_dir():
        return Path(names[0]) / kind
    return Path("runs") / kind / "+".join(name.strip("./").replace("/", "-") for name in names)[:100]


def short_names(names: Sequence[str]) -> list[str]:
    """Last parts of checkpoints' names or folders, the whole where several end alike."""
    last = [name.rstrip("/").rsplit("/", 1)[-1] for name in names]
    return [name if last.count(end) > 1 else end for name, end in zip(names, last, strict=True)]


def publish(
    folder: Path | None,
    name: str,
    values: Mapping[str, Any],
    figures: "Mapping[str, Callable[[], Figure]] | None" = None,
    text: str | None = None,
) -> dict[str, Any]:
    """Print the table of a result; write NAME.json, NAME.md and the figures into a folder.

    Args:
        folder: made where it does not exist; None prints only.
        values: content of the result file, of a format in `BY_FORMAT`; the provenance is added.
        figures: name -> what draws it; written as PNG, when the values are safe.
        text: for the terminal instead of the Markdown table.

    Returns:
        The content of NAME.json.
    """
    table = BY_FORMAT[values["format"]](values)
    content = {**values, "provenance": provenance()}
    if folder is not None:
        write_result(folder / f"{name}.json", content)
        write_atomically(folder / f"{name}.md", table + "\n")
    print(table if text is None else text, flush=True)
    if folder is not None:
        for title, draw in (figures or {}).items():
            draw().savefig(folder / f"{title}.png", dpi=100)
        spent = f" ({values['seconds']:.0f} s)" if "seconds" in values else ""
        print(f"written to {folder}{spent}")
    return content


def provenance() -> dict[str, Any]:
    """Command, commit, machine, date and versions: what is needed to measure again.

    Threads and the GPU are those of torch where it was used; it takes seconds to import, and scores from the cache need none.
    """
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_available()
    return {
        "command": [Path(sys.argv[0]).name, *map(portable, sys.argv[1:])],
        "code": code_version(),
        "machine": torch.cuda.get_device_name() if torch is not None and on_gpu else processor(),
        **({} if torch is None else {"threads": torch.get_num_threads()}),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "libraries": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}},
    }


def training_record(checkpoint: str | Path) -> dict[str, Any]:
    """Command, steps, code and memory of the training behind a checkpoint, from its run.json and its last checkpoint.

    Returns:
        {} for anything but a run folder, else {"command", "steps", "seed", "code"}, with "process_gb" (decimal, peak
        memory of the process) and "state_mb" (decimal, size of the file to resume from: trained networks, their
        optimisers and averages, nothing frozen) where they are known.
    """
    file = Path(checkpoint) / "run.json"
    if not file.exists():
        return {}
    record = load_json(file)
    made = record.get("provenance", {})
    found: dict[str, Any] = {
        "command": " ".join(map(portable, made.get("command", []))),
        "steps": record.get("steps"),
        "seed": made.get("seed"),
        "code": made.get("code"),
    }
    if "memory_gb" in record.get("metrics", {}):
        found["process_gb"] = round(record["metrics"]["memory_gb"], 3)
    last = Path(checkpoint) / "checkpoints" / "last.ckpt"
    if last.is_file():
        found["state_mb"] = round(last.stat().st_size / 1e6, 1)
    return found
