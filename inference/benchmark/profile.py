"""Where the time of one forward pass goes: seconds per kind of kernel, by torch's profiler."""

import re
import time
from collections.abc import Callable
from typing import Any

import torch

KINDS = {
    # In this order: attention kernels have "gemm" and "cutlass" in some of their names.
    "attention": re.compile(r"attention|sdpa|fmha|flash", re.I),
    "products": re.compile(r"gemm|nvjet|cutlass|cublas|matmul|::mm|addmm|bmm|linear", re.I),
    "pointwise": re.compile(r"triton_|elementwise|vectorized|reduce|copy|memcpy|cat|softmax|norm", re.I),
}
"""Kinds of kernels by their names, as cuBLAS, cuDNN, FlashAttention and Inductor call them."""

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
        if gpu:
            torch.cuda.synchronize(device)
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
