"""Dense attention through a kernel that was chosen, not guessed: what can run here, and why something cannot.

Every kernel takes q [b,n,Hq,D] and k, v [b,m,Hkv,D], gives [b,n,Hq,D], and on request the log-sum-exp of the scaled
scores, fp32 [b,n,Hq], so that attention over disjoint sets of keys can be merged (`inference.fast.windows`).

    plain         matrix products, for short sequences on the CPU
    sdpa          torch's fused kernel of the CPU; on a GPU its memory-efficient one
    cudnn         cuDNN's, bf16 on a GPU
    flash2        the FlashAttention-2 that torch contains, bf16 on a GPU
    fa3           FlashAttention-3 (package flash_attn_interface), bf16 on Hopper
    fp8           the same on 8-bit inputs
    fp8_emulated  the arithmetic of fp8 in plain products, on any device
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.fast.eight_bits import FP8, quantise
from magihuman.errors import UserError

_MATH_LIMIT = 1 << 25
"""Scores up to which plain products beat the fused CPU kernel, as in magihuman.models.attention."""

_PROBABILITY_SCALE = 256.0
"""FlashAttention-3 stretches probabilities by 2^8 before it rounds them to e4m3."""

# Largest relative L2 distance of a kernel's probe from fp32 attention.
_TOLERANCE, _TOLERANCE_FP8 = 0.02, 0.12

_BUILD_FA3 = "build flash-attention/hopper (package flash_attn_interface)"

Run = Callable[[Tensor, Tensor, Tensor, bool, Tensor | None], tuple[Tensor, Tensor | None]]


class Kernel(NamedTuple):
    """A way to compute attention.

    Attributes:
        run: (q, k, v, want_lse, scales) -> (out, lse or None). `scales`: fp32 [3,Hkv], what one unit of q, k and v
            stands for, for the 8-bit kernels; None for the others.
        eight_bits: takes and needs e4m3 inputs.
    """

    name: str
    run: Run
    eight_bits: bool = False


def choose(name: str, device: torch.device, dtype: torch.dtype, heads: int, shared: int, dim: int) -> Kernel:
    """The kernel of that name, or for "auto" the fastest that runs here; tried out once on this device.

    Args:
        dtype: of q, k, v (before they are made 8-bit); heads, shared: query and key heads.

    Raises:
        UserError: it cannot run here, with the reason and what to use instead.
    """
    if name == "auto" and device.type == "cpu":
        return Kernel("auto", _by_size)
    if name == "auto" and dtype != torch.bfloat16:
        return Kernel("sdpa", _sdpa)
    reasons = []
    for wanted in ("fa3", "cudnn", "flash2") if name == "auto" else (name,):
        reason = refusal(wanted, device, dtype)
        if reason is None:
            for kernel in _variants(wanted):
                reason = probe(kernel, device, dtype, heads, shared, dim)
                if reason is None:
                    return kernel
        reasons.append(f"attention={wanted} cannot run here: {reason}")
    raise UserError("; ".join(reasons))


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
    kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: int, shared: int, dim: int
) -> str | None:
    """What is wrong with a kernel on this device, found by computing a small case; None if nothing is."""
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(n: int, count: int) -> Tensor:
        return torch.randn(1, n, count, dim, generator=generator, device=device).to(dtype)

    q, k, v = draw(192, heads), draw(320, shared), draw(320, shared)
    scales = torch.full((3, shared), 0.02, device=device) if kernel.eight_bits else None
    given = [x if scales is None else quantise(x.float(), scales[0, 0]) for x in (q, k, v)]
    try:
        out, lse = kernel.run(given[0], given[1], given[2], True, scales)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return f"its trial failed ({str(error).strip().splitlines()[0][:120]})"
    wanted, wanted_lse = _plain(q.float(), k.float(), v.float(), True)
    assert lse is not None
    assert wanted_lse is not None
    distance = float((out.float() - wanted).norm() / wanted.norm())
    lse_distance = float((lse - wanted_lse).abs().max())
    limit = _TOLERANCE_FP8 if kernel.eight_bits else _TOLERANCE
    if not max(distance, lse_distance) < limit:
        return f"its trial was off by {distance:.2g} (sums by {lse_distance:.2g}), {limit} is allowed"
    return None


def _variants(name: str) -> tuple[Kernel, ...]:
    if name == "cudnn":  # with fewer key heads where this cuDNN can, else with repeated ones
        return Kernel(name, _cudnn), Kernel("cudnn, repeated heads", _cudnn_repeated)
    runs: dict[str, Run] = {"plain": _plain, "sdpa": _sdpa, "flash2": _flash2, "fa3": _fa3, "fp8": _fa3}
    if name == "fp8_emulated":
        return (Kernel(name, _emulated, eight_bits=True),)
    return (Kernel(name, runs[name], eight_bits=name == "fp8"),)


# -- the kernels -----------------------------------------------------------------------------------------------------


def _plain(
    q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    b, n, _, dim = q.shape
    shared = k.shape[2]
    # Query heads of one key head are stacked as rows of one product.
    rows = q.unflatten(2, (shared, -1)).permute(0, 2, 3, 1, 4).reshape(b * shared, -1, dim)
    keys = k.permute(0, 2, 3, 1).reshape(b * shared, dim, -1)
    values = v.permute(0, 2, 1, 3).reshape(b * shared, -1, dim)
    scores = torch.baddbmm(rows.new_zeros(()), rows, keys, beta=0, alpha=dim**-0.5)
    out = _by_head(torch.bmm(scores.softmax(dim=-1), values), b, shared, n)
    lse = None
    if want_lse:
        lse = _by_head(scores.float().logsumexp(dim=-1, keepdim=True), b, shared, n).squeeze(-1)
    return out, lse


def _by_head(x: Tensor, b: int, shared: int, n: int) -> Tensor:
    """[b Hkv, rep n, D] -> [b,n,Hq,D]."""
    return x.view(b, shared, -1, n, x.shape[-1]).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    if q.device.type == "cpu":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out.transpose(1, 2), lse.transpose(1, 2)
    q, k, v = _with_repeated_heads(q, k, v)
    result = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, want_lse)
    return _taken(result, q, want_lse)


def _by_size(
    q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1]
    return (_plain if scores <= _MATH_LIMIT else _sdpa)(q, k, v, want_lse)


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _taken(
        torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, want_lse, 0.0, False, False),
        q,
        want_lse,
    )


def _cudnn_repeated(
    q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    q, k, v = _with_repeated_heads(q, k, v)
    return _taken(
        torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, want_lse, 0.0, False, False),
        q,
        want_lse,
    )


def _flash2(
    q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _taken(torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False), q, want_lse)


def _with_repeated_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[2] // k.shape[2]
    k, v = (x.transpose(1, 2).repeat_interleave(group, dim=1) for x in (k, v))
    return q.transpose(1, 2), k, v


def _taken(result: Any, q: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp of an aten kernel, whose sums may come as [b,Hq,n] or [b,Hq,n,1]."""
    lse = result[1].reshape(q.shape[0], q.shape[1], -1)[..., : q.shape[2]] if want_lse else None
    return result[0].transpose(1, 2), None if lse is None else lse.transpose(1, 2)


def _fa3(
    q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    function: Any = import_module("flash_attn_interface").flash_attn_func
    given: dict[str, Any] = {"return_attn_probs": True} if want_lse else {}
    if scales is not None:
        names = ("q_descale", "k_descale", "v_descale")
        given |= {name: row.expand(len(q), -1).contiguous() for name, row in zip(names, scales, strict=True)}
    result = function(q, k, v, **given)
    # Older builds return the pair always.
    out, lse = result[:2] if isinstance(result, tuple) else (result, None)
    return out, lse.transpose(1, 2) if want_lse else None


def _emulated(
    q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Where FlashAttention-3 rounds: inputs, and probabilities relative to their row's largest; sums stay fp32."""
    assert scales is not None
    group = q.shape[2] // k.shape[2]
    q_scale, k_scale, v_scale = scales.unsqueeze(-1)  # [Hkv,1] each
    queries = q.float() * q_scale.repeat_interleave(group, dim=0)
    keys, values = (k.float() * k_scale, v.float() * v_scale)
    keys, values = (x.transpose(1, 2).repeat_interleave(group, dim=1) for x in (keys, values))
    scores = queries.transpose(1, 2) @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    largest = scores.amax(dim=-1, keepdim=True)
    weights = (scores - largest).exp() * _PROBABILITY_SCALE
    total = weights.sum(dim=-1, keepdim=True)
    out = (weights.to(FP8).float() @ values / total).to(torch.bfloat16).transpose(1, 2)
    lse = (total / _PROBABILITY_SCALE).log() + largest
    return out, lse.squeeze(-1).transpose(1, 2) if want_lse else None
