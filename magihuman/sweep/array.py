"""The sweep as a Slurm array: the file that is submitted, and the elements that wait or run."""

import os
import re
import shlex
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path

from magihuman.errors import UserError
from magihuman.io.files import CONFIGS, write_atomically
from magihuman.sweep.points import Points

FILE = "array.sbatch"
TEMPLATE = CONFIGS.parent / "slurm" / "train.sbatch"
MARK = "set -euo pipefail"
"""Line of the template before which the options end; the sweep's command comes after it."""
FIXED = {
    **dict.fromkeys(("--nodes", "--ntasks", "--ntasks-per-node"), "comes from trainer.nodes and trainer.devices"),
    "--array": "comes from the points that have not finished; parallel=N limits how many run at once",
    **dict.fromkeys(("--comment", "--job-name", "--chdir"), "is set by the sweep"),
}
"""Options that a user cannot set, and why."""
VARIABLES = ("SETUP", "CONTAINER", "MOUNTS", "LAUNCH")
"""Variables of the template whose value in the environment becomes the file's default."""


def write_array(
    points: Points, folder: Path, elements: Sequence[int], command: Sequence[str], options: str, parallel: int | None
) -> Path:
    """Write array.sbatch and return its path: slurm/train.sbatch with this sweep's numbers, command and options.

    Args:
        elements: numbers to submit; command: of the sweep without `element=`, words.
        options: of sbatch, such as "--partition=gpu --time=2:00:00".
        parallel: most elements that run at once.

    Raises:
        UserError: the points need different numbers of processes, or an option is none.
    """
    sizes = {(point.nodes, point.devices, point.accelerator) for point in points.points}
    if len(sizes) > 1:
        raise UserError(
            "a Slurm array has one size, and points of this sweep differ in trainer.nodes, trainer.devices or "
            "trainer.accelerator; make a sweep of each"
        )
    nodes, devices, accelerator = sizes.pop()
    here = str(folder.resolve())
    lines: dict[str, str | None] = {
        "--job-name": points.name,
        "--comment": here,
        "--chdir": os.getcwd(),
        "--output": f"{here.replace('%', '%%')}/logs/%x-%A_%a.out",
        "--array": _ranges(elements) + (f"%{parallel}" if parallel else ""),
        "--nodes": str(nodes),
        "--ntasks-per-node": str(devices),
        "--gpus-per-node": None if accelerator == "cpu" else str(devices),
        **_options(options),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    words = shlex.join(command)
    about = f"# The sweep {points.name} ({len(points.points)} points), written by python -m magihuman.sweep.\n"
    about += f"# By hand: sbatch --array=ELEMENTS {shlex.quote(str(folder / FILE))}\n"
    text = re.sub(r"(?<=^#!/bin/bash\n)(#(?!SBATCH|#).*\n)+", lambda _: about, text, count=1)
    text = _with_options(text, lines)
    for name in VARIABLES:
        if value := os.environ.get(name):
            (line,) = re.findall(rf"^{name}=.*$", text, re.M)
            text = text.replace(line, f"{name}={shlex.quote(value)}")
    assert text.count(MARK) == 1
    text = text.replace(MARK, f'{MARK}\nset -- python -m magihuman.sweep {words} element="$SLURM_ARRAY_TASK_ID"')
    (folder / "logs").mkdir(parents=True, exist_ok=True)  # Slurm makes no folders
    write_atomically(folder / FILE, text)
    return folder / FILE


def _options(text: str) -> dict[str, str | None]:
    """Options of sbatch by name; "" where one has no value."""
    found: dict[str, str | None] = {}
    for option in shlex.split(text):
        name, equals, value = option.partition("=")
        if not re.fullmatch(r"--[a-z-]+", name) or (equals and not value):
            raise UserError(f"sbatch={text!r}: {option!r} should be of the form --name=value, such as --partition=gpu")
        if name in FIXED:
            raise UserError(f"sbatch={text!r}: {name} {FIXED[name]}")
        found[name] = value
    return found


def _with_options(text: str, lines: dict[str, str | None]) -> str:
    """The file with its #SBATCH lines replaced, removed (None) and completed."""
    written: set[str] = set()
    kept: list[str] = []

    def line(name: str, value: str) -> str:
        quoted = f'"{value}"' if re.search(r"\s", value) else value
        return f"#SBATCH {name}={quoted}" if value else f"#SBATCH {name}"

    for old in text.splitlines():
        if found := re.match(r"##?SBATCH (--[a-z-]+)", old):
            name = found[1]
            if name in lines:
                value = lines[name]
                if value is not None and name not in written:
                    kept.append(line(name, value))
                written.add(name)
                continue
        elif old == MARK:
            kept += [line(name, value) for name, value in lines.items() if value is not None and name not in written]
        kept.append(old)
    return "\n".join(kept) + "\n"


def _ranges(numbers: Collection[int]) -> str:
    """Such as 0-2,5."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


# ---- The queue ----


def in_queue(points: Points, folder: Path) -> set[int]:
    """Elements of the sweep that wait or run in Slurm's queue; the others may be submitted.

    Raises:
        UserError: Slurm does not answer.
    """
    columns = "%K|%k"  # element, comment
    text = _slurm(["squeue", "--noheader", "--array", f"--name={points.name}", f"--format={columns}"])
    found: set[int] = set()
    for line in text.splitlines():
        element, _, comment = line.strip().partition("|")
        if comment == str(folder.resolve()) and element.isdigit():
            found.add(int(element))
    return found


def submit(file: Path) -> str:
    """Submit an sbatch file; the number of the job.

    Raises:
        UserError: Slurm refuses it.
    """
    try:
        return _slurm(["sbatch", "--parsable", str(file)]).strip().split(";")[0]
    except UserError as error:
        raise UserError(f"{error}; set options with sbatch='--name=value ...', or edit and submit {file}") from error


def _slurm(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise UserError(
            f"there is no {command[0]} here; run this where Slurm's commands are, --dry-run only writes the file, "
            "launcher=local runs the sweep here"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} has not answered within two minutes; repeat the command later") from None
    if done.returncode:
        raise UserError(f"{command[0]}: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
    return done.stdout
