"""Selects the attention kernel: the fastest one that is correct at the shapes a clip will use.

A kernel that works at one length can fail or give wrong numbers at another: tiles are masked at odd lengths, and cuDNN
makes an execution plan for every shape. So each distinct call (lengths, strides, with or without log-sum-exp) is tested
before the sampling loop. The tests use the strides of the real tensors, so the loop needs no fallback of its own.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from inference.fast.fp8 import FP8
from inference.fast.kernels import Kernel, Output, plain, variants
from magihuman.errors import UserError

_BUILD_FA3 = "build flash-attention/hopper (package flash_attn_interface)"

# Largest relative L2 distance of a query head's output from fp32 attention, and largest difference of log-sum-exps.
_TOLERANCE, _TOLERANCE_FP8, _TOLERANCE_SUMS = 0.02, 0.12, 0.02

_LARGEST_AVERAGE = 8.0
"""Attention averages values; a trial's are standard normal, of which none of 10^14 lies beyond this."""

_STEPS = 0.02, 0.1, 0.02
"""Value of one unit of an 8-bit trial's q, k and v: e4m3 ends at 448 units."""

_LARGE_KEYS, _KEY_SCALE = 3, 2.0
"""The last keys of a trial are larger by this factor, so that a missing one of 65,746 changes the output measurably."""

_CHUNK = 4096
"""Rows of a trial's inputs drawn in fp32 at a time."""


class Call(NamedTuple):
    """Shapes and strides of one call of a kernel, for a trial.

    Attributes:
        samples, queries, keys: q is [samples, queries, Hq, D], k and v are [samples, keys, Hkv, D].
        strides: of q, k and v in elements; None for contiguous tensors.
    """

    samples: int
    queries: int
    keys: int
    want_lse: bool
    strides: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None


class Choice(NamedTuple):
    """A kernel that passed its trials, and why those before it in the order of preference were passed over."""

    kernel: Kernel
    passed_over: tuple[str, ...]


SMALL = Call(1, 193, 331, True)
"""A first trial where the real lengths are not known yet; both are odd."""


def choose(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    shared: int,
    dim: int,
    calls: Sequence[Call] = (SMALL,),
) -> Choice:
    """The kernel of that name, or for "auto" the fastest that is right in all these calls on this device.

    Args:
        dtype: of q, k, v (before they are made 8-bit); heads, shared: query and key heads.
        calls: to try it in; without a GPU "auto" is not tried.

    Warns:
        UserWarning: a kernel that would be faster failed a trial, with the reason.

    Raises:
        UserError: it cannot run here, with the reason and what to use instead.
        torch.OutOfMemoryError: no memory for a trial, which says nothing about the kernel.
    """
    if name == "auto" and not needs_trials(device):
        return Choice(variants(name)[0], ())
    passed_over: list[str] = []
    failed: list[str] = []
    candidates: tuple[str, ...] = (name,)
    if name == "auto":  # the fastest first
        candidates = ("fa3", "cudnn", "flash2", "sdpa") if dtype == torch.bfloat16 else ("sdpa",)
    for candidate in candidates:
        reason = refusal(candidate, device, dtype)
        if reason is not None:
            if name != "auto":
                raise UserError(f"attention={name} cannot run here: {reason}")
            passed_over.append(f"{candidate}: {reason}")
            continue
        for kernel in variants(candidate):
            trials = (probe(kernel, device, dtype, heads, shared, dim, call) for call in calls)
            reason = next((found for found in trials if found is not None), None)
            if reason is None:
                if failed:  # not for kernels that are merely not installed
                    text = f"attention uses the kernel {kernel.name}; faster ones failed: {'; '.join(failed)}"
                    warnings.warn(text, stacklevel=2)
                return Choice(kernel, tuple(passed_over))
            failed.append(f"{kernel.name}: {reason}")
            passed_over.append(failed[-1])
    remedy = {"auto": "tier=exact", "fp8": "tier=fp8"}.get(name, "attention=auto")
    raise UserError(f"attention={name} cannot run here: {'; '.join(passed_over)}; use {remedy}")


def needs_trials(device: torch.device) -> bool:
    """Whether kernels are tried at real lengths: on a CPU a trial takes as long as the call itself."""
    return device.type == "cuda"


def refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel cannot run on this device, or None; looks at versions only."""
    if name in ("plain", "sdpa", "fp8_emulated"):
        return None
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, this is {device.type}; use attention=auto"
    if dtype != torch.bfloat16:
        return f"it computes in bfloat16, not {dtype}; use dtype=bfloat16"
    major = torch.cuda.get_device_capability(device)[0]
    if name in ("fa3", "fp8"):
        remedy = "tier=fp8" if name == "fp8" else "attention=cudnn"
        if major != 9:
            return f"it needs a Hopper GPU (compute capability 9), this has {major}; use {remedy}"
        if find_spec("flash_attn_interface") is None:
            return f"FlashAttention-3 is not installed; {_BUILD_FA3}, or use {remedy}"
    if major < 8:
        return f"it needs compute capability 8, this has {major}; use attention=sdpa"
    if name == "cudnn" and not torch.backends.cudnn.is_available():
        return "torch has no cuDNN; use attention=flash2"
    return None


@cache
def probe(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: int, shared: int, dim: int, call: Call = SMALL
) -> str | None:
    """Fault of a kernel in one call on this device, found by making that call; None if there is none.

    Some rows are compared with fp32 attention, see `_fault`. Takes the memory of the call's tensors (3.3 GB for
    65,746 tokens of 40 heads with the strides of a layer) and 200 MB for the comparison, and frees it.

    Raises:
        torch.OutOfMemoryError: as `choose`.
    """
    what = f"its trial with {call.queries} queries and {call.keys} keys"
    if call.samples > 1:
        what += f" in each of {call.samples} samples"
    try:
        generator = torch.Generator(device=device).manual_seed(0)
        kind, scales = dtype, None
        if kernel.eight_bits:
            kind, scales = FP8, torch.tensor(_STEPS, device=device).unsqueeze(1).repeat(1, shared)
        q, k, v = (_drawn(call, i, (heads, shared, shared)[i], dim, kind, generator) for i in range(3))
        out, lse = kernel.run(q, k, v, call.want_lse, scales)
        fault = _fault(out, lse, (q, k, v), call.want_lse)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a third party's package raises, another kernel may do
        return f"{what} failed ({(str(error).strip() or repr(error)).splitlines()[0][:120]})"
    return fault and f"{what} {fault}"


def recording() -> tuple[Kernel, list[Call]]:
    """A kernel that computes nothing and writes down its calls, and the list of them.

    Run on the meta device whatever calls a kernel: its tensors have shapes and strides, and no memory.
    """
    calls: list[Call] = []

    def run(q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None) -> Output:
        calls.append(Call(q.shape[0], q.shape[1], k.shape[1], want_lse, (q.stride(), k.stride(), v.stride())))
        out = q.new_empty(q.shape, dtype=torch.bfloat16 if q.dtype == FP8 else q.dtype)
        return out, q.new_empty(q.shape[:3], dtype=torch.float32) if want_lse else None

    return Kernel("recording", run), calls


def _drawn(call: Call, which: int, heads: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Standard normal q (which=0), k (1) or v (2) of a call; the last keys are longer."""
    shape = call.samples, call.keys if which else call.queries, heads, dim
    device = generator.device
    if call.strides is None:
        x = torch.empty(shape, dtype=dtype, device=device)
    else:
        x = torch.empty_strided(shape, call.strides[which], dtype=dtype, device=device)
    parts = [(part, 1.0) for part in x.split(_CHUNK, dim=1)]
    if which == 1:
        parts.append((x[:, -_LARGE_KEYS:], _KEY_SCALE))
    for part, size in parts:
        values = torch.randn(part.shape, generator=generator, device=device).mul_(size)
        part.copy_(values.div_(_STEPS[which]) if dtype == FP8 else values)
    return x


def _fault(out: Tensor, lse: Tensor | None, given: tuple[Tensor, Tensor, Tensor], want_lse: bool) -> str | None:
    """Fault of a kernel's output for the inputs `given`, or None.

    All of it has to be finite and no larger than an average of the values can be. About 16 rows of the first and the
    last sample are compared with fp32 attention: the first rows, the last rows, and those at tile boundaries.
    """
    if want_lse and lse is None:
        return "gave no log-sum-exps"
    low, high = (float(x) for x in out.aminmax())
    if not max(-low, high) < _LARGEST_AVERAGE:  # a NaN is not less either
        return f"gave values from {low:.3g} to {high:.3g}, which are no averages of its inputs"
    if lse is not None and not bool(lse.isfinite().all()):
        return "gave log-sum-exps that are not finite"
    rows = _rows_to_compare(out.shape[1])
    distances, sums = [], [0.0]
    for sample in sorted({0, len(out) - 1}):
        true, true_lse = _truth([x[sample : sample + 1] for x in given], rows)
        away = (out[sample, rows].float() - true).norm(dim=-1) / true.norm(dim=-1)
        distances.append(float(away.max()))
        if lse is not None and want_lse:
            sums.append(float((lse[sample, rows] - true_lse).abs().max()))
    limit = _TOLERANCE_FP8 if given[0].dtype == FP8 else _TOLERANCE
    if not max(distances) < limit:
        return f"was off by {max(distances):.2g}, {limit} is allowed"
    if not max(sums) < _TOLERANCE_SUMS:
        return f"had log-sum-exps off by {max(sums):.2g}, {_TOLERANCE_SUMS} is allowed"
    return None


def _rows_to_compare(queries: int) -> list[int]:
    last_tile = (queries - 1) // 128 * 128
    borders = [row for border in (64, 128, 256, last_tile) for row in (border - 1, border)]
    wanted = (0, 1, *borders, queries // 2, queries - 3, queries - 2, queries - 1)
    return sorted({row for row in wanted if 0 <= row < queries})


def _truth(given: Sequence[Tensor], rows: list[int]) -> tuple[Tensor, Tensor]:
    """fp32 attention of these rows of one sample, q [1,n,Hq,D], k and v [1,m,Hkv,D]: [rows,Hq,D], sums [rows,Hq].

    One key head at a time: at 65,746 keys the scores of all would be 168 MB, three times.
    """
    q, k, v = given
    steps = _STEPS if q.dtype == FP8 else (1.0, 1.0, 1.0)
    # Row by row: not every device gathers 8-bit floats.
    q = torch.stack([q[:, row].float() for row in rows], dim=1) * steps[0]
    outs, sums = [], []
    for head, queries in enumerate(q.chunk(k.shape[2], dim=2)):
        keys, values = (x[:, :, head : head + 1].float() * step for x, step in zip((k, v), steps[1:], strict=True))
        out, lse = plain(queries, keys, values, True)
        assert lse is not None
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs, dim=2)[0], torch.cat(sums, dim=2)[0]
