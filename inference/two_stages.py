"""A pipeline of both stages from one of them, for sample clips during the training of the second."""

from inference.pipeline import Pipeline
from magihuman import zoo
from magihuman.codecs.bundle import CodecBundle
from magihuman.zoo import Loaded

_first: dict[tuple[str, str], Loaded] = {}


def with_first_stage(loaded: Loaded, codecs: CodecBundle, first: str) -> Pipeline:
    """The second stage `loaded` behind the checkpoint `first`, which is read once per process, to the same device.

    Raises:
        UserError: a checkpoint that cannot be found, or of other codecs.
    """
    device = next(loaded.denoiser.parameters()).device
    key = first, str(device)
    if key not in _first:
        _first[key] = zoo.load(first, device)
    return Pipeline(_first[key], codecs, second=loaded)
