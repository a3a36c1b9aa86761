"""Where a training starts from: `resume`, and new branches of a run.

`resume=PATH` names a start: once the run folder has checkpoints of its own the run continues from them. PATH of an older
checkpoint in the run's own folder starts a new branch there: whatever was made after it is moved to branch-1/ (branch-2, ...),
which is laid out as a run folder, and the same command later continues the new branch.
"""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from magihuman.console import is_main_process, say
from magihuman.io.files import write_atomically
from magihuman.training.checkpoint import complete, find_resume, point_to, step_of
from magihuman.training.runs import RunFolder

SHARED = ("run.json", "run.lock", "metrics.csv", "checkpoints", "samples", "wandb", "tensorboard")
"""In a run folder what all branches share, next to hidden files and the settings; the rest is of the last branch."""
OF_A_BRANCH = ("results", "seconds", "evaluated", "steps", "metrics", "damaged_samples", "wandb")
"""In run.json what describes the last branch."""


def is_new_branch(resume: str, run: RunFolder) -> bool:
    """Whether `resume` names an older checkpoint of the run's own folder, and the run does not continue from it already."""
    path = Path(os.path.expanduser(resume))
    if resume in ("auto", "none") or path.suffix != ".ckpt" or path.is_symlink():
        return False
    if path.parent.resolve() != run.checkpoints.resolve():
        return False
    if (last := _last(run)) and last["checkpoint"] == path.name:
        return not last["complete"]
    return path.exists() and bool(_newer(run, step_of(path)))


def find_start(resume: str, run: RunFolder) -> Path | None:
    """The checkpoint to start from, or None for a new training; changes nothing but damaged checkpoints' names.

    Every process of a job finds the same one, also while the main process is moving files for a new branch.

    Raises:
        UserError: as `magihuman.training.checkpoint.find_resume`.
    """
    path, last = Path(os.path.expanduser(resume)), _last(run)
    if resume in ("auto", "none") or not complete(run.checkpoints) or is_new_branch(resume, run):
        return find_resume(resume, run.checkpoints)
    if run.checkpoints.resolve() not in (path.parent.resolve(), (path / "checkpoints").resolve()):
        say(
            f"note: {run.path} continues from its own checkpoints; resume={resume} was its start, or give another name="
        )
    elif not path.exists() and (last is None or last["checkpoint"] != path.name):
        return find_resume(resume, run.checkpoints)  # which says so
    return find_resume("auto", run.checkpoints)


def begin(run: RunFolder, checkpoint: Path) -> None:
    """Move what was made after `checkpoint` to a folder of its own and record the branch; on the main process.

    A kill in between leaves an entry that is not complete, which the next start finishes.
    """
    if not is_main_process():
        return
    record, step = run.read(), step_of(checkpoint)
    branches: list[dict[str, Any]] = list(record.get("branches", []))
    if not branches or branches[-1]["complete"]:
        branches.append(
            {
                "folder": f"branch-{len(branches) + 1}",
                "checkpoint": checkpoint.name,
                "step": step,
                "time": time.strftime("%Y-%m-%d %H:%M:%S"),
                "command": ["python", "-m", "magihuman.train", *sys.argv[1:]],
                "complete": False,
            }
        )
        run.update(branches=branches)
    aside = run.path / branches[-1]["folder"]
    aside.mkdir(exist_ok=True)
    for file in ("run.json", "config.yaml"):
        if (run.path / file).exists() and not (aside / file).exists():
            write_atomically(aside / file, (run.path / file).read_bytes())
    for path in _newer(run, step):
        _move(path, aside / "checkpoints")
    point_to(run.checkpoints, checkpoint)
    for path in run.samples.glob("step-*"):
        if path.stem.removeprefix("step-").isdigit() and int(path.stem.removeprefix("step-")) > step:
            _move(path, aside / "samples")
    _divide(run.path / "metrics.csv", aside / "metrics.csv", step)
    for path in run.path.iterdir():
        kept = path.name.startswith((".", "branch-", "config")) or path.name in SHARED
        if not kept:
            _move(path, aside)
    branches[-1]["complete"] = True
    run.write({key: value for key, value in run.read().items() if key not in OF_A_BRANCH} | {"branches": branches})
    say(f"note: a new branch of {run.path} begins at step {step}; what was made after it is in {aside}")


def _last(run: RunFolder) -> dict[str, Any] | None:
    branches = run.read().get("branches", [])
    return dict(branches[-1]) if branches else None


def _newer(run: RunFolder, step: int) -> list[Path]:
    """Checkpoints after a step."""
    return [path for path in complete(run.checkpoints) if step_of(path) > step]


def _move(path: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.move(path, folder / path.name)


def _divide(file: Path, later: Path, step: int) -> None:
    """Move a metrics.csv's lines after a step to another file."""
    if not file.exists():
        return
    header, *lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    steps = [int(line.partition(",")[0]) if line.partition(",")[0].isdigit() else 0 for line in lines]
    after = [line for line, number in zip(lines, steps, strict=True) if number > step]
    if after or not later.exists():  # a kill may have come between the two
        write_atomically(later, "".join([header, *after]))
    write_atomically(file, "".join([header, *(line for line, n in zip(lines, steps, strict=True) if n <= step)]))
