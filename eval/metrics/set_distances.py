"""FID, FVD and FAD, each with its unbiased kernel distance, in the features of a network that the user gives.

    python -m eval.score clips=DIR reference=DIR metrics=fid fid.extractor=inception.pt
    python -m eval.score clips=DIR reference=DIR metrics=fad fad.extractor=vggish.onnx

No weights ship with this package. A value means something only beside others with the same extractor: its name and
fingerprint are in every result. Formats and how to wrap a network: `eval.extractor`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.clip_file import NotMeasured
from eval.extractor import Extractor, load_extractor, missing_extractor
from eval.fingerprint import fingerprint
from eval.metrics.registry import Metric, MissingDependency, SetMeasurement, plain_options
from magihuman.cli import option
from magihuman.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from eval.clip_file import ClipFile
    from eval.stats import Measure

_BATCH = 16
_DEVICE = "auto, cpu, cuda or cuda:0"


def _require_positive(name: str, **given: float) -> None:
    for setting, value in given.items():
        if not value > 0:
            raise UserError(f"{name}.{setting}={value} is impossible; give a positive number")


@dataclass
class FrameFeatures:
    """Settings of fid."""

    extractor: str | None = option("TorchScript or ONNX file: fp32 [B,3,size,size] in 0..1 -> [B,D]", None)
    frames: int = option("frames of each clip, evenly spaced", 8)
    size: int = option("height and width that frames are scaled to, without cropping", 299)
    device: str = option(_DEVICE, "auto")

    def __post_init__(self) -> None:
        _require_positive("fid", frames=self.frames, size=self.size)


@dataclass
class VideoFeatures:
    """Settings of fvd."""

    extractor: str | None = option("TorchScript or ONNX file: fp32 [B,3,window,size,size] in 0..1 -> [B,D]", None)
    window: int = option("frames of a window; a clip's windows follow each other without overlap", 16)
    fps: float | None = option("frames per second that clips are read at; none: their own", None)
    size: int = option("height and width that frames are scaled to, without cropping", 224)
    device: str = option(_DEVICE, "auto")

    def __post_init__(self) -> None:
        _require_positive("fvd", window=self.window, size=self.size, fps=1.0 if self.fps is None else self.fps)


@dataclass
class AudioFeatures:
    """Settings of fad."""

    extractor: str | None = option("TorchScript or ONNX file: fp32 [B,N] in -1..1 -> [B,D]", None)
    rate: int = option("samples per second", 16000)
    seconds: float = option("length of a window; a clip's windows follow each other without overlap", 1.0)
    device: str = option(_DEVICE, "auto")

    def __post_init__(self) -> None:
        _require_positive("fad", rate=self.rate, seconds=self.seconds)


@dataclass
class _Loaded:
    extract: Extractor
    options: Any


def _missing(name: str) -> Any:
    def missing(options: Any) -> MissingDependency | None:
        return missing_extractor(
            options.extractor, f"{name}.extractor", "network for the features (TorchScript or ONNX)"
        )

    return missing


def _load(options: Any) -> _Loaded:
    return _Loaded(load_extractor(Path(options.extractor), options.device), options)


def _identity(options: Any) -> Mapping[str, Any]:
    kept = {name: value for name, value in plain_options(options).items() if name not in ("extractor", "device")}
    return {"extractor": fingerprint(Path(options.extractor).expanduser()), **kept}


def _scaled(frames: "np.ndarray", size: int) -> "np.ndarray":
    """uint8 [F,H,W,3] -> fp32 [F,3,size,size] in 0..1, bilinear with antialiasing."""
    import torch
    from torch.nn.functional import interpolate

    images = torch.from_numpy(frames).permute(0, 3, 1, 2)
    # One frame at a time: a clip in fp32 at full size is large.
    scaled = [interpolate(i[None].float() / 255, (size, size), mode="bilinear", antialias=True) for i in images]
    return torch.cat(scaled).clamp(0, 1).numpy()


def _in_batches(extract: Extractor, inputs: "np.ndarray", batch: int) -> "np.ndarray":
    import numpy as np

    return np.concatenate([extract(inputs[first : first + batch]) for first in range(0, len(inputs), batch)])


def frame_features(clip: "ClipFile", model: _Loaded) -> "np.ndarray":
    """Features of evenly spaced frames, fp32 [k,D]; of all frames where there are fewer."""
    import numpy as np

    frames = clip.frames
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(model.options.frames, len(frames))).round().astype(int))
    return _in_batches(model.extract, _scaled(frames[chosen], model.options.size), _BATCH)


def video_features(clip: "ClipFile", model: _Loaded) -> "np.ndarray":
    """Features of consecutive windows of frames, fp32 [k,D]; a rest shorter than a window is left out.

    Raises:
        NotMeasured: the clip is shorter than one window.
    """
    options = model.options
    frames = clip.frames if options.fps is None else clip.frames_at(options.fps)
    count = len(frames) // options.window
    if not count:
        raise NotMeasured(f"it has {len(frames)} frames, and fvd.window={options.window} are needed")
    images = _scaled(frames[: count * options.window], options.size)
    windows = images.reshape(count, options.window, *images.shape[1:]).swapaxes(1, 2)
    return _in_batches(model.extract, windows, 1)


def audio_features(clip: "ClipFile", model: _Loaded) -> "np.ndarray":
    """Features of consecutive windows of audio, fp32 [k,D]; a shorter clip is filled up with silence, a rest left out."""
    import numpy as np

    options = model.options
    wave, length = clip.wave(options.rate), round(options.rate * options.seconds)
    count = max(1, len(wave) // length)
    wave = np.pad(wave, (0, max(0, length - len(wave))))[: count * length]
    return _in_batches(model.extract, wave.reshape(count, length), _BATCH)


def _compare(distance: str, kernel: str) -> Any:
    def compare(
        clips: "Sequence[np.ndarray]",
        reference: "Sequence[np.ndarray]",
        groups: Sequence[str],
        of_reference: Sequence[str],
    ) -> "Mapping[str, Measure]":
        from eval.set_distance import frechet, kernel_distance

        sets = (clips, reference, groups, of_reference)
        return {distance: frechet(*sets), kernel: kernel_distance(*sets)}

    return compare


def _metrics(distance: str, kernel: str, of: str) -> tuple[Metric, Metric]:
    return (
        Metric(
            distance,
            f"{distance.upper()}: Fréchet distance of {of}",
            direction="down",
            best=0.0,
            per_frame=of == "videos",
        ),
        Metric(
            kernel, f"{kernel.upper()}: unbiased kernel distance of {of}", direction="down", per_frame=of == "videos"
        ),
    )


def _measurement(
    name: str, kernel: str, of: str, features: Any, inputs: tuple[str, ...], options: type
) -> SetMeasurement:
    return SetMeasurement(
        name,
        _metrics(name, kernel, of),
        features,
        _compare(name, kernel),
        inputs=inputs,
        options=options,
        missing=_missing(name),
        load=_load,
        identity=_identity,
        version=2,
    )


MEASUREMENTS = (
    _measurement("fid", "kid", "frames", frame_features, ("frames",), FrameFeatures),
    _measurement("fvd", "kvd", "videos", video_features, ("frames",), VideoFeatures),
    _measurement("fad", "kad", "audio", audio_features, ("audio",), AudioFeatures),
)
