"""Time on a device: events between stages of a GPU's stream, the processor's clock elsewhere."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

UNSTEADY = 0.03
"""Coefficient of variation above which a measurement is marked."""


def spread(seconds: Sequence[float]) -> dict[str, float | int]:
    """Median, extremes, coefficient of variation and number of measurements.

    Raises:
        ValueError: none given.
    """
    if not seconds:
        raise ValueError("nothing was measured")
    mean = statistics.fmean(seconds)
    varied = statistics.stdev(seconds) / mean if len(seconds) > 1 and mean else 0.0
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "cv": round(varied, 4),
        "n": len(seconds),
    }


def synchronise(device: torch.device) -> None:
    """Wait for all that the device was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def waits(device: torch.device) -> Iterator[list[str]]:
    """Where the host waits for a GPU inside of this, as torch sees it: `file:line` for each time, known at the end."""
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    usual: Any = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(usual)
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            found.append(f"{warning.filename.rpartition('site-packages/')[2]}:{warning.lineno}")


class Stopwatch:
    """Times of one request's stages. On a GPU nothing waits for the device before `finish`.

    Args:
        device: where the stages run.

    Attributes:
        worked: seconds of processor time by stage, where the processor computes: unlike those of the clock they do not
            grow when other programs share it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any, Any]] = []
        self.worked: dict[str, float] = {}
        synchronise(device)
        self._start = time.perf_counter()

    @contextmanager
    def stage(self, name: str, host: bool = False) -> Iterator[None]:
        """Time what is inside.

        Args:
            host: it is the processor's work and wants what was computed before: wait for that first, and do not
                count the waiting.
        """
        if host:
            synchronise(self.device)
        begin, worked = self._now(host), time.process_time()
        yield
        self._marks.append((name, begin, self._now(host)))
        if self.device.type == "cpu":
            self.worked[name] = self.worked.get(name, 0.0) + time.process_time() - worked

    def finish(self) -> dict[str, float]:
        """Seconds by name, and of everything since the start as `request`."""
        synchronise(self.device)
        total = time.perf_counter() - self._start
        times: dict[str, float] = {}
        for name, begin, end in self._marks:
            seconds = begin.elapsed_time(end) / 1000 if hasattr(begin, "elapsed_time") else end - begin
            times[name] = times.get(name, 0.0) + seconds
        return {**times, "request": total}

    def _now(self, host: bool) -> Any:
        if host or self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


@contextmanager
def timed_calls(
    modules: Mapping[str, torch.nn.Module], device: torch.device
) -> Iterator[dict[str, list[float]]]:
    """Seconds of every call of these modules inside of this, by name; known at the end.

    Nothing waits for a GPU before the end. The modules may be views that share their hooks.
    """
    marks: dict[str, list[list[Any]]] = {name: [] for name in modules}
    found: dict[str, list[float]] = {}

    def now() -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def begin(name: str) -> Callable[..., None]:
        return lambda module, *_: marks[name].append([now()]) if module is modules[name] else None

    def end(name: str) -> Callable[..., None]:
        return lambda module, *_: marks[name][-1].append(now()) if module is modules[name] else None

    hooks = [module.register_forward_pre_hook(begin(name)) for name, module in modules.items()]
    hooks += [module.register_forward_hook(end(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    synchronise(device)
    for name, pairs in marks.items():
        seconds = [a.elapsed_time(b) / 1000 if hasattr(a, "elapsed_time") else b - a for a, b in pairs]
        found[name] = [round(value, 6) for value in seconds]


def time_call(
    function: Callable[[], object],
    device: torch.device,
    *,
    warm: int = 2,
    least: int = 5,
    most: int = 50,
    budget: float = 0.3,
) -> dict[str, float | int]:
    """Spread of a call's seconds; on a CPU also the median of the processor time.

    Args:
        warm: calls before; least, most: timed ones; budget: seconds after which no more than `least` are made.
    """
    for _ in range(warm):
        function()
    synchronise(device)
    seconds: list[float] = []
    worked: list[float] = []
    while len(seconds) < least or (len(seconds) < most and sum(seconds) < budget):
        watch = Stopwatch(device)
        with watch.stage("call"):
            function()
        seconds.append(watch.finish()["call"])
        worked += watch.worked.values()
    return {**spread(seconds), **({"processor_median": statistics.median(worked)} if worked else {})}


def undisturbed(found: Mapping[str, float | int]) -> float:
    """Of a call's spread the seconds to compute rates with: the processor's time where one thread of it computed, which
    other programs do not lengthen; else the clock's median."""
    one = torch.get_num_threads() == 1
    return found["processor_median"] if one and "processor_median" in found else found["median"]


def medians(rows: Sequence[dict[str, float]]) -> dict[str, dict[str, float | int]]:
    """Spread of every stage over requests; of those that ran in all of them."""
    return {name: spread([row[name] for row in rows]) for name in rows[0] if all(name in row for row in rows)}
