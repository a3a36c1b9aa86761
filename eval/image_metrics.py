"""How near pictures are to the true ones: PSNR and SSIM of clips, frame by frame."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SPREAD = 11, 1.5  # of SSIM's Gaussian window, in pixels
K1, K2 = 0.01, 0.03
LUMA = (0.299, 0.587, 0.114)
CEILING = 99.0  # dB reported for equal pictures


def psnr(frames: np.ndarray, truth: np.ndarray, where: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of uint8 [F,H,W,3], over all frames or over the pixels `where` [H,W] bool.

    Raises:
        ValueError: clips of different shapes.
    """
    if frames.shape != truth.shape:
        raise ValueError(f"clips of {list(frames.shape)} and {list(truth.shape)} cannot be compared")
    error = np.square(frames.astype(np.float32) - truth.astype(np.float32))
    mean = float(error.mean() if where is None else error[:, where].mean())
    return CEILING if mean == 0 else min(CEILING, 10 * float(np.log10(255**2 / mean)))


def ssim(frames: np.ndarray, truth: np.ndarray) -> float:
    """Mean structural similarity of the luma, uint8 [F,H,W,3] (Wang et al. 2004: 11 x 11 Gaussian, K .01 and .03).

    Raises:
        ValueError: clips of different shapes, or pictures smaller than the window.
    """
    if frames.shape != truth.shape:
        raise ValueError(f"clips of {list(frames.shape)} and {list(truth.shape)} cannot be compared")
    if min(frames.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {WINDOW} pixels, not {list(frames.shape[1:3])}")
    a, b = (_luma(x) for x in (frames, truth))
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    both = _blur(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def _luma(frames: np.ndarray) -> Tensor:
    """[F,1,H,W] fp64 in [0,1]."""
    weights = torch.tensor(LUMA, dtype=torch.float64)
    return (torch.from_numpy(np.ascontiguousarray(frames)).double() / 255 @ weights)[:, None]


def _blur(x: Tensor) -> Tensor:
    place = torch.arange(WINDOW, dtype=x.dtype) - WINDOW // 2
    window = torch.exp(-(place**2) / (2 * SPREAD**2))
    window = window / window.sum()
    return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
