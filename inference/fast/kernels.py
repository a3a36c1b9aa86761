"""Attention kernels under one interface, and local attention (SPEC 1.6) by calls of them.

`inference.fast.attention_kernels` selects the kernel. Every kernel takes q [b,n,Hq,D] and k, v [b,m,Hkv,D], gives
[b,n,Hq,D], and on request the log-sum-exp of the scaled scores, fp32 [b,n,Hq], so that attention over disjoint sets of
keys can be merged (`windowed`).

    plain         matrix products, for short sequences on the CPU
    sdpa          torch's fused kernel of the CPU; on a GPU its memory-efficient one
    cudnn         cuDNN's, bf16 on a GPU
    flash2        the FlashAttention-2 that torch contains, bf16 on a GPU
    fa3           FlashAttention-3 (package flash_attn_interface), bf16 on Hopper
    fp8           the same on 8-bit inputs
    fp8_emulated  the arithmetic of fp8 in plain products, on any device
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.fast.fp8 import FP8
from magihuman.models import attention

_PROBABILITY_SCALE = 256.0
"""FlashAttention-3 stretches probabilities by 2^8 before it rounds them to e4m3."""

Output = tuple[Tensor, Tensor | None]
"""Attention [b,n,Hq,D], and the log-sum-exps fp32 [b,n,Hq] where they were wanted."""

Run = Callable[[Tensor, Tensor, Tensor, bool, Tensor | None], Output]


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


def variants(name: str) -> tuple[Kernel, ...]:
    """Ways to run the kernel of that name, the better one first; "auto" is the CPU's choice by size."""
    if name == "cudnn":  # with fewer key heads where this cuDNN can, else with repeated ones
        return Kernel(name, _cudnn), Kernel("cudnn, repeated heads", _cudnn_repeated)
    runs: dict[str, Run] = {
        "auto": _by_size, "plain": plain, "sdpa": _sdpa, "flash2": _flash2, "fa3": _fa3, "fp8": _fa3,
        "fp8_emulated": _emulated,
    }  # fmt: skip
    return (Kernel(name, runs[name], eight_bits=name.startswith("fp8")),)


# -- the kernels -----------------------------------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None) -> Output:
    """`magihuman.models.attention.plain`."""
    return attention.plain(q, k, v, want_lse)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None) -> Output:
    if q.device.type == "cpu":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out.transpose(1, 2), lse.transpose(1, 2)
    q, k, v = _with_repeated_heads(q, k, v)
    result = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, want_lse)
    return _taken(result, q, want_lse)


def _by_size(q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None) -> Output:
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1]
    return (plain if scores <= attention.MATH_LIMIT else _sdpa)(q, k, v, want_lse)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None) -> Output:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _taken(
        torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, want_lse, 0.0, False, False), q, want_lse
    )


def _cudnn_repeated(q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None) -> Output:
    q, k, v = _with_repeated_heads(q, k, v)
    return _taken(
        torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, want_lse, 0.0, False, False), q, want_lse
    )


def _flash2(q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None) -> Output:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _taken(torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False), q, want_lse)


def _with_repeated_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[2] // k.shape[2]
    k, v = (x.transpose(1, 2).repeat_interleave(group, dim=1) for x in (k, v))
    return q.transpose(1, 2), k, v


def _taken(result: Any, q: Tensor, want_lse: bool) -> Output:
    """Output and log-sum-exp of an aten kernel, whose sums may come as [b,Hq,n] or [b,Hq,n,1]."""
    lse = result[1].reshape(q.shape[0], q.shape[1], -1)[..., : q.shape[2]] if want_lse else None
    return result[0].transpose(1, 2), None if lse is None else lse.transpose(1, 2)


def _fa3(q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None) -> Output:
    function: Any = import_module("flash_attn_interface").flash_attn_func
    given: dict[str, Any] = {"return_attn_probs": True} if want_lse else {}
    if scales is not None:
        names = ("q_descale", "k_descale", "v_descale")
        given |= {name: row.expand(len(q), -1).contiguous() for name, row in zip(names, scales, strict=True)}
    result = function(q, k, v, **given)
    # Older builds return the pair always.
    out, lse = result[:2] if isinstance(result, tuple) else (result, None)
    return out, lse.transpose(1, 2) if want_lse else None


def _emulated(q: Tensor, k: Tensor, v: Tensor, want_lse: bool, scales: Tensor | None = None) -> Output:
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


# -- local attention
#
# Video tokens of frame i attend to frames i - R to i + R and to all audio and text; audio and text attend to everything.
# With the keys laid out as [others, video, others], a window that touches either end of the clip is one contiguous run
# of keys together with the others. Only windows in the middle need two calls, merged exactly by their log-sum-exps.


def windowed(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, video: int, frames: int, reach: int, scales: Tensor | None = None
) -> Tensor:
    """Local attention of samples of equal length, in the order video, audio, text.

    Args:
        q: [b,n,Hq,D]; k, v: [b,n,Hkv,D].
        video: video tokens of a sample, frame by frame; frames: latent frames.
        reach: R, frames that a video token attends to on each side.
        scales: see `inference.fast.kernels.Kernel`.

    Returns:
        [b,n,Hq,D].
    """
    if reach >= frames - 1:
        return kernel.run(q, k, v, False, scales)[0]
    per_frame, others = video // frames, q.shape[1] - video
    around_k, around_v = (torch.cat([x[:, video:], x], dim=1) for x in (k, v))  # [others, video, others]
    pieces: list[Tensor] = []
    for first, last, start, stop in _runs(frames, reach):
        rows = q[:, first * per_frame : last * per_frame]
        # The run of keys in tokens of [others, video, others], as far out as it reaches.
        low = 0 if start == 0 else others + start * per_frame
        high = around_k.shape[1] if stop == frames and start > 0 else others + stop * per_frame
        near = around_k[:, low:high], around_v[:, low:high]
        if start == 0 or stop == frames or others == 0:
            pieces.append(kernel.run(rows, *near, False, scales)[0])
            continue
        out, lse = kernel.run(rows, *near, True, scales)
        far, far_lse = kernel.run(rows, around_k[:, :others], around_v[:, :others], True, scales)
        assert lse is not None
        assert far_lse is not None
        pieces.append(merge(out, lse, far, far_lse))
    if others:
        pieces.append(kernel.run(q[:, video:], k, v, False, scales)[0])
    return torch.cat(pieces, dim=1)


def merge(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> Tensor:
    """Attention over the union of two disjoint sets of keys; outputs [b,n,Hq,D], log-sum-exps fp32 [b,n,Hq]."""
    weight = torch.sigmoid(a_lse - b_lse).unsqueeze(-1)
    return torch.lerp(b.float(), a.float(), weight).to(a.dtype)


def _runs(frames: int, reach: int) -> list[tuple[int, int, int, int]]:
    """(first, last, start, stop), half open: query frames first..last all attend to key frames start..stop.

    With more than one frame out of reach no two frames share a window, but the middle ones of a short clip may.
    """
    runs: list[tuple[int, int, int, int]] = []
    for i in range(frames):
        seen = max(0, i - reach), min(frames, i + reach + 1)
        if runs and runs[-1][2:] == seen:
            runs[-1] = (runs[-1][0], i + 1, *seen)
        else:
            runs.append((i, i + 1, *seen))
    return runs
