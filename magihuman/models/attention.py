"""Attention within each sample of a packed batch: one function, several back ends.

Tokens arrive modality-major (`magihuman.models.tokens.Layout`). Samples of equal length are attended together as one
dense batch; a ragged batch is one dense batch per distinct length, or one variable-length kernel call.

Back ends, all differentiable:
    math       softmax(q k') v in plain matrix products of the given dtype; fastest for short sequences on CPU
    sdpa       torch's fused kernels
    flash      flash-attn's variable-length kernel; needs the package and a CUDA device
    flex       FlexAttention with a block mask, where samples or windows need one
    windowed   local attention by range pairs, merged with log-sum-exp (SPEC 1.6)
    reference  fp32 softmax over keys and values in the given dtype; with bf16 inputs it equals the attention of the
               released implementation's test vectors bit for bit (SPEC 12). With a window it applies the mask of SPEC 1.6.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from magihuman.models.forward_mode import apply
from magihuman.models.tokens import VIDEO, Layout

BACKENDS = ("auto", "math", "sdpa", "flash", "flex", "windowed", "reference")
LOCAL_BACKENDS = ("flex", "windowed", "reference")

HAS_FLASH_ATTN = find_spec("flash_attn") is not None

MATH_LIMIT = 1 << 25
"""Scores (batch x heads x n x n) up to which plain products beat the fused CPU kernel."""

Attend = Callable[[Tensor, Tensor, Tensor, Layout, str, int | None], Tensor]
"""Type of `attention`."""

_Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, backend: str = "auto", window: int | None = None
) -> Tensor:
    """Non-causal softmax attention of every sample over its own tokens, scale 1/sqrt(D).

    Query head i reads key/value head i // (Hq / Hkv).

    Args:
        q: [L,Hq,D] in packed order; k, v: [L,Hkv,D]. fp32 or bf16.
        backend: one of BACKENDS.
        window: frames to each side that a video token attends to, in addition to all audio and text; None for all.

    Returns:
        [L,Hq,D] in packed order, dtype of q.

    Raises:
        ValueError: for an unknown back end, or one without windows or kernels for this call.
    """
    return layout.attend(_attention, q, k, v, backend, window)


def _attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, backend: str, window: int | None) -> Tensor:
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention back end {backend!r}; choose from {', '.join(BACKENDS)}")
    if window is not None and layout.frames == 0:
        raise ValueError("local attention needs whole frames; this layout holds a routed subset of the tokens")
    if backend == "auto":
        backend = _choose(q, layout, window)
    if window is not None and backend not in LOCAL_BACKENDS:
        raise ValueError(f"back end {backend!r} has no windows; choose from {', '.join(LOCAL_BACKENDS)}")
    if backend == "flash":
        return _flash(q, k, v, layout)
    if backend == "flex":
        return _flex(q, k, v, layout, window)
    if backend == "windowed":
        kernel = _windowed(layout, layout.frames if window is None else window)
    elif backend == "reference" and window is not None:
        kernel = _masked_reference(layout, window)
    else:
        kernel = _DENSE[backend]
    batches = zip(*(_to_dense(x, layout) for x in (q, k, v)), strict=True)
    return _from_dense([kernel(*qkv) for qkv in batches], layout)


def local_ranges(video: int, others: int, frames: int, receptive: int) -> tuple[Tensor, Tensor]:
    """Query and key ranges of local attention, half-open, over one sample's video, audio, text (SPEC 1.6).

    Args:
        video: video tokens; others: audio and text tokens together.
        frames: latent frames; receptive: frames attended to on each side.

    Returns:
        int32 [frames + 2, 2] twice: one pair per frame, all video -> others, others -> everything.
    """
    per_frame = video // frames
    queries = [(i * per_frame, (i + 1) * per_frame) for i in range(frames)]
    keys = [(max(0, (i - receptive) * per_frame), min(video, (i + receptive + 1) * per_frame)) for i in range(frames)]
    end = video + others
    queries += [(0, video), (video, end)]
    keys += [(video, end), (0, end)]
    return torch.tensor(queries, dtype=torch.int32), torch.tensor(keys, dtype=torch.int32)


def local_mask(video: int, others: int, frames: int, receptive: int) -> Tensor:
    """Mask of local attention: bool [n,n], rows are queries, n = video + others (SPEC 1.6)."""
    per_frame = video // frames
    frame = torch.arange(video) // per_frame
    mask = torch.ones(video + others, video + others, dtype=torch.bool)
    mask[:video, :video] = (frame.unsqueeze(1) - frame).abs() <= receptive
    return mask


def prepare_block_mask(layout: Layout, window: int | None) -> Layout:
    """Build FlexAttention's block mask of local layers on a GPU before any loop or compiled region; returns `layout`."""
    if window is not None and layout.coords.is_cuda:
        _block_mask(layout, window)
    return layout


def _choose(q: Tensor, layout: Layout, window: int | None) -> str:
    if window is not None:
        return "flex" if q.is_cuda else "windowed"
    if q.is_cuda:
        return "flash" if q.dtype != torch.float32 and HAS_FLASH_ATTN else "sdpa"
    scores = sum(samples * n * n for samples, n in layout.groups) * q.shape[1]
    return "math" if scores <= MATH_LIMIT else "sdpa"


# -- packed <-> dense ------------------------------------------------------------------------------------------


class _Permute(torch.autograd.Function):
    """Row permutation whose gradient is a gather too, not a scatter-add."""

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, order), None, None


def _sample_major(x: Tensor, layout: Layout) -> Tensor:
    return x if layout.order is None else apply(_Permute, x, layout.order, layout.inverse)


def _packed(x: Tensor, layout: Layout) -> Tensor:
    return x if layout.order is None else apply(_Permute, x, layout.inverse, layout.order)


def _to_dense(x: Tensor, layout: Layout) -> list[Tensor]:
    """Packed [L,heads,D] -> one [samples,n,heads,D] for each group of equal lengths."""
    if layout.batch == 1:
        return [x.unsqueeze(0)]
    if layout.uniform:
        parts = [part.unflatten(0, (layout.batch, -1)) for part in x.split(layout.sizes) if len(part)]
        return [torch.cat(parts, dim=1)]
    runs = _sample_major(x, layout).split([samples * n for samples, n in layout.groups])
    return [run.unflatten(0, (samples, n)) for run, (samples, n) in zip(runs, layout.groups, strict=True)]


def _from_dense(dense: list[Tensor], layout: Layout) -> Tensor:
    if layout.batch == 1:
        return dense[0].squeeze(0)
    if layout.uniform:
        lengths = [layout.video_len, layout.audio_len, layout.text_lens[0]]
        return torch.cat([part.flatten(0, 1) for part in dense[0].split(lengths, dim=1)])
    return _packed(torch.cat([part.flatten(0, 1) for part in dense]), layout)


# -- dense kernels: q [b,n,Hq,D], k and v [b,m,Hkv,D] -> [b,n,Hq,D] ------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor, want_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """Attention in plain products, with all scores in memory.

    Args:
        q: [b,n,Hq,D]; k, v: [b,m,Hkv,D].

    Returns:
        [b,n,Hq,D] in the dtype of q, and if wanted the log-sum-exp of the scaled scores, fp32 [b,n,Hq].
    """
    b, n, _, dim = q.shape
    shared = k.shape[2]
    # Query heads that share a key head are stacked as more rows of one product: keys are never repeated.
    rows = q.unflatten(2, (shared, -1)).permute(0, 2, 3, 1, 4).reshape(b * shared, -1, dim)
    keys = k.permute(0, 2, 3, 1).reshape(b * shared, dim, -1)
    values = v.permute(0, 2, 1, 3).reshape(b * shared, -1, dim)
    scores = torch.baddbmm(rows.new_zeros(()), rows, keys, beta=0, alpha=dim**-0.5)

    def by_head(x: Tensor) -> Tensor:
        return x.view(b, shared, -1, n, x.shape[-1]).permute(0, 3, 1, 2, 4).flatten(2, 3)

    lse = by_head(scores.float().logsumexp(dim=-1, keepdim=True)).squeeze(-1) if want_lse else None
    return by_head(torch.bmm(scores.softmax(dim=-1), values)), lse


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q, k, v)[0]


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    shared = q.shape[1] != k.shape[1]
    if shared and q.is_cuda and q.dtype == torch.float32:
        # No fused kernel takes shared heads in fp32; torch would fall back to a product that stores all scores.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        shared = False
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=shared).transpose(1, 2)


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    group = q.shape[2] // k.shape[2]
    queries = q.transpose(1, 2).float()
    keys, values = (x.transpose(1, 2).float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = queries @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(dim=-1) @ values).to(q.dtype).transpose(1, 2)


_DENSE: dict[str, _Kernel] = {"math": _math, "sdpa": _sdpa, "reference": _reference}


# -- windows of frames -------------------------------------------------------------------------------------------


def _masked_reference(layout: Layout, window: int) -> _Kernel:
    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = local_mask(layout.video_len, q.shape[1] - layout.video_len, layout.frames, window)
        return _reference(q, k, v, mask.to(q.device))

    return kernel


def _windowed(layout: Layout, window: int) -> _Kernel:
    video, frames = layout.video_len, layout.frames
    per_frame = video // frames

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near, near_lse = [], []
        for i in range(frames):
            seen = slice(max(0, i - window) * per_frame, min(frames, i + window + 1) * per_frame)
            out, lse = _with_lse(q[:, i * per_frame : (i + 1) * per_frame], k[:, seen], v[:, seen])
            near.append(out)
            near_lse.append(lse)
        far, far_lse = _with_lse(q[:, :video], k[:, video:], v[:, video:])
        merged = _merge(torch.cat(near, dim=1), torch.cat(near_lse, dim=1), far, far_lse)
        others, _ = _with_lse(q[:, video:], k, v)
        return torch.cat([merged, others], dim=1).to(q.dtype)

    return kernel


def _with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention in fp32 with the log-sum-exp of its scores: [b,n,Hq,D] and [b,n,Hq,1]."""
    b, n, heads, dim = q.shape
    grouped = q.float().unflatten(2, (k.shape[2], -1))  # [b,n,Hkv,rep,D]
    scores = torch.einsum("bnkrd,bmkd->bkrnm", grouped, k.float()) * dim**-0.5
    lse = scores.logsumexp(dim=-1, keepdim=True)  # -inf where there are no keys
    out = torch.einsum("bkrnm,bmkd->bnkrd", (scores - lse).exp(), v.float())
    return out.reshape(b, n, heads, dim), lse.permute(0, 3, 1, 2, 4).reshape(b, n, heads, 1)


def _merge(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> Tensor:
    """Attention over the union of two disjoint key sets from the attention over each."""
    weight = torch.sigmoid(a_lse - b_lse)
    return a * weight + b * (1 - weight)


# -- variable-length kernels over the sample-major order -----------------------------------------------------------


def _flash(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    if not HAS_FLASH_ATTN:
        raise ValueError("back end 'flash' needs the flash-attn package: pip install 'magihuman[cuda]'")
    from flash_attn import flash_attn_varlen_func

    q, k, v = (_sample_major(x, layout) for x in (q, k, v))
    starts, longest = layout.cu_seqlens, layout.max_seqlen
    return _packed(flash_attn_varlen_func(q, k, v, starts, starts, longest, longest), layout)


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None) -> Tensor:
    q, k, v = (_sample_major(x, layout).transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = _flex_kernel(q.is_cuda)(q, k, v, block_mask=_block_mask(layout, window), enable_gqa=True)
    return _packed(out.squeeze(0).transpose(0, 1), layout)


@cache
def _flex_kernel(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


def _block_mask(layout: Layout, window: int | None) -> Any:
    """Same sample, and within the window where both tokens are video. Cached in `layout.block_masks`."""
    masks = layout.block_masks
    if window not in masks:
        from torch.nn.attention.flex_attention import create_block_mask

        device, length = layout.coords.device, layout.length
        starts = layout.cu_seqlens.long()
        sample = torch.repeat_interleave(torch.arange(layout.batch, device=device), starts.diff(), output_size=length)
        video = layout.modality == VIDEO
        frame = layout.coords[:, 0]
        if layout.order is not None:
            video, frame = video[layout.order], frame[layout.order]

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            same = sample[i] == sample[j]
            if window is None:
                return same
            near = (frame[i] - frame[j]).abs() <= window
            return same & (near | ~video[i] | ~video[j])

        # Compiled on a GPU: uncompiled it makes length x length booleans, several GB at 1080p.
        build = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
        masks[window] = build(visible, None, None, length, length, device=device)
    return masks[window]
