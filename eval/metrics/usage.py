"""Metrics of cost: parameters, arithmetic, time and memory."""

from eval.metrics.registry import Metric

METRICS = (
    Metric("parameters", "parameters", "M", "down"),
    Metric("flops", "GFLOP per clip", direction="down"),
    Metric("seconds", "processor seconds per clip", direction="down"),
    Metric("streaming", "largest difference of decoding in chunks and at once", direction="down"),
    Metric("seconds_per_clip", "denoising", "s per clip", "down"),
    Metric("calls", "network calls per clip", direction="down"),
    Metric("state_mb", "training state in a checkpoint", "MB", "down"),
    Metric("process_gb", "peak memory of the training process", "GB", "down"),
)
