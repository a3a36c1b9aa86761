"""Metrics against the true frames, of second stages and decoders; measured by `eval.sr` and `eval.turbo_vae`."""

from eval.metrics.registry import Metric

METRICS = (
    Metric("psnr", "PSNR", "dB", "up"),
    Metric("mouth_psnr", "PSNR around the mouth", "dB", "up"),
    Metric("ssim", "SSIM", direction="up", best=1),
    Metric("change", "error of the change between frames", "8-bit levels", "down", best=0),
    Metric("still_flicker", "change where the truth stands still", "8-bit levels", "down", best=0),
    Metric("seam", "change error at chunk ends over that elsewhere (target: 1)", direction="target", target=1),
    Metric(
        "drift", "growth of the luma error from first to last frame (target: 0)", "8-bit levels", "target", target=0
    ),
    Metric("sharpness_ratio", "sharpness over the truth's (target: 1)", direction="target", target=1),
)
