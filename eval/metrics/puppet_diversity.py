"""Metrics of several clips per prompt of puppets, and distances to real puppets; measured by `eval.paired`."""

from eval.metrics.registry import Metric

METRICS = (
    Metric("nearest", "appearance: distance to the nearest real puppet", direction="target"),
    Metric("energy_look", "appearance: energy distance to real puppets", direction="down", margin=0.005),
    Metric("energy_motion", "motion: energy distance to real puppets", direction="down", margin=0.005),
    Metric("energy_voice", "voice: energy distance to real puppets", direction="down", margin=0.005),
    Metric("spread_look", "diversity of appearance: distance of a prompt's clips", direction="target"),
    Metric("spread_motion", "diversity of motion: distance of a prompt's clips", direction="target"),
    Metric("spread_voice", "diversity of voice: distance of a prompt's clips", direction="target"),
    Metric("pitch", "diversity of pitch: deviation within a prompt", "semitones", "target"),
    Metric("timing", "diversity of speech timing: deviation within a prompt", "ms", "target"),
)
