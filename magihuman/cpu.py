"""Settings of the C library and of torch that make CPU training faster and change no number."""

import ctypes
import os
import time

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
_GB = 1 << 30
# Of the product that is timed: like the tiny network's.
_ROWS, _WIDTH, _INNER = 1024, 256, 1024


def tune(threads: int | None) -> None:
    """Keep freed memory in the process and use large pages; optionally fix the number of threads.

    Activations are freed and allocated anew in every step. glibc returns large blocks to the system at once,
    and getting them back costs page faults, which took over a quarter of a small model's step.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((_MMAP_THRESHOLD, _GB), (_TRIM_THRESHOLD, 4 * _GB - 1), (_TOP_PAD, _GB // 16)):
            libc.mallopt(option, ctypes.c_int(min(value, 2**31 - 1)))
    except (OSError, AttributeError):
        pass  # another C library has its own habits
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def bf16_slowdown() -> float:
    """How many times longer a matrix product takes in bf16 than in fp32 on this CPU.

    Below 1 where it has AVX512-BF16 or AMX; without them torch's kernels are many times slower. Takes some hundredths
    of a second.
    """
    import torch
    import torch.nn.functional as F

    def seconds(dtype: torch.dtype) -> float:
        x, weight = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_INNER, _WIDTH, dtype=dtype)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            F.linear(x, weight)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) / seconds(torch.float32)
