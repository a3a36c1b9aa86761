"""Errors of a clip against the true one: PSNR by torchmetrics, SSIM, change between frames, seams between chunks.

    psnr(frames, truth), ssim(frames, truth)   # uint8 [F,H,W,3]

Everything is on the fixed range of 8 bits and nothing is normalised by a clip's own values, so a wrong gain or offset costs
what it costs. Differences are in 8-bit levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LUMA = (0.299, 0.587, 0.114)
CEILING = 99.0  # dB reported for equal frames
WINDOW, DEVIATION = 11, 1.5  # pixels, of SSIM's Gaussian


def psnr(frames: np.ndarray, truth: np.ndarray, where: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of uint8 [F,H,W,3], over all frames or over the pixels `where`, bool [H,W] or [F,H,W].

    Raises:
        ValueError: clips of different shapes.
    """
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _require_same(frames, truth)
    counted = np.broadcast_to(True if where is None else where, frames.shape[:3])
    a, b = (torch.from_numpy(x[counted].astype(np.float64)) for x in (frames, truth))
    return min(CEILING, float(peak_signal_noise_ratio(a, b, data_range=255.0)))


def ssim(frames: np.ndarray, truth: np.ndarray) -> float:
    """Mean structural similarity of the luma, uint8 [F,H,W,3] (Wang et al. 2004: 11 x 11 Gaussian, K .01 and .03).

    Raises:
        ValueError: clips of different shapes, or frames smaller than the window.
    """
    import torch

    _require_same(frames, truth)
    if min(frames.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs frames of at least {WINDOW} pixels, not {list(frames.shape[1:3])}")
    # Own code: torchmetrics filters in two dimensions, eight times slower in float64; in float32 flat areas are off by 1e-4.
    window = torch.exp(-((torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2) ** 2) / (2 * DEVIATION**2))
    window /= window.sum()

    def mean(x: torch.Tensor) -> torch.Tensor:
        rows = torch.nn.functional.conv2d(x, window.view(1, 1, -1, 1))
        return torch.nn.functional.conv2d(rows, window.view(1, 1, 1, -1))

    a, b = (torch.from_numpy(luma(x, np.float64))[:, None] for x in (frames, truth))
    mean_a, mean_b = mean(a), mean(b)
    variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
    return float(index.mean())


def _require_same(frames: np.ndarray, truth: np.ndarray) -> None:
    if frames.shape != truth.shape:
        raise ValueError(f"clips of {list(frames.shape)} and {list(truth.shape)} cannot be compared")


def luma(frames: np.ndarray, dtype: type[np.floating] = np.float32) -> np.ndarray:
    """BT.601 luma in 8-bit levels: uint8 [F,H,W,3] -> [F,H,W]."""
    return frames.astype(dtype) @ np.array(LUMA, dtype)


def laplacian(levels: np.ndarray) -> np.ndarray:
    """Laplacian of [F,H,W], whose variance measures sharpness: [F,H-2,W-2]."""
    around = levels[:, :-2, 1:-1] + levels[:, 2:, 1:-1] + levels[:, 1:-1, :-2] + levels[:, 1:-1, 2:]
    return around - 4 * levels[:, 1:-1, 1:-1]


@dataclass(frozen=True)
class ClipErrors:
    """Errors of one clip.

    Attributes:
        psnr (dB), ssim: means over frames; frame_psnr: of every frame.
        change: mean absolute error of the change from frame to frame.
        flicker: mean absolute change where the truth stands still; None where nothing does.
        seam: change error at the seams over that at the other boundaries of latents; None without either.
        drift: absolute error of the mean luma in the last frame minus that in the first.
        sharpness: variance of the luma's Laplacian, as a share of the truth's.
    """

    psnr: float
    ssim: float
    change: float
    flicker: float | None
    seam: float | None
    drift: float
    sharpness: float
    frame_psnr: tuple[float, ...]


Cuts = Sequence[tuple[np.ndarray, Sequence[int]]]
"""One clip decoded with different cuts into chunks, each with the numbers of the frames that begin a chunk."""


def clip_errors(frames: np.ndarray, truth: np.ndarray, boundaries: Sequence[int] = (), cuts: Cuts = ()) -> ClipErrors:
    """Errors of a clip.

    Args:
        boundaries: numbers of all frames that begin a latent, without the first; cuts: see `seam`.

    Raises:
        ValueError: clips of different shapes, or too small for SSIM.
    """
    each = [psnr(frames[i : i + 1], truth[i : i + 1]) for i in range(len(truth))]
    similar = [ssim(frames[i : i + 1], truth[i : i + 1]) for i in range(len(truth))]
    levels, true_levels = luma(frames), luma(truth)
    sharpness, true_sharpness = (float(laplacian(x).var((1, 2)).mean()) for x in (levels, true_levels))
    offset = (levels - true_levels).mean((1, 2))
    return ClipErrors(
        psnr=float(np.mean(each)),
        ssim=float(np.mean(similar)),
        change=float(change_errors(frames, truth).mean()) if len(truth) > 1 else 0.0,
        flicker=flicker(frames, truth),
        seam=seam(cuts, truth, boundaries),
        drift=float(abs(offset[-1]) - abs(offset[0])),
        sharpness=sharpness / max(true_sharpness, 1e-9),
        frame_psnr=tuple(each),
    )


def change_errors(frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean absolute error of every change from frame to frame: fp32 [F-1]."""
    wrong = np.diff(frames.astype(np.float32), axis=0) - np.diff(truth.astype(np.float32), axis=0)
    return np.abs(wrong).mean((1, 2, 3))


def flicker(frames: np.ndarray, truth: np.ndarray) -> float | None:
    """Mean absolute change of pixels that do not change in the truth; None where all do."""
    still = (np.diff(truth.astype(np.int16), axis=0) == 0).all(-1)  # [F-1,H,W]
    if not still.any():
        return None
    change = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(-1)
    return float(change[still].mean())


def seam(cuts: Cuts, truth: np.ndarray, boundaries: Sequence[int]) -> float | None:
    """Change error where chunks end over that where other latents begin: 1 where chunks leave no trace.

    Decoders make several frames of a latent together, so errors change where the next latent begins, whether a chunk
    ends there or not; hence the comparison with other beginnings. And some moments of a clip are harder than others;
    hence several cuts, in which every boundary should be the end of a chunk once. None without any end.
    """
    ends: list[float] = []
    others: list[float] = []
    for frames, starts in cuts:
        errors = change_errors(frames, truth)
        for number in boundaries:
            (ends if number in starts else others).append(float(errors[number - 1]))
    if not ends or not others:
        return None
    return float(np.mean(ends)) / max(float(np.mean(others)), 1e-9)
