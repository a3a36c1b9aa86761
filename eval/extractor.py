"""A network that a user gives as a file, TorchScript or ONNX: arrays in, feature vectors out.

    extractor = load_extractor(Path("inception.pt"), device="auto")
    extractor(images)      # fp32 [B,3,299,299] -> fp32 [B,D]

Both formats hold a graph of operations, no Python code. A network with other inputs than a metric's layout is wrapped once
by its owner: `torch.jit.script(Wrapper(net)).save("wrapped.pt")`.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from eval.clip_file import MeasurementError
from eval.metrics.registry import MissingDependency, missing_package
from magihuman.errors import UserError

Extractor = Callable[[np.ndarray], np.ndarray]
"""fp32 [B,...] -> fp32 [B,D], finite; raises MeasurementError, or MemoryError where the device has not enough."""


def missing_extractor(path: str | Path | None, option: str, content: str) -> MissingDependency | None:
    """What `load_extractor` lacks: the file, or onnxruntime for an .onnx file; arguments as of `missing_file`."""
    from eval.fingerprint import missing_file

    if path is not None and Path(path).suffix == ".onnx" and (missing := missing_package("onnxruntime")):
        return missing
    return missing_file(path, option, content)


def load_extractor(path: Path, device: str = "auto") -> Extractor:
    """The network of a file: .onnx through onnxruntime, anything else as TorchScript.

    Args:
        device: auto, cpu, cuda or cuda:0.

    Raises:
        UserError: the file cannot be loaded.
    """
    path = path.expanduser()
    try:
        run = _onnx(path, device) if path.suffix == ".onnx" else _torchscript(path, device)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is no readable ONNX (.onnx) or TorchScript file: {_first_line(error)}") from error

    def extract(batch: np.ndarray) -> np.ndarray:
        try:
            found = run(np.ascontiguousarray(batch, np.float32))
        except Exception as error:
            # TorchScript and ONNX have no type of error for it. It says nothing of the clip, and is tried again.
            if "memory" in str(error).lower():
                raise MemoryError(f"{path.name}: {_first_line(error)}") from error
            raise MeasurementError(f"{path.name} refuses an input {list(batch.shape)}: {_first_line(error)}") from error
        if len(found) != len(batch):
            raise MeasurementError(f"{path.name} gives {list(found.shape)} for {len(batch)} inputs; wanted [B,D]")
        features = found.reshape(len(found), -1).astype(np.float32)
        if not np.isfinite(features).all():
            raise MeasurementError(f"{path.name} gives NaN or infinity")
        return features

    return extract


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The last line of a TorchScript traceback is the error; further sentences are torch's guesses.
    return (lines[-1].partition(". ")[0] if lines else type(error).__name__)[:200]


def _torchscript(path: Path, device: str) -> Extractor:
    import torch

    from inference.loading import choose_device

    place = choose_device(device)
    network = torch.jit.load(str(path), map_location=place).eval()

    def run(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            found = network(torch.from_numpy(batch).to(place))
        return (found[0] if isinstance(found, list | tuple) else found).float().cpu().numpy()

    return run


def _onnx(path: Path, device: str) -> Extractor:
    import onnxruntime

    wanted = [] if device == "cpu" else ["CUDAExecutionProvider"]
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(str(path), providers=[*providers, "CPUExecutionProvider"])
    given = session.get_inputs()[0]

    def run(batch: np.ndarray) -> np.ndarray:
        # Many face models were exported for one image at a time.
        parts = np.split(batch, len(batch)) if given.shape[:1] == [1] else [batch]
        return np.concatenate([session.run(None, {given.name: part})[0] for part in parts])

    return run
