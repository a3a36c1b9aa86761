"""Benchmark run of steps within a time budget: each result is on disk as soon as it is known.

A GPU that is rented or lent by the minute can be gone at any moment. So a run is one process that works through a list
of steps in order of value and appends one JSON line per result to one file. A step is skipped when less time is left
than it is expected to take; a step that fails is a line with its reason, and the next one starts.

File format (`magihuman-benchmark/1`), one JSON object per line:
    {"format", "command", "dry", "minutes", "provenance"}          first line of a run; a file may hold several runs
    {"step", "status": "run", "at", ...}                           one repetition of a step that is still going on
    {"step", "status": "done" | "failed" | "skipped", "at", "seconds", ...}
`at` is in seconds since the start of the run.
"""

import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from inference.benchmark import result_files
from inference.benchmark.timers import device_of, peak_memory, peak_rates, reset_peak
from magihuman.errors import UserError

FORMAT = "magihuman-benchmark/1"
_PATIENCE = 3.0  # a step is interrupted when it takes this many times the expected seconds ...
_GRACE = 20.0  # ... and this many seconds more
TRACE = 4000  # characters of a traceback that are kept: its end names the failing call

CPU = torch.device("cpu")
Values = dict[str, Any]


class StepTimeout(BaseException):
    """A step took much longer than expected, or the budget ended.

    Not an `Exception`: what handles the failure of a kernel or a library must not take this for one.
    """


@dataclass(frozen=True)
class Step:
    """One measurement.

    Attributes:
        name: unique in the run.
        seconds: expected duration on an H100; the step is skipped when less time is left.
        run: measures, and returns the values of the result line.
        needs: names of steps that must have succeeded before.
        wants: names of steps that belong to it, so that they run too where steps are chosen by name; it goes on without
            them where they fail.
        most: seconds that its repetitions may take together; None is `seconds`.
    """

    name: str
    seconds: float
    run: Callable[[], Values]
    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()
    most: float | None = None

    @property
    def longest(self) -> float:
        """Expected duration with all repetitions."""
        return self.seconds if self.most is None else max(self.seconds, self.most)


class BudgetedRun:
    """Clock, budget and files of a run.

    Args:
        folder: gets NAME.jsonl and NAME.log, appended to.
        name: of the files.
        seconds: time budget, counted from now.
        device: whose peak memory becomes part of each result line.
        clock: monotonic seconds; tests give a simulated one.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        seconds: float,
        device: torch.device = CPU,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.results, self.log = folder / f"{name}.jsonl", folder / f"{name}.log"
        self.seconds, self.device, self.clock = seconds, device, clock
        self.status: dict[str, str] = {}
        self._summary: dict[str, str] = {}
        self._start = clock()
        self._now: Step | None = None
        self._cut_line = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.results.exists() and not self.results.read_bytes().endswith(b"\n"):
                self._cut_line = self.results.stat().st_size > 0
            _append(self.log, "")
        except OSError as error:
            raise UserError(f"output={folder} cannot be written: {error.strerror or error}") from error

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.clock() - self._start

    @property
    def left(self) -> float:
        """Seconds until the budget ends."""
        return self.seconds - self.elapsed

    def header(self, command: str, dry: bool, provenance: Mapping[str, Any]) -> None:
        """Write the first line of the run."""
        line = {"format": FORMAT, "command": command, "dry": dry, "minutes": round(self.seconds / 60, 3)}
        if self._cut_line:  # an earlier run was killed while it wrote: end its incomplete line
            _append(self.results, "\n")
        _append(self.results, json.dumps({**line, "provenance": dict(provenance)}) + "\n")
        self.say(f"{command}: {provenance.get('machine')}, results in {self.results}")

    def add(self, step: str, status: str, **values: Any) -> None:
        """Append a line.

        Raises:
            ValueError: a number that is not finite.
        """
        line = {"step": step, "status": status, "at": round(self.elapsed, 2), **values}
        _append(self.results, json.dumps(line, allow_nan=False) + "\n")

    def progress(self, **values: Any) -> None:
        """Append one repetition of the step that is running."""
        assert self._now is not None
        self.add(self._now.name, "run", **values)

    def say(self, text: str) -> None:
        """Print a line, and keep it in the log."""
        line = f"{self.elapsed:7.1f} s  {text}"
        print(line, flush=True)
        _append(self.log, line + "\n")

    def run(self, steps: Sequence[Step]) -> str:
        """Run the steps in order; returns a table with the status of each."""
        for step in steps:
            self._do(step)
        return self.report(steps)

    def _do(self, step: Step) -> None:
        missing = [name for name in step.needs if self.status.get(name) != "done"]
        if missing:
            return self._end(step, "skipped", 0.0, reason=f"it needs the step {missing[0]!r}")
        if self.left < step.seconds:
            reason = f"{max(0.0, self.left):.0f} s left, it takes about {step.seconds:g} s"
            return self._end(step, "skipped", 0.0, reason=reason)
        self._now, start = step, self.clock()
        self.say(f"{step.name}: started, {self.left:.0f} s left")
        try:
            reset_peak(self.device)
            with _time_limit(min(_PATIENCE * step.longest + _GRACE, self.left)):
                values = step.run()
            self._end(step, "done", self.clock() - start, **values, **peak_memory(self.device))
        except (Exception, StepTimeout) as error:
            # Drivers, compilers and kernels fail in many ways; the other steps still count.
            reason = f"{type(error).__name__}: {str(error).strip()}"[:2000]
            trace = traceback.format_exc()[-TRACE:]
            self._end(step, "failed", self.clock() - start, reason=reason, trace=trace)
        return None

    def _end(self, step: Step, status: str, seconds: float, **values: Any) -> None:
        self.add(step.name, status, seconds=round(seconds, 2), **values)
        reason = values.get("reason", "").partition("\n")[0][:160]
        self.status[step.name] = status
        self._summary[step.name] = f"{status:<9}{seconds:>7.1f} s  {reason}".rstrip()
        self.say(f"{step.name}: {status}" + (f" in {seconds:.1f} s" if status == "done" else f": {reason}"))

    def repeat(self, most: int) -> Iterator[int]:
        """Numbers of repetitions inside a step: at least one, and more only while they fit into `Step.longest` (so that
        one slow step does not take the time of those after it) and into the budget."""
        assert self._now is not None
        begin = self.clock()
        for number in range(most):
            start = self.clock()
            yield number
            last, spent = self.clock() - start, self.clock() - begin
            if spent + last > self._now.longest or last > self.left:
                return

    def report(self, steps: Sequence[Step]) -> str:
        """Every step with its status, seconds, and the reason where there is no result."""
        width = 2 + max(len(step.name) for step in steps)
        lines = [f"{step.name:<{width}}{self._summary[step.name]}" for step in steps]
        return "\n".join([*lines, f"results in {self.results}"])


@dataclass
class RecordedRun:
    """One run as recorded on disk.

    Attributes:
        header: the first line; steps: last line of each finished step, by name; runs: "run" lines by step, in order.
        whole: False where the last line is incomplete, as after a kill; that line is left out.
    """

    header: Values
    steps: dict[str, Values] = field(default_factory=dict)
    runs: dict[str, list[Values]] = field(default_factory=dict)
    whole: bool = True

    def done(self, step: str) -> Values | None:
        """The result line of a step that succeeded."""
        line = self.steps.get(step)
        return line if line is not None and line["status"] == "done" else None


def read_runs(path: Path) -> list[RecordedRun]:
    """The runs of a results file, oldest first; lines that a kill left incomplete are skipped.

    Raises:
        UserError: it cannot be read, or is not such a file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    runs: list[RecordedRun] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError:
            if runs:
                runs[-1].whole = False
            continue
        if not isinstance(values, dict) or ("step" in values) == ("format" in values):
            raise UserError(f"{path}, line {number}: not a line of {FORMAT}")
        if "format" in values:
            if values["format"] != FORMAT:
                raise UserError(f"{path}, line {number}: its format is {values['format']!r}, not {FORMAT}")
            runs.append(RecordedRun(values))
        elif not runs:
            raise UserError(f"{path} does not begin with the header of {FORMAT}; send the whole file")
        elif values["status"] == "run":
            runs[-1].runs.setdefault(values["step"], []).append(values)
        else:
            runs[-1].steps[values["step"]] = values
    if not runs:
        raise UserError(f"{path} holds no run of {FORMAT}")
    return runs


def choose(steps: Sequence[Step], names: str | None) -> list[Step]:
    """Some of the steps by name, and all that they need or want; None for all.

    Raises:
        UserError: an unknown name, with the choices.
    """
    if names is None:
        return list(steps)
    known = {step.name: step for step in steps}
    wanted: set[str] = set()
    pending = [name.strip() for name in names.split(",") if name.strip()]
    while pending:
        name = pending.pop()
        if name not in known:
            raise UserError(f"steps={name} is unknown; choose from {', '.join(known)}")
        if name not in wanted:
            wanted.add(name)
            pending += [*known[name].needs, *known[name].wants]
    if not wanted:
        raise UserError("steps= names no step; leave it out to run all")
    return [step for step in steps if step.name in wanted]


def _append(path: Path, text: str) -> None:
    """Append in one write and flush to disk, so that a kill loses at most the line being written."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, text.encode())
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `StepTimeout` in here after that many seconds of real time, as soon as Python code runs again; and again
    after as many more, for code that catches the first one and goes on."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield  # signals reach the main thread only
        return

    def stop(*_: Any) -> None:
        raise StepTimeout(f"stopped after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds), max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# -- a benchmark on a device


class Bench:
    """A benchmark: a device and the steps that measure it.

    Args:
        device: where the networks run.
        dry: tiny networks, in fp32.

    Attributes:
        run: time budget and result files; set before the first step.
    """

    run: BudgetedRun

    def __init__(self, device: torch.device, dry: bool) -> None:
        self.device, self.dry = device, dry
        self.dtype = torch.float32 if dry else torch.bfloat16

    def steps(self) -> list[Step]:
        """All steps in order of value, with the seconds that each should take on an H100: assumed until measured."""
        raise NotImplementedError

    def peaks(self) -> Values:
        """Peak rates of the device: one large matrix product and one large copy."""
        return {"roof": peak_rates(self.device, self.dtype)}


def run_benchmark(
    command: str,
    make_bench: Callable[[torch.device, bool], Bench],
    minutes: float,
    dry: bool,
    steps: str | None,
    folder: Path,
) -> str:
    """Run a benchmark's steps within the time budget; returns the status of each.

    Args:
        command: name of the command and of its files in `folder`.
        make_bench: takes the device and `dry`; the other settings are those of `suite`.

    Raises:
        UserError: as `suite`.
    """
    if not 0 < minutes < 1000:
        raise UserError(f"minutes={minutes:g} is impossible; give a number above 0 and below 1000")
    if not dry and not torch.cuda.is_available():
        raise UserError(f"torch finds no GPU; `{command} dry=true` runs the same steps with a tiny network on the CPU")
    bench = make_bench(device_of("cpu" if dry else "cuda"), dry)
    chosen = choose(bench.steps(), steps)
    bench.run = BudgetedRun(folder, command, 60 * minutes, bench.device)
    bench.run.header(command, dry, result_files.provenance(bench.device))
    return f"{bench.run.run(chosen)}\nnext: python -m inference.benchmark collect input={bench.run.results}"
