"""`python -m magihuman.sweep NAME`: several trainings from one file, see HELP."""

import sys

from magihuman import preemption

if __name__ == "__main__":  # before the imports below, as in magihuman.train
    preemption.install()

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from magihuman.cli import errors_in_one_line
from magihuman.errors import UserError

if TYPE_CHECKING:
    from magihuman.sweep.points import Points

HELP = """usage: python -m magihuman.sweep NAME [settings of all points] [launcher=local|slurm|wandb] [--dry-run]
       python -m magihuman.sweep NAME status [sort=true]

Several trainings from one file, configs/sweep/NAME.yaml or a path that ends in .yaml: a grid, a list of points, seeds.

  python -m magihuman.sweep pretrain_lr                                  here, one after the other
  python -m magihuman.sweep pretrain_lr launcher=slurm sbatch='--partition=gpu --time=2:00:00'
  python -m magihuman.sweep pretrain_seeds +recipe=sr name=sr_seeds      another recipe, under another name
  python -m magihuman.sweep pretrain_lr status sort=true                 the table, the best point first

Run folders are runs/RECIPE/NAME-ELEMENT. The same command again runs what has not finished, and nothing else.

settings:
  launcher     local, slurm (a job array) or wandb (a sweep for `wandb agent`) (default local)
  sbatch       slurm: options of sbatch, such as '--account=NAME --partition=NAME --qos=NAME --time=2:00:00'
  parallel     slurm: most elements that run at once (default: all)
  --dry-run    print what would run, and write the file for Slurm or W&B; start nothing
  name         of the sweep (default: the file's)
  runs         folder of all runs (default runs); the sweep's own files are in RUNS/sweeps/NAME
  element      run this element only, in this process; for the launchers
  sort         status: by the metric instead of by element (default false)
  others       settings of python -m magihuman.train, for all points; +recipe=NAME replaces the file's recipe

sweeps: {known}"""
SUFFIXES = (".yaml", ".yml")
LAUNCHERS = ("local", "slurm", "wandb")
OWN = ("launcher", "sbatch", "parallel", "dry_run", "name", "runs", "element", "sort")


@dataclass
class SweepCommand:
    """The command line.

    Attributes:
        file: name or path of the sweep's file; words: settings of all points.
    """

    file: str
    words: list[str]
    launcher: str = "local"
    sbatch: str = ""
    parallel: int | None = None
    dry_run: bool = False
    name: str | None = None
    runs: str = "runs"
    element: int | None = None
    sort: bool = False
    status: bool = False

    @property
    def folder(self) -> Path:
        """Of the sweep."""
        stem = Path(self.file).stem if self.file.endswith(SUFFIXES) else Path(self.file).name  # a name may have dots
        return Path(self.runs) / "sweeps" / (self.name or stem)

    @property
    def again(self) -> list[str]:
        """Words that name this sweep, for commands."""
        return [self.folder.name, *([f"runs={self.runs}"] if self.runs != "runs" else [])]


def main() -> None:
    """The command line."""
    arguments = sys.argv[1:]
    with errors_in_one_line("interrupted; the same command continues"):
        if not arguments or {"-h", "--help", "help"} & set(arguments):
            from magihuman.config import available

            print(HELP.format(known=", ".join(available("sweep"))))
            raise SystemExit(0 if arguments else 2)
        options = parse(arguments)
        if options.element is not None:
            from magihuman.sweep.element import run_element

            run_element(options.folder, options.element)
        if options.status:
            show(options)
        else:
            launch(options)


def parse(arguments: Sequence[str]) -> SweepCommand:
    """The options of command-line words.

    Raises:
        UserError: no name, an unknown option, or a value that cannot be.
    """
    rest = ["dry_run=true" if word == "--dry-run" else word for word in arguments]
    bare = [word for word in rest if "=" not in word and not word.startswith(("~", "-"))]
    if not bare:
        raise UserError("no sweep given: python -m magihuman.sweep NAME; --help lists them")
    if len(bare) > 1 and bare[1:] != ["status"]:
        word = next(word for word in bare[1:] if word != "status")
        raise UserError(f"{word!r} is not of the form key=value; the only command behind NAME is status")
    options = SweepCommand(bare[0], [], status=len(bare) == 2)
    values: dict[str, str] = {}
    for word in rest:
        if word in bare:
            continue
        key, _, value = word.lstrip("+").partition("=")
        if word.startswith("-"):
            raise UserError(
                f"there is no option {word}; write {word.lstrip('-').partition('=')[0]}=VALUE, or --dry-run"
            )
        if key not in OWN:
            options.words.append(word)
        elif key in values:
            raise UserError(f"{key} is given twice")
        else:
            values[key] = value
    _fill(options, values)
    if (options.element is not None or options.status) and options.words:
        raise UserError(f"{' '.join(options.words)}: the points are frozen; settings are given at the start of a sweep")
    for word in options.words:
        if word.lstrip("+").partition("=")[0] in ("folder", "resume"):
            raise UserError(f"{word}: runs of a sweep are <runs>/RECIPE/NAME-ELEMENT; choose name= and runs=")
    return options


def _fill(options: SweepCommand, values: dict[str, str]) -> None:
    for key, value in values.items():
        if key in ("dry_run", "sort"):
            if value not in ("true", "false"):
                raise UserError(f"{key}={value} should be true or false")
            setattr(options, key, value == "true")
        elif key in ("parallel", "element"):
            if not value.isdigit() or (key == "parallel" and int(value) < 1):
                raise UserError(f"{key}={value} should be a whole number{' from 1 on' if key == 'parallel' else ''}")
            setattr(options, key, int(value))
        elif not value and key != "sbatch":
            raise UserError(f"{key}= is empty; give a value, or leave it out")
        else:
            setattr(options, key, value)
    if options.launcher not in LAUNCHERS:
        raise UserError(f"launcher={options.launcher} should be one of {', '.join(LAUNCHERS)}")
    if options.launcher != "slurm" and (options.sbatch or options.parallel):
        raise UserError("sbatch= and parallel= are for launcher=slurm")
    name = options.folder.name
    if "/" in (options.name or "") or name in (".", "..", ""):
        raise UserError(f"name={options.name} is not the name of a folder")
    if "=" in name or name.startswith(("-", "~")) or name.endswith(SUFFIXES) or name == "help":
        raise UserError(f"name={name}: the name of a sweep is a word of its own on the command line; choose another")
    if options.sort and not options.status:
        raise UserError("sort= is for status")


# ---- Commands ----


def show(options: SweepCommand) -> None:
    """Print the table of a sweep."""
    from magihuman.sweep.array import FILE, in_queue
    from magihuman.sweep.points import Points
    from magihuman.sweep.table import states, table

    points = Points.load(options.folder)

    def queue() -> set[int]:
        try:
            return in_queue(points, options.folder)
        except UserError as error:
            print(f"note: the queue is unknown ({error})")
            return {point.element for point in points.points}

    print(table(points, states(points, queue if (options.folder / FILE).exists() else None), options.sort))


def launch(options: SweepCommand) -> None:
    """Start what has not finished."""
    from magihuman.sweep.points import Points, freeze, read_file
    from magihuman.sweep.table import FINISHED, RUNNING, counted, states

    file = read_file(options.file)
    runs = [] if options.runs == "runs" else [f"runs={options.runs}"]
    write = not options.dry_run or options.launcher != "local"
    points: Points = freeze(file, [*options.words, *runs], options.folder, options.runs, write)
    found = states(points)
    waiting: set[int] = set()
    if options.launcher == "slurm":
        from magihuman.sweep.array import in_queue

        try:
            waiting = in_queue(points, options.folder)
        except UserError as error:
            if not options.dry_run:
                raise
            print(f"note: the queue is unknown ({error})")
    left = [n for n, state in found.items() if state not in (FINISHED, RUNNING) and n not in waiting]
    print(f"sweep {points.name}: {len(points.points)} points in {options.folder} ({counted(found)})", flush=True)
    if busy := [n for n, state in found.items() if n in waiting or state == RUNNING]:
        print(f"   elements that wait or run are left alone: {', '.join(map(str, busy))}")
    if not left:
        print("   nothing to start")
        return
    settings = points.differing()
    if options.dry_run:
        for point, differs in zip(points.points, settings, strict=True):
            if point.element in left:
                print(f"   {point.element}  {differs}  ->  {point.folder}")
    if options.launcher == "local":
        _here(options, points, left)
    elif options.launcher == "slurm":
        _in_slurm(options, points, left)
    else:
        from magihuman.sweep.agents import write_sweep

        path = write_sweep(points, options.folder, options.again, left)
        print(f"   wrote {path}; start it with\n   wandb sweep {path}")
        print(
            "   wandb agent --count 1 ENTITY/PROJECT/ID     # once per element, on any machine that shares this folder"
        )


def _here(options: SweepCommand, points: "Points", left: Sequence[int]) -> None:
    """One after the other, each in a process of its own."""
    from magihuman.multirun import run_job
    from magihuman.sweep.table import FINISHED, states, table

    if options.dry_run:
        return
    settings = points.differing()
    for count, number in enumerate(left, 1):
        print(
            f"== element {number} ({count} of {len(left)}): {settings[number]} -> {points.element(number).folder}",
            flush=True,
        )
        run_job([sys.executable, "-m", "magihuman.sweep", *options.again, f"element={number}"], f"element {number}")
    found = states(points)
    print(table(points, found))
    if failed := [n for n in left if found[n] != FINISHED]:
        raise UserError(
            f"{len(failed)} of {len(left)} elements have not finished ({', '.join(map(str, failed))}); their messages are "
            "above, and the same command runs them again"
        )


def _in_slurm(options: SweepCommand, points: "Points", left: Sequence[int]) -> None:
    """Write the array, and submit it."""
    from magihuman.sweep.array import submit, write_array
    from magihuman.sweep.element import mark_queued, restore

    path = write_array(points, options.folder, left, options.again, options.sbatch, options.parallel)
    if options.dry_run:
        print(f"   wrote {path}; submit it with: sbatch {shlex.quote(str(path))}")
        return
    before = [mark_queued(points, points.element(number)) for number in left]  # before a training can begin
    try:
        job = submit(path)
    except BaseException:
        for record in before:
            restore(record)
        raise
    print(f"   submitted {path} as job {job}: elements {', '.join(map(str, left))}")
    print(f"   python -m magihuman.sweep {shlex.join(options.again)} status")


if __name__ == "__main__":
    main()
