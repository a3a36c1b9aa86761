"""PSNR and SSIM of clips against the true frames, by torchmetrics.

psnr(frames, truth), ssim(frames, truth)   # uint8 [F,H,W,3]
"""

import numpy as np

LUMA = (0.299, 0.587, 0.114)
CEILING = 99.0  # dB reported for equal frames
WINDOW = 11  # pixels, of SSIM's Gaussian of deviation 1.5


def psnr(frames: np.ndarray, truth: np.ndarray, where: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of uint8 [F,H,W,3], over all frames or over the pixels `where` [H,W] bool.

    Raises:
        ValueError: clips of different shapes.
    """
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _require_same(frames, truth)
    a, b = (torch.from_numpy((x if where is None else x[:, where]).astype(np.float64)) for x in (frames, truth))
    return min(CEILING, float(peak_signal_noise_ratio(a, b, data_range=255.0)))


def ssim(frames: np.ndarray, truth: np.ndarray) -> float:
    """Mean structural similarity of the luma, uint8 [F,H,W,3] (Wang et al. 2004: 11 x 11 Gaussian, K .01 and .03).

    Raises:
        ValueError: clips of different shapes, or frames smaller than the window.
    """
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    _require_same(frames, truth)
    if min(frames.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs frames of at least {WINDOW} pixels, not {list(frames.shape[1:3])}")
    a, b = (torch.from_numpy(luma(x, np.float64))[:, None] for x in (frames, truth))
    found = structural_similarity_index_measure(a, b, sigma=1.5, data_range=255.0, return_full_image=True)
    edge = WINDOW // 2  # torchmetrics' own mean counts windows beyond the edges, which the published index does not
    return float(found[1][..., edge:-edge, edge:-edge].mean())


def _require_same(frames: np.ndarray, truth: np.ndarray) -> None:
    if frames.shape != truth.shape:
        raise ValueError(f"clips of {list(frames.shape)} and {list(truth.shape)} cannot be compared")


def luma(frames: np.ndarray, dtype: type[np.floating] = np.float32) -> np.ndarray:
    """BT.601 luma in 8-bit levels: uint8 [F,H,W,3] -> [F,H,W]."""
    return frames.astype(dtype) @ np.array(LUMA, dtype)
