"""Motion of a clip without a reference: how much and how fast, frozen and repeated frames, flicker, errors along the flow.

Motion is per second. The others look from frame to frame: every second frame of a made clip has 0.98 times the motion, but
1.8 times the change where nothing moves and 2.2 times the residual, and of a clip with noise 1.2 and 1.9 times. No division by
the time between frames suits both motion, which grows with it, and noise, which does not; hence `per_frame`.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from eval.clip_file import NotMeasured
from eval.metrics.registry import Measurement, Metric, missing_package
from eval.optical_flow import STILL, motion_of

if TYPE_CHECKING:
    from eval.clip_file import ClipFile
    from eval.optical_flow import Motion

FROZEN_SECONDS = 0.25
"""Repeats that last as long are frozen frames; shorter ones are repeated frames, as of a low frame rate."""
SAME = 2.0
"""8-bit levels: frames are the same where no block of 16 x 16 pixels changes by more, on average; coding alone changes less."""
LEAST_STILL, LEAST_MOVING = 0.02, 0.005
"""Shares of all pixels below which nothing is said of what is still, or of what moves: noise of the coding is left."""
BLOCK = 16


def measure_motion(clip: "ClipFile", options: Any = None) -> dict[str, float | NotMeasured]:
    """Values of `MEASUREMENTS` for a clip; of one where nothing moves, or everything does, some are a `NotMeasured`.

    Raises:
        NotMeasured: fewer than three frames.
    """
    motion = motion_of(clip)
    magnitude = motion.magnitude
    per_frame = magnitude.mean((1, 2), dtype=np.float32)
    moving = magnitude >= STILL
    share = float(moving.mean())
    frozen, repeated = repeats(motion)
    still = still_change(motion)
    return {
        "motion": float(per_frame.mean()),
        "motion_speed": float(magnitude[moving].mean(dtype=np.float64))
        if share >= LEAST_MOVING
        else NotMeasured(f"less than {LEAST_MOVING:.1%} of its picture moves"),
        "moving_share": share,
        "frozen_share": frozen,
        "repeated_share": repeated,
        "luma_flicker": NotMeasured(f"less than {LEAST_STILL:.0%} of its picture is still") if still is None else still,
        "brightness_flicker": brightness_flicker(motion),
        "warping_error": warping_error(motion),
        "interpolation_residual": interpolation_residual(motion),
    }


def repeats(motion: "Motion") -> tuple[float, float]:
    """Shares of the steps between frames without a change: in runs of at least `FROZEN_SECONDS`, and in shorter ones."""
    change = motion.change()
    rows, columns = (max(1, size // BLOCK) for size in change.shape[1:])
    height, width = change.shape[1] // rows, change.shape[2] // columns
    blocks = change[:, : rows * height, : columns * width].reshape(-1, rows, height, columns, width)
    same = blocks.mean((2, 4)).max((1, 2)) <= SAME
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]])))
    lengths = edges[1::2] - edges[::2]
    long = lengths[lengths / motion.fps >= FROZEN_SECONDS].sum()
    return float(long / len(same)), float((lengths.sum() - long) / len(same))


def still_change(motion: "Motion") -> float | None:
    """Mean change of the luma where nothing moves, 8-bit levels; None where less than `LEAST_STILL` of the picture is still.

    A pixel is still where the flow, averaged over five steps, is: noise in the flow would else pick the pixels that
    happen to change least.
    """
    from scipy.ndimage import uniform_filter1d

    scale = motion.fps / motion.luma.shape[1]
    x, y = (uniform_filter1d(motion.flow[..., axis].astype(np.float32), 5, axis=0) for axis in (0, 1))
    still = np.hypot(x, y) * scale < STILL
    return float(motion.change()[still].mean()) if still.mean() >= LEAST_STILL else None


def brightness_flicker(motion: "Motion") -> float:
    """Mean distance of a frame's mean luma from that between its neighbours, 8-bit levels: a fade has none."""
    level = motion.luma.mean((1, 2))
    return float(np.abs(level[1:-1] - (level[:-2] + level[2:]) / 2).mean())


def warping_error(motion: "Motion") -> float:
    """Mean absolute difference of a frame and the next one warped back along the flow, 8-bit levels (Lai et al. 2018,
    without their mask of occlusions)."""
    import cv2

    height, width = motion.luma.shape[1:]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    errors = []
    for before, after, flow in zip(motion.luma, motion.luma[1:], motion.flow, strict=False):
        x, y = columns + flow[..., 0], rows + flow[..., 1]
        warped = cv2.remap(after, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
        errors.append(np.abs(warped.astype(np.float32) - before)[inside].mean() if inside.any() else 0.0)
    return float(np.mean(errors))


def interpolation_residual(motion: "Motion") -> float:
    """Mean absolute difference of a frame and the mean of its neighbours, 8-bit levels: uneven motion and noise raise it."""
    luma = motion.luma
    residuals = [
        np.abs(luma[i].astype(np.float32) - (luma[i - 1].astype(np.float32) + luma[i + 1]) / 2).mean()
        for i in range(1, len(luma) - 1)
    ]
    return float(np.mean(residuals))


MEASUREMENTS = (
    Measurement(
        "motion",
        (
            Metric("motion", "motion: mean optical flow", "frame heights/s", "target", sees=("slow", "freeze")),
            Metric("motion_speed", "speed of what moves", "frame heights/s", "target", sees=("slow",)),
            Metric("moving_share", "share of the picture that moves", direction="target", sees=("freeze",)),
            Metric("frozen_share", "frozen frames", "share", "down", best=0.0, sees=("freeze",), per_frame=True),
            Metric("repeated_share", "repeated frames", "share", "down", best=0.0, sees=("judder",), per_frame=True),
            Metric("luma_flicker", "change where nothing moves", "8-bit levels", "down", best=0.0, sees=("pixel_noise",),
                   per_frame=True),
            Metric("brightness_flicker", "flicker of the brightness", "8-bit levels", "down", best=0.0, sees=("flicker",),
                   per_frame=True),
            Metric("warping_error", "warping error along the flow", "8-bit levels", "down", best=0.0, sees=("pixel_noise",),
                   per_frame=True),
            Metric("interpolation_residual", "residual to the neighbouring frames", "8-bit levels", "target",
                   sees=("slow", "pixel_noise", "flicker"), per_frame=True),
        ),
        measure_motion,
        version=2,
        missing=lambda options: missing_package("cv2", "opencv-python-headless"),
    ),
)  # fmt: skip
