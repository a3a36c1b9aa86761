"""Where the time of a training goes: waits for data, slow processes by name, a trace of a few steps."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import PassThroughProfiler

SLOW_LOADER = 0.3
"""Share of the wall time spent waiting for data from which the loader is named."""
SLOW_PROCESS = (1.3, 0.1)
"""A process is named if it takes this many times the median, and the difference is at least this share of the wall time."""


class LoaderTimer(PassThroughProfiler):
    """Lightning profiler that measures the waits for the training's batches, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self._since = 0.0
        self._seconds = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith(".train_dataloader_next"):
            self._since = time.monotonic()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(".train_dataloader_next"):
            self._seconds += time.monotonic() - self._since

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class ForwardTimer:
    """Time from the start of a batch to its first backward pass, in which no process of DDP waits for another.

    With sharded strategies the forward pass waits, too: there only slow loaders tell processes apart.
    """

    def __init__(self) -> None:
        self._started: Any = None
        self._done: list[Any] = []

    def _now(self, device: torch.device) -> Any:
        if device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # the CPU runs ahead of the GPU
        event.record()
        return event

    def start(self, device: torch.device) -> None:
        """A batch begins."""
        self._started = self._now(device)

    def stop(self, device: torch.device) -> None:
        """A backward pass begins; only the first of a batch counts."""
        if self._started is not None:
            self._done.append((self._started, self._now(device)))
            self._started = None

    def take(self) -> float:
        """Seconds since the last call; waits for the GPU."""
        done, self._done = self._done, []
        if done and not isinstance(done[-1][1], float):
            done[-1][1].synchronize()
            return sum(start.elapsed_time(end) for start, end in done) / 1000
        return sum(end - start for start, end in done)


class SlowParts:
    """Names a loader or a process that the training waits for, at most every `PAUSE` seconds.

        slow = SlowParts(hosts=["node1", "node2"], workers=4)
        slow.add([[1.0, 0.6, 0.2], [1.0, 0.0, 0.2]])    # lines to print, after `WINDOW` seconds

    Args:
        hosts: of each process; workers: of each process's loader.
    """

    WINDOW = 20.0
    PAUSE = 600.0

    def __init__(self, hosts: Sequence[str], workers: int | None) -> None:
        self.hosts = hosts
        self.workers = workers
        self._sums = [[0.0, 0.0, 0.0] for _ in hosts]
        self._pause = 0.0

    def add(self, table: Sequence[Sequence[float]]) -> list[str]:
        """Count seconds per process [wall, waiting for data, forward]; what is slow where it is time to say so."""
        self._sums = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(self._sums, table, strict=True)]
        wall = self._sums[0][0]
        if wall < self.WINDOW + self._pause:
            return []
        sums, self._sums = self._sums, [[0.0, 0.0, 0.0] for _ in self.hosts]
        found = slow_parts(sums, self.hosts, self.workers)
        self._pause = self.PAUSE if found else 0.0
        return found


def straggler(table: Sequence[Sequence[float]]) -> tuple[int, float]:
    """The slowest process, and its time before it waits for others as a multiple of the median process's.

    Args:
        table: [processes, 3] seconds: wall, waiting for data, forward.
    """
    own = [data + forward for _, data, forward in table]
    rank = max(range(len(own)), key=own.__getitem__)
    return rank, own[rank] / max(1e-9, statistics.median_low(own))


def slow_parts(table: Sequence[Sequence[float]], hosts: Sequence[str], workers: int | None) -> list[str]:
    """A line for a slow process, and one for a slow loader; none where nothing is slow.

    Args:
        table: as in `straggler`.
    """
    found: list[str] = []
    rank, ratio = straggler(table)
    wall, data, forward = table[rank]
    share = (data + forward) / wall * (1 - 1 / max(1.0, ratio))
    if ratio >= SLOW_PROCESS[0] and share >= SLOW_PROCESS[1]:
        why = "waiting for its data" if data > forward else "in the forward pass"
        found.append(
            f"process {rank} ({hosts[rank]}) takes {ratio:.1f} x the median time of a step, mostly {why}; all others wait "
            "for it"
        )
    waits = [row[1] / row[0] for row in table]
    slowest = max(range(len(waits)), key=waits.__getitem__)
    if waits[slowest] >= SLOW_LOADER:
        where = "" if len(table) == 1 else f" of process {slowest} ({hosts[slowest]})"
        now = "" if workers is None else f" (now {workers})"
        found.append(
            f"{100 * waits[slowest]:.0f} % of the time{where} waits for data: raise data.module.num_workers{now}, or put the "
            "shards on a faster disk"
        )
    return found


class Profile(L.Callback):
    """Writes to a folder what a few optimiser steps of the main process do, and trains on (`trainer.profile=true`).

    trace.json.gz (for ui.perfetto.dev), operators.txt, the operators that take longest, and the memory: memory.pickle of
    CUDA's allocator, or memory.txt, the operators that allocate most on a CPU. The training's result is the same.

    Args:
        folder: `profile/` of the run.
    """

    SKIPPED, STEPS = 5, 2
    """Steps after the start that are not typical, and steps that are recorded."""
    ROWS = 40

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._begin = 0
        self._profiler: Any = None
        self._done = False

    def on_train_start(self, trainer: L.Trainer, recipe: Any) -> None:
        left = recipe.max_steps - recipe.step
        self._begin = recipe.step + max(0, min(self.SKIPPED, left - self.STEPS))
        self._done = not trainer.is_global_zero

    def on_train_batch_start(self, trainer: L.Trainer, recipe: Any, batch: Any, batch_idx: int) -> None:
        if self._done or self._profiler is not None or recipe.step < self._begin:
            return
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if recipe.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._profiler = profile(activities=activities, profile_memory=True)
        self._profiler.start()

    def on_train_batch_end(self, trainer: L.Trainer, recipe: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._profiler is None or not recipe.stepped:
            return
        if recipe.step >= self._begin + self.STEPS:
            self._write(recipe)
        else:
            self._profiler.step()

    def on_train_end(self, trainer: L.Trainer, recipe: Any) -> None:
        if self._profiler is not None:  # stopped before
            self._write(recipe)

    def _write(self, recipe: Any) -> None:
        start = time.monotonic()
        profiler, self._profiler, self._done = self._profiler, None, True
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / "trace.json.gz"
        profiler.export_chrome_trace(str(trace))
        averages = profiler.key_averages()
        gpu = recipe.device.type == "cuda"
        operators = averages.table(sort_by=f"self_{'device' if gpu else 'cpu'}_time_total", row_limit=self.ROWS)
        (self.folder / "operators.txt").write_text(operators)
        if gpu:
            memory = self.folder / "memory.pickle"
            torch.cuda.memory._dump_snapshot(str(memory))
            torch.cuda.memory._record_memory_history(enabled=None)
            look = f"python -m torch.cuda._memory_viz trace_plot {memory} -o memory.html"
        else:
            memory = self.folder / "memory.txt"
            memory.write_text(averages.table(sort_by="self_cpu_memory_usage", row_limit=self.ROWS))
            look = f"less {memory}"
        print(
            f"   profile of steps {self._begin + 1} to {recipe.step}: open {trace} in https://ui.perfetto.dev; the largest "
            f"operators: less {self.folder / 'operators.txt'}; the memory: {look}",
            flush=True,
        )
        recipe.spent["profile"] = recipe.spent.get("profile", 0.0) + time.monotonic() - start
