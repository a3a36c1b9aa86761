"""Which runs are compared: folders, a sweep, or runs at W&B; their short names, the baseline, where the page goes.

asked = find_runs(["runs/dmd2/a", "runs/dmd2/b"], None, None)
asked.runs, asked.output
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.compare_runs.run_records import RunRecord, read_folder
from eval.compare_runs.wandb_runs import offline_folders, read_api, read_offline
from eval.output import folder_for
from magihuman.errors import UserError
from magihuman.sweep.points import FILE, Points

SWEEPS = Path("runs/sweeps")


@dataclass
class AskedRuns:
    """What the command line asks for.

    Attributes:
        goal: name of the sweep's metric, and max or min; output: folder of the page where none is given.
        notes: lines for the user.
    """

    runs: list[RunRecord]
    title: str
    output: Path
    goal: tuple[str, str] | None = None
    notes: list[str] = field(default_factory=list)


def find_runs(folders: Sequence[str], sweep: str | None, wandb: str | None) -> AskedRuns:
    """Read all runs that the command line names.

    Raises:
        UserError: none, or more than one kind; a folder that is not there or holds no run.
    """
    kinds = [name for name, given in (("folders", folders), ("sweep=", sweep), ("wandb=", wandb)) if given]
    if not kinds:
        raise UserError(
            "give the runs to compare: their folders (runs/dmd2/*), sweep=NAME or wandb=ENTITY/PROJECT; see --help"
        )
    if len(kinds) > 1:
        raise UserError(f"{' and '.join(kinds)} are given; give one of them")
    if sweep:
        asked = _of_sweep(sweep)
    elif wandb:
        title = wandb.partition("?")[0]
        asked = AskedRuns(read_api(wandb), title, folder_for("compare_runs", title))
    else:
        asked = _of_folders(folders)
    _shorten(asked.runs)
    return asked


def _of_folders(given: Sequence[str]) -> AskedRuns:
    runs: list[RunRecord] = []
    notes, known = [], set()
    for name in given:
        folder = Path(name)
        if not folder.is_dir():
            raise UserError(f"{name} is {'a file' if folder.exists() else 'not there'}; give run folders")
        if folder.resolve() in known:
            notes.append(f"{name} is given twice and shown once")
            continue
        known.add(folder.resolve())
        runs += _in_folder(folder)
    names, above = [Path(name).resolve().name for name in given], {Path(name).resolve().parent.name for name in given}
    title = (
        " and ".join(names) if len(names) < 4 else f"Runs in {min(above)}" if len(above) == 1 else "Comparison of runs"
    )
    return AskedRuns(runs, title, folder_for("compare_runs", *given), notes=notes)


def _in_folder(folder: Path) -> list[RunRecord]:
    """The run of a run folder, or those of W&B's offline folders."""
    if (folder / "run.json").exists() or (folder / "config.yaml").exists():
        return [read_folder(folder)]
    if offline := offline_folders(folder):
        return read_offline(offline)
    if (folder / FILE).is_file():
        raise UserError(f"{folder} is of a sweep; give sweep={folder}")
    inside = sorted(path.parent.name for path in folder.glob("*/run.json"))
    hint = f"; it holds {len(inside)} runs, give {folder}/*" if inside else ""
    raise UserError(f"{folder} has no run.json and is no run folder{hint}")


def _of_sweep(name: str) -> AskedRuns:
    """Points of a sweep by its name or folder; one that has not begun is shown with the settings of its point."""
    folder = SWEEPS / name if (SWEEPS / name).is_dir() or not Path(name).is_dir() else Path(name)
    sweep = Points.load(folder)
    runs = []
    for point in sweep.points:
        run = read_folder(Path(point.folder))
        if not run.settings:
            words = (word.lstrip("+").partition("=") for word in point.overrides)
            run.settings, run.partial = {key: value for key, _, value in words}, True
        runs.append(run)
    if not runs:
        raise UserError(f"{folder} has no points")
    goal = (sweep.metric["name"], sweep.metric["goal"]) if sweep.metric else None
    return AskedRuns(runs, sweep.name, folder / "comparison", goal)


def _shorten(runs: Sequence[RunRecord]) -> None:
    """Make the names of runs unique: more of the path, or a number, where they are alike."""
    count = Counter(run.name for run in runs)
    for run in runs:
        if count[run.name] > 1:
            run.name = "/".join(Path(run.place).parts[-2:]) or run.place
    count = Counter(run.name for run in runs)
    for number, run in enumerate(runs):
        if count[run.name] > 1:
            run.name = f"{run.place} ({number})"


def baseline_of(runs: Sequence[RunRecord], name: str | None) -> int:
    """Number of the run that others are compared with.

    Raises:
        UserError: none or several runs have this name.
    """
    if name is None:
        finished = [number for number, run in enumerate(runs) if run.status == "finished"]
        return finished[0] if finished else 0
    wanted = name.rstrip("/")
    found = [number for number, run in enumerate(runs) if wanted in (run.name, run.place.rstrip("/"))]
    if len(found) != 1:
        known = ", ".join(run.name for run in runs[:10]) + (", ..." if len(runs) > 10 else "")
        raise UserError(f"baseline={name} is {'not' if not found else 'more than'} one of the runs: {known}")
    return found[0]
