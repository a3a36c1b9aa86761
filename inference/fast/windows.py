"""Local attention (SPEC 1.6) by dense kernels, at their speed: frames see contiguous runs of keys.

Video tokens of frame i see frames i - R to i + R and all audio and text; audio and text see everything. With the keys
laid out as [others, video, others], a window that touches either end of the clip is one run of keys together with
the others. Only windows in the middle need two calls, merged exactly by their log-sum-exps.
"""

import torch
from torch import Tensor

from inference.fast.kernels import Kernel


def windowed(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    video: int,
    frames: int,
    reach: int,
    scales: Tensor | None = None,
) -> Tensor:
    """Local attention of samples of equal length, in the order video, audio, text.

    Args:
        q: [b,n,Hq,D]; k, v: [b,n,Hkv,D].
        video: video tokens of a sample, frame by frame; frames: latent frames.
        reach: R, frames seen to each side.
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
    """(first, last, start, stop), half open: query frames first..last all see key frames start..stop.

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
