"""Training on the CPU: memory allocation and threads, and whether bf16 is slow here."""

import ctypes
import os
import time

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
_GB = 1 << 30


def tune_cpu(threads: int | None) -> None:
    """Make CPU training faster without changing a number: keep freed memory, use large pages, fix the threads.

    Activations are freed and allocated anew in every step. glibc returns large blocks to the system at once,
    and getting them back costs page faults, which took over a quarter of a small model's step.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((_MMAP_THRESHOLD, _GB), (_TRIM_THRESHOLD, 4 * _GB - 1), (_TOP_PAD, _GB // 16)):
            libc.mallopt(option, ctypes.c_int(min(value, 2**31 - 1)))
    except (OSError, AttributeError):
        pass  # not glibc
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def take_threads_of(processes: int) -> None:
    """Use the threads of all `processes` of a training on this machine, once the others have ended.

    Lightning gives each a share of the cores, and writes it into OMP_NUM_THREADS, which limits other libraries too. A process
    that Slurm binds to its own cores has no others.
    """
    import torch

    own = torch.get_num_threads()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else processes * own
    threads = max(own, min(processes * own, allowed))
    torch.set_num_threads(threads)
    if "OMP_NUM_THREADS" in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def bf16_slowdown() -> float:
    """How many times longer a matrix product takes in bf16 than in fp32 on this CPU, measured in about 0.05 s.

    Below 1 on CPUs with AVX512-BF16 or AMX; without them torch's kernels are many times slower.
    """
    import torch
    import torch.nn.functional as F

    def seconds(dtype: torch.dtype) -> float:
        x, weight = (torch.ones(1024, 256, dtype=dtype), torch.ones(1024, 256, dtype=dtype))  # as in the tiny network
        times = []
        for _ in range(3):
            start = time.perf_counter()
            F.linear(x, weight)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) / seconds(torch.float32)
