"""Everything that a GPU is to be asked, in order of value, within a limit of time: `python -m inference.latency suite`.

Every step is a process of its own with its own limit: one that fails, hangs or runs out of memory ends alone. Each
writes its result when it is done, and the list of steps is written after each, so that what is there when time is up
is whole; started again with the same output, the command does what is missing.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.latency.records import FOLDER
from magihuman.errors import UserError
from magihuman.provenance import write_atomically

REPO = Path(__file__).resolve().parents[2]
STATE = Path("suite") / "steps.json"
STOPPED = "stopped after"
_MARGIN = 5.0  # seconds to stop a step in
_NEEDED = 0.9
_PATIENCE = 300.0  # seconds that a step may take beyond those expected


@dataclass(frozen=True)
class Step:
    """One command of `inference.latency`.

    Attributes:
        minutes: expected; it is not started with less time left than nine tenths of this. A step is stopped five
            minutes after it should have been done.
    """

    name: str
    command: str
    minutes: float


# Static: the two stages share one network here, and torch would make its second geometry's shapes symbolic.
RELEASED = (
    Step("products", "micro size=256p what=products,experts", 0.8),
    Step("attention", "micro size=256p what=attention", 0.4),
    Step("256p fast", "measure size=256p tier=fast options=compile=static budget=15", 2.0),
    Step("256p fp8", "measure size=256p tier=fp8 options=compile=static budget=15", 1.5),
    Step("540p fast", "measure size=540p tier=fast options=compile=static budget=25", 2.7),
    Step("540p fp8", "measure size=540p tier=fp8 options=compile=static budget=25", 2.4),
    # 35 s a request: one to warm up, three timed.
    Step("1080p fast", "measure size=1080p tier=fast options=compile=static warm=1 repeat=3 budget=1", 4.6),
    Step("1080p fp8", "measure size=1080p tier=fp8 options=compile=static warm=1 repeat=3 budget=1", 3.6),
    Step("decoders", "decode repeat=2", 2.3),
    Step("ladder 256p", "ladder size=256p", 2.0),
    # Refused within seconds where FlashAttention-3 is missing.
    Step("256p fp8 attention", "measure size=256p tier=fp8_attention options=compile=static budget=15", 0.2),
    Step(
        "1080p fp8 attention",
        "measure size=1080p tier=fp8_attention options=compile=static warm=1 repeat=3 budget=1",
        0.2,
    ),
    Step("1080p kernels", "micro size=1080p what=products,attention", 1.2),
    Step("ladder 1080p", "ladder size=1080p rungs=eager,attention warm=1 repeat=1", 1.9),
)
_SHORT = "size=tiny seconds=0.36"
TINY = (
    Step("products", f"micro {_SHORT} what=products,experts", 0.5),
    Step("attention", f"micro {_SHORT} what=attention", 0.5),
    Step("tiny", f"measure {_SHORT} tier=reference,fast steps=1 sr_steps=1 repeat=2 warm=1 budget=0.1", 1.0),
    Step("tiny fp8", f"measure {_SHORT} tier=fp8 steps=1 sr_steps=1 repeat=1 warm=1 budget=0.1", 1.0),
    Step("decoders", f"decode {_SHORT} repeat=1", 1.0),
    Step("ladder", f"ladder {_SHORT} warm=1 repeat=1 options=compile=off", 1.0),
)
PLANS = {"released": RELEASED, "tiny": TINY}


def suite(
    plan: str = "released",
    minutes: float = 25.0,
    steps: str | None = None,
    isolate: bool = True,
    again: bool = False,
    output: str | None = None,
) -> str:
    """Do all measurements in order of value, as many as there is time for, and say what became of each.

    Where a command may not last so long, start it several times with the same output: it does what is missing, then
    what failed.

    Args:
        plan: released, or tiny for a CPU
        minutes: after which nothing is started, and what runs is stopped
        steps: names of some of the steps, separated by commas
        isolate: every step in a process of its own
        again: also steps that are done
        output: folder for the results instead of inference/results/latency

    Raises:
        UserError: a setting that cannot be.
    """
    if plan not in PLANS:
        raise UserError(f"plan={plan} is unknown; choose one of {', '.join(PLANS)}")
    if not 0 < minutes < 1000:
        raise UserError(f"minutes={minutes:g} is impossible; give a number above 0")
    chosen = _chosen(PLANS[plan], steps)
    folder = FOLDER if output is None else Path(output)
    deadline = time.monotonic() + 60 * minutes
    state = _Kept(folder, plan)
    for step in sorted(chosen, key=state.failed):
        if state.done(step) and not again:
            continue
        left = deadline - time.monotonic()
        if left < _NEEDED * 60 * step.minutes:
            reason = f"{max(0, left):.0f} s left, it takes about {60 * step.minutes:.0f}"
            state.keep(step, "skipped", reason, 0.0)
            continue
        print(f"== {step.name}: {step.command}", flush=True)
        start = time.monotonic()
        expected = 60 * step.minutes
        limit = min(expected + _PATIENCE, left - _MARGIN)
        reason = _apart(step, folder, limit) if isolate else _here(step, folder)
        status = "failed" if reason else "done"
        if reason.startswith(STOPPED) and limit < 1.5 * expected:
            status = "skipped"  # it had hardly more time than expected; the next call begins with it
        state.keep(step, status, reason, time.monotonic() - start)
    return state.report(chosen)


def _chosen(plan: tuple[Step, ...], names: str | None) -> list[Step]:
    if names is None:
        return list(plan)
    wanted = [name.strip() for name in names.split(",")]
    known = {step.name: step for step in plan}
    for name in wanted:
        if name not in known:
            raise UserError(f"steps={name} is unknown; choose from {', '.join(known)}")
    return [known[name] for name in wanted]


def _apart(step: Step, folder: Path, limit: float) -> str:
    """Run a step in a process of its own; why it failed, or nothing."""
    command = [
        sys.executable,
        "-m",
        "inference.latency",
        *shlex.split(step.command),
        f"output={folder.absolute()}",
    ]
    logs = folder / STATE.parent
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{step.name.replace(' ', '-')}.log").open("w+") as log:
        process = subprocess.Popen(
            command, cwd=REPO, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started to compile kernels
            process.wait()
            return f"{STOPPED} {limit:.0f} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        log.seek(0)
        lines = [line for line in log.read().splitlines() if line.strip()]
    print("\n".join(lines[-12:]), flush=True)
    if status:
        return f"status {status}: {lines[-1][:300] if lines else 'it said nothing'}"
    return ""


def _here(step: Step, folder: Path) -> str:
    from inference.latency.__main__ import COMMANDS
    from magihuman.command import settings

    name, *arguments = shlex.split(step.command)
    try:
        print(
            COMMANDS[name](**settings(COMMANDS[name], [*arguments, f"output={folder}"], "suite")), flush=True
        )
    except Exception as error:  # whatever a step does, the others are not to suffer
        return f"{type(error).__name__}: {str(error)[:300]}"
    return ""


class _Kept:
    """What became of every step, on disk."""

    def __init__(self, folder: Path, plan: str) -> None:
        self.path = folder / STATE
        self.plan = plan
        self.steps: dict[str, dict[str, Any]] = {}
        try:
            values = json.loads(self.path.read_text())
            self.steps = values["steps"] if values["plan"] == plan else {}
        except (OSError, ValueError, KeyError, TypeError):
            pass  # a first run, or a folder of something else

    def done(self, step: Step) -> bool:
        return self.steps.get(step.name, {}).get("status") == "done"

    def failed(self, step: Step) -> bool:
        return self.steps.get(step.name, {}).get("status") == "failed"

    def keep(self, step: Step, status: str, reason: str, seconds: float) -> None:
        values = {"status": status, "seconds": round(seconds, 1), "command": step.command}
        self.steps[step.name] = {**values, **({"reason": reason} if reason else {})}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps({"plan": self.plan, "steps": self.steps}, indent=1) + "\n")
        if status != "done":
            print(f"   {status}: {reason}", flush=True)

    def report(self, chosen: list[Step]) -> str:
        lines = []
        for step in chosen:
            values = self.steps[step.name]
            reason = f"  {values['reason']}" if "reason" in values else ""
            lines.append(f"{step.name:<22}{values['status']:<9}{values['seconds']:>7.1f} s{reason}")
        return "\n".join([*lines, f"results in {self.path.parents[1]}"])
