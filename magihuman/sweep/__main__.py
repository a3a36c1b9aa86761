"""`python -m magihuman.sweep NAME`: several trainings from one file, see SweepOptions."""

import sys

from magihuman import preemption

if __name__ == "__main__":  # before the imports below, as in magihuman.train
    preemption.install()

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from magihuman.cli import errors_in_one_line, option, settings, usage
from magihuman.errors import UserError

if TYPE_CHECKING:
    from magihuman.sweep.points import Points

PROGRAM = "python -m magihuman.sweep NAME"
SUFFIXES = (".yaml", ".yml")


@dataclass
class SweepOptions:
    """Several trainings from one file, configs/sweep/NAME.yaml or a path that ends in .yaml: a grid, a list of points, seeds.

      python -m magihuman.sweep pretrain_lr                                  here, one after the other
      python -m magihuman.sweep pretrain_lr launcher=slurm sbatch='--partition=gpu --time=2:00:00'
      python -m magihuman.sweep pretrain_lr --dry-run                        what would run
      python -m magihuman.sweep pretrain_seeds +recipe=sr name=sr_seeds      another recipe, under another name
      python -m magihuman.sweep pretrain_lr status sort=true                 the table, the best point first

    Run folders are runs/RECIPE/NAME-ELEMENT. The same command again runs what has not finished, and nothing else. Any other
    setting is one of python -m magihuman.train, for all points; +recipe=NAME replaces the file's recipe.
    """

    launcher: Literal["local", "slurm", "wandb"] = option(
        "local, slurm (a job array) or wandb (a sweep for `wandb agent`)", "local"
    )
    sbatch: str | None = option(
        "slurm: options of sbatch, such as '--account=NAME --partition=NAME --time=2:00:00'", None
    )
    parallel: int | None = option("slurm: most elements that run at once; none is all", None)
    dry_run: bool = option("print what would run, and write the file for Slurm or W&B; start nothing", False)
    name: str | None = option("of the sweep; none is the file's", None)
    runs: str = option("folder of all runs; the sweep's own files are in RUNS/sweeps/NAME", "runs")
    element: int | None = option("run this element only, in this process; for the launchers", None)
    sort: bool = option("status: by the metric instead of by element", False)


@dataclass
class SweepCommand(SweepOptions):
    """The command line.

    Attributes:
        file: name or path of the sweep's file; words: settings of all points; status: whether to print the table only.
    """

    file: str = ""
    words: list[str] = field(default_factory=list)
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

            print(f"{usage(SweepOptions, PROGRAM)}\n\nsweeps: {', '.join(available('sweep'))}")
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
    if wrong := next((word for word in rest if word.startswith("-")), None):
        raise UserError(f"there is no option {wrong}; write {wrong.lstrip('-').partition('=')[0]}=VALUE, or --dry-run")
    known = {each.name for each in fields(SweepOptions)}
    own = [word for word in rest if word.partition("=")[0] in known and word not in bare]
    words = [word for word in rest if word not in own and word not in bare]
    command = SweepCommand(**settings(SweepOptions, own, PROGRAM), file=bare[0], words=words, status=len(bare) == 2)
    _check(command)
    return command


def _check(command: SweepCommand) -> None:
    """Raises UserError for options that cannot be, or that nothing would read."""
    for key, least in (("parallel", 1), ("element", 0)):
        if (value := getattr(command, key)) is not None and value < least:
            raise UserError(f"{key}={value} should be a whole number from {least} on")
    if not command.runs:
        raise UserError("runs= is empty; give a folder, or leave it out")
    if command.launcher != "slurm" and (command.sbatch or command.parallel):
        raise UserError("sbatch= and parallel= are for launcher=slurm")
    if command.sort and not command.status:
        raise UserError("sort= is for status")
    name = command.folder.name
    if "/" in (command.name or "") or name in (".", "..", ""):
        raise UserError(f"name={command.name} is not the name of a folder")
    if "=" in name or name.startswith(("-", "~")) or name.endswith(SUFFIXES) or name == "help":
        raise UserError(f"name={name}: the name of a sweep is a word of its own on the command line; choose another")
    if (command.element is not None or command.status) and command.words:
        raise UserError(f"{' '.join(command.words)}: the points are frozen; settings are given at the start of a sweep")
    for word in command.words:
        if word.lstrip("+").partition("=")[0] in ("folder", "resume"):
            raise UserError(f"{word}: runs of a sweep are <runs>/RECIPE/NAME-ELEMENT; choose name= and runs=")


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
    if options.dry_run:
        for point, differs in zip(points.points, points.differing(), strict=True):
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
    differing = points.differing()
    for count, number in enumerate(left, 1):
        print(
            f"== element {number} ({count} of {len(left)}): {differing[number]} -> {points.element(number).folder}",
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

    path = write_array(points, options.folder, left, options.again, options.sbatch or "", options.parallel)
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
