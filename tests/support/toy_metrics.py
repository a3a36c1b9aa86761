"""Metric files and clips for tests of the scoring: a file of metrics is written, found and forgotten again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import eval.metrics
from eval.metrics import registry
from eval.score_rows import ClipRow, Value

HEAD = """
from pathlib import Path
from eval.clip_file import MeasurementError, NotMeasured
from eval.metrics.registry import Measurement, Metric, MissingDependency, SetMeasurement
from magihuman.cli import option
from dataclasses import dataclass
CALLS = Path(__file__).parent / "calls.txt"
def note(text):
    with CALLS.open("a") as file:
        file.write(text + "\\n")
"""


@contextmanager
def metric_file(folder: Path, text: str, name: str = "toy_measurements") -> Iterator[None]:
    """A file of metrics that the registry finds beside its own; `note(text)` in it writes a line for `calls`."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(HEAD + text)
    _forget(name)
    eval.metrics.__path__.append(str(folder))
    try:
        yield
    finally:
        eval.metrics.__path__.remove(str(folder))
        _forget(name)


def _forget(name: str) -> None:
    import sys

    sys.modules.pop(f"eval.metrics.{name}", None)
    for known in (registry._modules, registry.measurements, registry.metrics):
        known.cache_clear()


def calls(folder: Path) -> list[str]:
    """Lines that measurements noted, and forgets them."""
    file = folder / "calls.txt"
    lines = file.read_text().split() if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def write_clip(
    path: Path, level: int = 100, frames: int = 10, audio: bool = True, size: int = 32, fps: float = 25.0
) -> Path:
    """A clip of one grey `level` with a moving bright square, and a tone."""
    from magihuman.media.mp4 import write_mp4

    images = np.full((frames, size, size, 3), level, np.uint8)
    for number in range(frames):
        images[number, 4:12, 2 + number % (size - 12) : 10 + number % (size - 12)] = 220
    samples = round(frames / fps * 16000)
    wave = 0.3 * np.sin(2 * np.pi * 220 * np.arange(samples) / 16000).astype(np.float32)[None]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, images, fps, wave if audio else None, 16000 if audio else 0)
    return path


TOY = """
def brightness(clip, _):
    note("toy_brightness")
    return {"toy_brightness": float(clip.frames.mean())}

def loud(clip, _):
    note("toy_loud")
    return {"toy_loud": float(abs(clip.wave(16000)).mean()), "toy_text": clip.name}

def worded(clip, options):
    note("toy_words")
    if "nan" in clip.prompt:
        return {"toy_words": float("nan")}
    if "parse" in clip.prompt:
        raise MeasurementError("the answer has no digit")
    if "crash" in clip.prompt:
        raise ZeroDivisionError("of nothing")
    return {"toy_words": len(clip.prompt.split()) * options.factor, "toy_units": 2}

@dataclass(frozen=True)
class ToyOptions:
    factor: int = option("multiplies the words", 1)

MEASUREMENTS = (
    Measurement("toy_brightness", (Metric("toy_brightness", "brightness", direction="target"),), brightness),
    Measurement("toy_loud", (Metric("toy_loud", "loudness", "dB", "up"),), loud, inputs=("audio",)),
    Measurement(
        "toy_words", (Metric("toy_words", "words", direction="down", weight="toy_units"), Metric("toy_units", "units")),
        worded, inputs=("prompt",), options=ToyOptions,
    ),
    Measurement(
        "toy_absent", (Metric("toy_absent", "absent"),), brightness, costly=True,
        missing=lambda options: MissingDependency("there are no weights", "hf download toy/toy"),
    ),
)
"""
NAMES = ["toy_brightness", "toy_loud", "toy_words"]


def row(clip: str, group: str = "", **values: float | None) -> ClipRow:
    """A row with values by metric; None is a failure."""
    found = {key: Value(v) if v is not None else Value(None, "failed", "broken") for key, v in values.items()}
    return ClipRow(clip, group or clip, "", None, None, found)
