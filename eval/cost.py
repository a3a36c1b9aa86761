"""Cost of a command: wall time, CPU time and the memory of all its processes together.

python -m eval.cost output=eval/results/readme_run.json command="python -m magihuman.train +recipe=pretrain"
"""

import resource
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

from eval.output import provenance
from magihuman.errors import UserError
from magihuman.io.files import write_result
from magihuman.io.provenance import portable

INTERVAL = 0.25  # seconds between samples of the memory


def memory(root: int) -> int:
    """Bytes of memory of a process and all below it; pages that several share count once (PSS)."""
    import psutil

    total = 0
    try:
        process = psutil.Process(root)
        family = [process, *process.children(recursive=True)]
    except psutil.Error:  # it has ended
        return 0
    for one in family:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def measure_cost(command: str, output: str) -> dict[str, Any]:
    """Run a command and record its cost.

    Args:
        command: as typed in a shell, without pipes
        output: JSON file of the result

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
    found = {
        "command": portable(command),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_memory_bytes": peak,
        "provenance": provenance(),
    }
    write_result(Path(output), found)
    print(f"{found['seconds']:.0f} s, {cpu:.0f} CPU-seconds, at most {peak / 1e9:.2f} GB; written to {output}")
    return found


if __name__ == "__main__":
    from magihuman.cli import run

    run(measure_cost, "python -m eval.cost")
