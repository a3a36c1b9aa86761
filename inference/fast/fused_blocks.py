"""The token-wise parts of the network between two attentions, as plain functions that torch.compile can fuse.

A region runs from one attention to the next: gate, output projection, residual sum, feed-forward half, residual sum,
then the next layer's norm, projection, norms of queries and keys, rotation. All layers of a kind share one
compilation, because their tensors are arguments.

Uncompiled, each operation is the one of magihuman.models, in the same order with the same roundings, but for what is
the same in every call and so was made once (1 + w of the norms, sorted rows, casts).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.fast import fp8
from inference.fast.fused_weights import BlockKind, LayerTensors, MatrixTensors
from magihuman.models.layers import ALPHA, EPS, LIMIT

_RECOMPILATIONS = 64
"""CompiledBlocks are few functions compiled for many kinds of layers and geometries; torch's limit is 8."""


class BlockTokens(NamedTuple):
    """Token layout of the compiled functions.

    Attributes:
        sizes: rows of each expert in a layer with experts.
        sin, cos: fp32 [L,1,3D/8] each, in the order of the rows.
        ends: int32 [3], running sums of `sizes`, for one product over all experts; None for a product each.
    """

    sizes: tuple[int, ...]
    sin: Tensor
    cos: Tensor
    ends: Tensor | None


class Projected(NamedTuple):
    """Inputs of attention, q [L,Hq,D], k and v [L,Hkv,D], and the gates of its output, each expert's [n,Hq]."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: tuple[Tensor, ...]


def before(x: Tensor, tokens: BlockTokens, w: LayerTensors, kind: BlockKind) -> Projected:
    """fp32 residual stream [L,H] to a layer's queries, keys, values and gates."""
    parts = _split(x, tokens, kind)
    normed = [norm(part, scale) for part, scale in zip(parts, w.attention_norm.unbind(), strict=True)]
    both = kind.heads + kind.shared
    widths = [both * kind.dim, kind.shared * kind.dim, kind.heads if kind.gated else 0]
    rotated, values, gates = [], [], []
    rows = zip(
        multiply(normed, w.qkv, tokens.ends, kind),
        _split(tokens.sin, tokens, kind),
        _split(tokens.cos, tokens, kind),
        w.qk_norm.unbind(),
        strict=True,
    )
    for y, sin, cos, scale in rows:
        qk, v, gate, _ = y.split([*widths, y.shape[1] - sum(widths)], dim=-1)
        qk = rotate(norm(qk.float().unflatten(-1, (both, kind.dim)), scale), sin, cos)
        v = v.unflatten(-1, (kind.shared, kind.dim))
        if kind.eight_bit_attention:
            assert w.attention_scales is not None
            group = kind.heads // kind.shared
            q_scale, k_scale, v_scale = w.attention_scales.unsqueeze(-1)  # [Hkv,1] each
            steps = torch.cat([q_scale.repeat_interleave(group, dim=0), k_scale])
            qk, v = fp8.quantise(qk, steps), fp8.quantise(v.float(), v_scale)
        rotated.append(qk if kind.eight_bit_attention else qk.to(kind.dtype))
        values.append(v if kind.eight_bit_attention else v.to(kind.dtype))
        gates.append(gate)
    q, k = _join(rotated).split([kind.heads, kind.shared], dim=-2)
    return Projected(q, k, _join(values), tuple(gates))


def after(
    x: Tensor, out: Tensor, gates: tuple[Tensor, ...], tokens: BlockTokens, w: LayerTensors, kind: BlockKind
) -> Tensor:
    """Attention's output [L,Hq,D] into the residual stream, and the feed-forward half.

    x, out and gates may lack the last experts, whose weights then are not used.
    """
    outs = _split(out, tokens, kind)
    if kind.gated:
        outs = [o * torch.sigmoid(gate.float()).unsqueeze(-1) for o, gate in zip(outs, gates, strict=True)]
    mixed = multiply([o.flatten(1) for o in outs], w.proj, tokens.ends, kind)
    parts = _add(_split(x, tokens, kind), mixed, w.attention_post_norm)
    normed = [norm(part, scale) for part, scale in zip(parts, w.mlp_norm.unbind(), strict=False)]
    inner = [activation(y, kind) for y in multiply(normed, w.up, tokens.ends, kind)]
    changes = [y.float() for y in multiply(inner, w.down, tokens.ends, kind)]
    return _join(_add(parts, changes, w.mlp_post_norm))


def between(
    x: Tensor,
    out: Tensor,
    gates: tuple[Tensor, ...],
    tokens: BlockTokens,
    w: LayerTensors,
    kind: BlockKind,
    following: LayerTensors,
    next_kind: BlockKind,
) -> tuple[Tensor, Projected]:
    """`after` of one layer and `before` of the next in one function, so that they are fused."""
    x = after(x, out, gates, tokens, w, kind)
    return x, before(x, tokens, following, next_kind)


def norm(x: Tensor, scale: Tensor) -> Tensor:
    """RMS norm, fp32 out, as magihuman.models.layers.rms_norm; `scale` is 1 + w."""
    x = x.float()
    inverse = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPS)
    return (x * inverse).mul_(scale)


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """As magihuman.models.rotary.apply_rotary on [L,heads,D], in place where that is faster."""
    half = sin.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    if torch.compiler.is_compiling():
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
    from_b, from_a = b * sin, a * sin
    a.mul_(cos).sub_(from_b)
    b.mul_(cos).add_(from_a)
    return x


def activation(y: Tensor, kind: BlockKind) -> Tensor:
    """GELU7 or SwiGLU7 of an up projection, fp32 out (SPEC 1.5)."""
    if kind.gelu:
        u = y.float().clamp(max=LIMIT)
        return torch.sigmoid(u * ALPHA).mul_(u)
    gate, linear = y.chunk(2, dim=-1) if kind.planes else y.unflatten(-1, (-1, 2)).unbind(-1)
    g, shifted = gate.float().clamp(max=LIMIT), linear.float().clamp(-LIMIT, LIMIT).add_(1)
    return torch.sigmoid(g * ALPHA).mul_(g).mul_(shifted)


def multiply(parts: Sequence[Tensor], matrix: MatrixTensors, ends: Tensor | None, kind: BlockKind) -> Sequence[Tensor]:
    """Each expert's rows times its weights: [n,columns] each -> [n,rows] each, in the compute dtype, or fp32 after
    8-bit products."""
    if matrix.row_scales is not None and matrix.scales is not None:
        weights = zip(parts, matrix.weight, matrix.row_scales, matrix.scales, strict=False)
        return [fp8.multiply(x.float(), *own) for x, *own in weights]
    parts = [part.to(kind.dtype) for part in parts]
    if ends is None or len(parts) == 1:
        return [F.linear(x, w) for x, w in zip(parts, matrix.weight.unbind(), strict=False)]
    count = len(parts)
    y = grouped_mm(torch.cat(parts), matrix.weight[:count].transpose(1, 2), ends[:count])
    return y.split([len(part) for part in parts])


def can_group(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one product over all experts exists here: bf16, and on a GPU Hopper or later."""
    if dtype != torch.bfloat16 or not (hasattr(F, "grouped_mm") or hasattr(torch, "_grouped_mm")):
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows of x [n,columns] up to each of `ends` times a matrix [columns,rows] of `weights` each -> [n,rows]."""
    function: Any = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return function(x, weights, offs=ends)


def _split(x: Tensor, tokens: BlockTokens, kind: BlockKind) -> Sequence[Tensor]:
    if kind.experts == 1:
        return (x,)
    parts, start = [], 0
    for size in tokens.sizes:
        parts.append(x[start : start + size])
        start += size
    return parts


def _join(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _add(parts: Sequence[Tensor], changes: Sequence[Tensor], scale: Tensor | None) -> list[Tensor]:
    if scale is not None:
        normed = zip(changes, scale.unbind(), strict=False)
        changes = [norm(y, row).to(y.dtype) for y, row in normed]
    return [x + y for x, y in zip(parts, changes, strict=True)]


class CompiledBlocks:
    """The three functions above, plain or compiled.

    Args:
        mode: "off", "auto" or "static", see `inference.fast.tiers.Options.compile`.
    """

    def __init__(self, mode: str) -> None:
        self.before: Callable[..., Projected] = before
        self.after: Callable[..., Tensor] = after
        self.between: Callable[..., tuple[Tensor, Projected]] = between
        if mode != "off":
            import torch._dynamo.config as dynamo

            dynamo.recompile_limit = max(dynamo.recompile_limit, _RECOMPILATIONS)
            compiled: Any = partial(torch.compile, fullgraph=True, dynamic=False if mode == "static" else None)
            self.before, self.after, self.between = compiled(before), compiled(after), compiled(between)
