"""Runs the steps of a benchmark on a device within its time budget: the part that `suite` and `train` share."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from inference.benchmark import result_files
from inference.benchmark.budget import BudgetedRun, Step, choose
from inference.benchmark.measure import device_of
from magihuman.errors import UserError

Values = dict[str, Any]

FOLDER = Path("runs") / "latency"


class Bench:
    """What is measured, and the steps that measure it.

    Args:
        device: where the networks run.
        dry: tiny networks.

    Attributes:
        run: time budget and result files; set before the first step.
    """

    run: BudgetedRun

    def __init__(self, device: torch.device, dry: bool) -> None:
        self.device, self.dry = device, dry

    def steps(self) -> list[Step]:
        """All steps in order of value, with the seconds that each should take on an H100: assumed until measured."""
        raise NotImplementedError

    def reset_peak(self) -> None:
        """Start a new measurement of peak memory.

        The allocator's cache is kept: a timed request does not wait for memory that the pass before it had.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def memory(self) -> Values:
        """Peak of allocated and reserved device memory since `reset_peak`, in bytes; nothing on a CPU."""
        if self.device.type != "cuda":
            return {}
        reserved = torch.cuda.max_memory_reserved(self.device)
        return {"peak_bytes": torch.cuda.max_memory_allocated(self.device), "reserved_bytes": reserved}

    def free(self) -> None:
        """Return memory that nothing refers to any more to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.reset_peak()


def run_benchmark(
    command: str,
    make_bench: Callable[[torch.device, bool], Bench],
    minutes: float,
    dry: bool,
    steps: str | None,
    output: str | None,
) -> str:
    """Run a benchmark's steps within the time budget; returns what became of each.

    Args:
        command: name of the command and of its files.
        make_bench: takes the device and `dry`; the other settings are those of `suite`.

    Raises:
        UserError: as `suite`.
    """
    if not 0 < minutes < 1000:
        raise UserError(f"minutes={minutes:g} is impossible; give a number above 0 and below 1000")
    if not dry and not torch.cuda.is_available():
        raise UserError(
            f"torch finds no GPU; `{command} dry=true` runs the same steps with a tiny network on the CPU"
        )
    device = device_of("cpu" if dry else "cuda")
    bench = make_bench(device, dry)
    chosen = choose(bench.steps(), steps)
    folder = folder_for(output, dry)
    run = BudgetedRun(folder, command, 60 * minutes, before=bench.reset_peak, after=bench.memory)
    bench.run = run
    run.header(command, dry, result_files.provenance(device))
    return f"{run.run(chosen)}\nnext: python -m inference.benchmark collect input={run.results}"


def folder_for(output: str | None, dry: bool) -> Path:
    """Where results go; dry runs never into the folder of real ones, unless that is asked for."""
    if output is not None:
        return Path(output)
    return FOLDER.with_name(f"{FOLDER.name}-dry") if dry else FOLDER
