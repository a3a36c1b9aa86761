"""Mixing sound to one or two channels and changing its sample rate, by ffmpeg's filters.

Waveforms are fp32 arrays [lanes,n].
"""

from fractions import Fraction
from typing import Any

import numpy as np


def mix(wave: np.ndarray, layout: str, rate: int, channels: int) -> np.ndarray:
    """[lanes,n] -> [channels,n] for one or two channels; a mono signal keeps its level."""
    if wave.shape[0] > 2:
        wave = _filtered(wave, layout, rate, "aresample=rematrix_maxval=1.0,aformat=channel_layouts=stereo")
    if channels == 1:
        return wave.mean(axis=0, keepdims=True)
    return np.repeat(wave, 2, axis=0) if wave.shape[0] == 1 else wave


def resample(wave: np.ndarray, source: int, target: int) -> np.ndarray:
    """[lanes,n] at `source` Hz -> [lanes, about n * target / source] at `target` Hz, for one or two lanes."""
    if source == target or not wave.shape[1]:
        return wave
    return _filtered(wave, "mono" if wave.shape[0] == 1 else "stereo", source, f"aresample={target}")


def _filtered(wave: np.ndarray, layout: str, rate: int, filters: str) -> np.ndarray:
    """A waveform fp32 [lanes,n] through a chain of ffmpeg audio filters."""
    import av

    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=rate, format="fltp", layout=layout, time_base=Fraction(1, rate))
    nodes = [source]
    for item in filters.split(","):
        name, _, arguments = item.partition("=")
        nodes.append(graph.add(name, arguments))
    nodes.append(graph.add("abuffersink"))
    graph.link_nodes(*nodes).configure()
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave), format="fltp", layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    source.push(frame)
    source.push(None)
    sink: Any = nodes[-1]
    parts = []
    while True:
        try:
            parts.append(sink.pull().to_ndarray())
        except (av.error.EOFError, av.error.BlockingIOError):
            return np.concatenate(parts, axis=1) if parts else wave[:, :0]
