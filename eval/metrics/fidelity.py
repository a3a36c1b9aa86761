"""Fidelity of a clip to its reference, frame by frame: PSNR, SSIM, MS-SSIM, and whether the picture is mirrored.

For clips that should equal the reference: decoded latents, super-resolution, planted faults. A new sample of the same
prompt differs in every pixel, and nothing follows from its PSNR.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.clip_file import NotMeasured, UnreadableClip
from eval.image_metrics import CEILING, WINDOW, ssim
from eval.metrics.picture import spread
from eval.metrics.registry import Measurement, Metric, missing_package
from eval.optical_flow import small_luma

if TYPE_CHECKING:
    from eval.clip_file import ClipFile

SHORT_SIDE = 256
"""SSIM is measured at about this height, as its authors advise for pictures seen from a usual distance (ssim.m, `f`)."""
MOST_FRAMES = 10
"""Frames, spread evenly over the clip, that SSIM and MS-SSIM are measured on. PSNR is measured on all."""
LEAST_SIDE = WINDOW * 2**4
"""Shorter side below which the last of the five scales of MS-SSIM is smaller than the window."""


def measure_fidelity(clip: "ClipFile", options: Any = None) -> dict[str, float | NotMeasured]:
    """Values of `MEASUREMENTS` for a clip and its reference, over the frames that both have.

    Raises:
        NotMeasured: without a reference, or the two differ in size or frame rate, or by over a tenth in length.
    """
    frames, truth = _pair(clip)
    chosen = spread(len(frames), MOST_FRAMES)
    small, small_truth = (small_luma(x[chosen], SHORT_SIDE) for x in (frames, truth))
    side = min(small.shape[1:])

    def too_small(least: int) -> NotMeasured:
        return NotMeasured(f"it needs {least} pixels on the shorter side, and the clip has {side}")

    values: dict[str, float | NotMeasured] = {"clip_psnr": psnr_of_clips(frames, truth)}
    if side < WINDOW:
        return values | dict.fromkeys(("clip_ssim", "mirror_margin", "clip_ms_ssim"), too_small(WINDOW))
    same = _ssim(small, small_truth)
    values["clip_ssim"] = same
    values["mirror_margin"] = same - _ssim(small, small_truth[:, :, ::-1])
    values["clip_ms_ssim"] = _ms_ssim(small, small_truth) if side >= LEAST_SIDE else too_small(LEAST_SIDE)
    return values


@contextmanager
def _of_reference(reference: "ClipFile") -> Iterator[None]:
    """Says of an error that it is the reference's."""
    try:
        yield
    except (NotMeasured, UnreadableClip) as error:
        raise type(error)(f"its reference {reference.path.name}: {error}") from error


def _pair(clip: "ClipFile") -> tuple[np.ndarray, np.ndarray]:
    reference = clip.reference
    if reference is None:
        raise NotMeasured("the clip has no reference")
    with _of_reference(reference):
        _ = reference.info.kind
    ours, theirs = (f"{c.info.width}x{c.info.height} at {c.fps:.4g} fps" for c in (clip, reference))
    if ours != theirs:
        raise NotMeasured(
            f"it is {ours} and its reference {theirs}: pixels can only be compared at the same size and rate"
        )
    frames = clip.frames
    with _of_reference(reference):
        truth = reference.frames
    if abs(len(frames) - len(truth)) > 0.1 * len(truth):
        raise NotMeasured(f"it has {len(frames)} frames and its reference {len(truth)}: over a tenth apart")
    count = min(len(frames), len(truth))
    return frames[:count], truth[:count]


def psnr_of_clips(frames: np.ndarray, truth: np.ndarray) -> float:
    """PSNR in dB of the squared error of all frames uint8 [F,H,W,3] together; `image_metrics.CEILING` where they are equal."""
    import cv2

    error = sum(cv2.norm(a, b, cv2.NORM_L2SQR) for a, b in zip(frames, truth, strict=True)) / frames.size
    return float(min(CEILING, 10 * np.log10(255**2 / max(error, 1e-12))))


def _ssim(luma: np.ndarray, truth: np.ndarray) -> float:
    # One frame at a time, to spare memory; the luma of grey RGB is the grey.
    return float(np.mean([ssim(np.repeat(a[None, ..., None], 3, -1), np.repeat(b[None, ..., None], 3, -1))
                          for a, b in zip(luma, truth, strict=True)]))  # fmt: skip


def _ms_ssim(luma: np.ndarray, truth: np.ndarray) -> float:
    import torch
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

    pairs = (
        (torch.from_numpy(x.astype(np.float32))[None, None] for x in pair) for pair in zip(luma, truth, strict=True)
    )
    return float(np.mean([float(ms_ssim(a, b, data_range=255.0)) for a, b in pairs]))


PICTURE_FAULTS = ("blur", "pixel_noise", "compression", "desaturate", "overexpose", "flicker")

MEASUREMENTS = (
    Measurement(
        "fidelity",
        (
            Metric("clip_psnr", "PSNR to the reference", "dB", "up", best=CEILING, sees=PICTURE_FAULTS),
            Metric("clip_ssim", "SSIM to the reference", direction="up", best=1.0, sees=("blur", "pixel_noise", "compression")),
            Metric("clip_ms_ssim", "MS-SSIM to the reference", direction="up", best=1.0,
                   sees=("blur", "pixel_noise", "compression")),
            Metric("mirror_margin", "SSIM to the reference minus that to its mirror image", direction="up", sees=("mirror",)),
        ),
        measure_fidelity,
        inputs=("frames", "reference"),
        version=2,
        missing=lambda options: missing_package("cv2", "opencv-python-headless"),
    ),
)  # fmt: skip
