"""Times on a device: events of a GPU's stream, or the clock and the processor time of a CPU; kernel times by torch's
profiler; peak rates of the device."""

import gc
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from magihuman.errors import UserError

UNSTEADY = 0.03
"""Coefficient of variation above which a measurement is marked."""


def summary(seconds: Sequence[float]) -> dict[str, float | int]:
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


def free(device: torch.device) -> None:
    """Return memory that nothing refers to any more to the device, and start a new measurement of its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak(device)


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of peak memory.

    The allocator's cache is kept: a timed request does not wait for memory that the pass before it had.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak of allocated and reserved device memory since `reset_peak`, in bytes; empty on a CPU."""
    if device.type != "cuda":
        return {}
    reserved = torch.cuda.max_memory_reserved(device)
    return {"peak_bytes": torch.cuda.max_memory_allocated(device), "reserved_bytes": reserved}


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def host_waits(device: torch.device) -> Iterator[list[str]]:
    """Places where the host waits for a GPU, as torch reports them: `file:line` for each time, complete at the end."""
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
    """Clock of one request's stages. On a GPU nothing waits for the device before `finish`.

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
        """Time the statements inside.

        Args:
            host: the processor's work on results of the device: wait for them first, without counting the waiting.
        """
        if host:
            synchronise(self.device)
        device = torch.device("cpu") if host else self.device
        begin, worked = _now(device), time.process_time()
        yield
        self._marks.append((name, begin, _now(device)))
        if self.device.type == "cpu":
            self.worked[name] = self.worked.get(name, 0.0) + time.process_time() - worked

    def finish(self) -> dict[str, float]:
        """Seconds by name, and of everything since the start as `request`."""
        synchronise(self.device)
        total = time.perf_counter() - self._start
        times: dict[str, float] = {}
        for name, begin, end in self._marks:
            times[name] = times.get(name, 0.0) + _seconds(begin, end)
        return {**times, "request": total}


def _now(device: torch.device) -> Any:
    """An event of a GPU's stream, or the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(begin: Any, end: Any) -> float:
    return begin.elapsed_time(end) / 1000 if hasattr(begin, "elapsed_time") else end - begin


@contextmanager
def timed_calls(modules: Mapping[str, torch.nn.Module], device: torch.device) -> Iterator[dict[str, list[float]]]:
    """Seconds of every call of these modules, by name; complete at the end.

    Nothing waits for a GPU before the end. The modules may be views that share their hooks.
    """
    marks: dict[str, list[Any]] = {name: [] for name in modules}
    found: dict[str, list[float]] = {}

    def mark(name: str) -> Callable[..., None]:
        return lambda module, *_: marks[name].append(_now(device)) if module is modules[name] else None

    hooks = [module.register_forward_pre_hook(mark(name)) for name, module in modules.items()]
    hooks += [module.register_forward_hook(mark(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    synchronise(device)
    for name, times in marks.items():
        found[name] = [round(_seconds(*pair), 6) for pair in zip(times[::2], times[1::2], strict=True)]


def time_call(
    function: Callable[[], object],
    device: torch.device,
    *,
    warm: int = 2,
    least: int = 5,
    most: int = 50,
    budget: float = 0.3,
) -> dict[str, float | int]:
    """Summary of a call's seconds; on a CPU also the median of the processor time.

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
    return {**summary(seconds), **({"processor_median": statistics.median(worked)} if worked else {})}


def undisturbed(found: Mapping[str, float | int]) -> float:
    """Seconds to compute rates with: the processor's time where one thread of it computed, which other programs do not
    lengthen; else the clock's median.

    Args:
        found: of `time_call`.
    """
    one = torch.get_num_threads() == 1
    return found["processor_median"] if one and "processor_median" in found else found["median"]


def summaries(rows: Sequence[dict[str, float]]) -> dict[str, dict[str, float | int]]:
    """Summary of every stage over requests; of those that ran in all of them."""
    return {name: summary([row[name] for row in rows]) for name in rows[0] if all(name in row for row in rows)}


def device_of(name: str) -> torch.device:
    """The device called `name`; auto is the GPU where there is one.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"device={name} is unknown; choose one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no GPU; use device=cpu with size=tiny or size=layer")
    # With its number, as tensors name it: layouts are kept by device.
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


# -- peak rates

_SIDE = {"cuda": 8192, "cpu": 1024}
_COPIED = {"cuda": 1 << 31, "cpu": 1 << 27}  # bytes


def peak_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """10^12 FLOP/s of a square product in `dtype`, and 10^12 bytes per second of a copy, reads and
    writes together; the best of several, or by the processor's time."""
    side = _SIDE[device.type]
    generator = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    product = time_call(lambda: a @ b, device)
    source = torch.randn(_COPIED[device.type] // 4, generator=generator, device=device)
    target = torch.empty_like(source)
    copied = time_call(lambda: target.copy_(source), device)
    return {
        "side": side,
        "tflops": float(f"{2 * side**3 / min(product['min'], undisturbed(product)) / 1e12:.4g}"),
        "copy_tbps": float(f"{2 * _COPIED[device.type] / min(copied['min'], undisturbed(copied)) / 1e12:.4g}"),
    }


# -- profile

KINDS = {
    # Order matters: attention kernels have "gemm" and "cutlass" in some of their names.
    "attention": re.compile(r"attention|sdpa|fmha|flash", re.I),
    "products": re.compile(r"gemm|nvjet|cutlass|cublas|matmul|::mm|addmm|bmm|linear", re.I),
    "pointwise": re.compile(r"triton_|elementwise|vectorized|reduce|copy|memcpy|cat|softmax|norm", re.I),
}
"""Kinds of kernels by their names, in cuBLAS, cuDNN, FlashAttention and Inductor."""

_SHOWN = 20


def kind_of(name: str) -> str:
    """products, attention, pointwise or other."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "other")


def profile_pass(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Kernel times of one call.

    Returns:
        `wall`, seconds of the call by the host's clock, profiled; `kinds`, seconds of all kernels by kind, and `idle`,
        what is left of `wall`; `kernels`, the longest by name with calls and seconds.

    Raises:
        RuntimeError: the profiler saw no kernel, as where CUPTI is missing.
    """
    activity = torch.profiler.ProfilerActivity
    gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[activity.CUDA if gpu else activity.CPU]) as profiler:
        start = time.perf_counter()
        call()
        synchronise(device)
        wall = time.perf_counter() - start
    found = []
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
        if microseconds > 0:
            found.append({"name": event.key[:120], "calls": event.count, "seconds": microseconds / 1e6})
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    kinds = dict.fromkeys((*KINDS, "other"), 0.0)
    for kernel in found:
        kinds[kind_of(kernel["name"])] += kernel["seconds"]
    kinds["idle"] = max(0.0, wall - sum(kinds.values()))
    longest = sorted(found, key=lambda kernel: -kernel["seconds"])[:_SHOWN]
    return {
        "wall": round(wall, 6),
        "kinds": {kind: round(seconds, 6) for kind, seconds in kinds.items()},
        "kernels": [{**kernel, "seconds": round(kernel["seconds"], 6)} for kernel in longest],
    }
