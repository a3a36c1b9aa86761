"""What a command costs: wall time, CPU time and the memory of all its processes together.

python -m eval.cost output=eval/results/readme_run.json command="python -m magihuman.train +recipe=pretrain"
"""

import json
import resource
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

from eval.report import provenance
from magihuman.errors import UserError
from magihuman.io.files import write_atomically

INTERVAL = 0.25  # seconds between looks at the memory


def _parents() -> dict[int, int]:
    """Process -> parent, of every process on the machine."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold anything; what follows it is plain.
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        found[int(status.parent.name)] = int(fields[1])
    return found


def _family(root: int) -> set[int]:
    parents, family, grew = _parents(), {root}, True
    while grew:
        children = {child for child, parent in parents.items() if parent in family} - family
        family |= children
        grew = bool(children)
    return family


def memory(root: int) -> int:
    """Bytes of memory of a process and all below it; pages that several share count once (PSS)."""
    total = 0
    for process in _family(root):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def measure(command: str, output: str) -> dict[str, Any]:
    """Run a command and record what it cost.

    Args:
        command: as typed in a shell, without pipes
        output: JSON file for the figures

    Returns:
        {"command", "seconds", "cpu_seconds", "peak_memory_bytes", "provenance"}.

    Raises:
        UserError: the command cannot be started, or fails; nothing is written then.
    """
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        process = subprocess.Popen(shlex.split(command))
    except OSError as error:
        raise UserError(f"{command!r} cannot be started: {error.strerror}") from error
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(INTERVAL)
    if process.returncode:
        raise UserError(f"{command!r} failed with status {process.returncode}; its cost is not recorded")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    figures = {
        "command": command,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_memory_bytes": peak,
        "provenance": provenance(),
    }
    file = Path(output)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(figures, indent=1) + "\n")
    print(
        f"{figures['seconds']:.0f} s, {cpu:.0f} CPU-seconds, at most {peak / 1e9:.2f} GB; written to {output}"
    )
    return figures


if __name__ == "__main__":
    from magihuman.cli import run

    run(measure, "python -m eval.cost")
