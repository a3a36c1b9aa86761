"""Look of single frames without a reference: sharpness, noise, colour, brightness; on `MOST_FRAMES` frames at full size."""

from typing import TYPE_CHECKING, Any

import numpy as np

from eval.metrics.registry import Measurement, Metric, missing_package

if TYPE_CHECKING:
    from eval.clip_file import ClipFile

MOST_FRAMES = 32
"""Frames spread evenly over a clip: measures of single frames hardly change from one to the next."""
DARK, BRIGHT = 2, 253
"""8-bit levels of the luma at or beyond which a pixel counts as clipped."""


def spread(count: int, most: int = MOST_FRAMES) -> np.ndarray:
    """Numbers of at most `most` frames of `count`, spread evenly with both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def measure_picture(clip: "ClipFile", options: Any = None) -> dict[str, float | None]:
    """Values of `MEASUREMENTS` for a clip."""
    frames = clip.frames
    found = [_of_frame(frames[index]) for index in spread(len(frames))]
    return {key: float(np.mean([values[key] for values in found])) for key in found[0]}


def _of_frame(frame: np.ndarray) -> dict[str, float]:
    import cv2

    luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    edges = cv2.Laplacian(luma, cv2.CV_32F)
    # Immerkaer 1996: the difference of two Laplacians is blind to constant and linear parts of the picture.
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    residual = cv2.filter2D(luma, cv2.CV_32F, mask)[1:-1, 1:-1]
    return {
        # Decibels: sharpness differs by factors between pictures.
        "picture_sharpness": 10 * float(np.log10(max(float(edges[1:-1, 1:-1].var()), 1e-3))),
        "noise_level": float(np.sqrt(np.pi / 2) * np.abs(residual).mean() / 6) if residual.size else 0.0,
        "colourfulness": colourfulness(frame),
        "brightness": float(luma.mean()),
        "clipped_pixels": float(((luma <= DARK) | (luma >= BRIGHT)).mean()),
    }


def colourfulness(frame: np.ndarray) -> float:
    """Colourfulness of uint8 [H,W,3] (Hasler and Suesstrunk 2003): 0 of grey, about 15 slightly, 80 highly colourful."""
    # Means of products of small whole numbers are exact in float64; int16 arrays keep memory at 4 bytes per pixel.
    red, green, blue = (frame[..., channel].astype(np.int16) for channel in range(3))
    across, along = red - green, (red + green - 2 * blue)  # the second one is twice the paper's yb
    deviations = float(np.hypot(across.std(dtype=np.float64), along.std(dtype=np.float64) / 2))
    return deviations + 0.3 * float(np.hypot(across.mean(dtype=np.float64), along.mean(dtype=np.float64) / 2))


MEASUREMENTS = (
    Measurement(
        "picture",
        (
            Metric("picture_sharpness", "sharpness: variance of the Laplacian", "dB", "target", sees=("blur", "pixel_noise")),
            Metric("noise_level", "noise of single frames (Immerkaer)", "8-bit levels", "down", sees=("pixel_noise",)),
            Metric("colourfulness", "colourfulness (Hasler-Suesstrunk)", direction="target", sees=("desaturate",)),
            Metric("brightness", "brightness: mean luma", "8-bit levels", "target", sees=("overexpose",)),
            Metric("clipped_pixels", "black or white pixels", "share", "down"),
        ),
        measure_picture,
        missing=lambda options: missing_package("cv2", "opencv-python-headless"),
    ),
)  # fmt: skip
