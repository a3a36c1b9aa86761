"""The Turbo decoder against stored clips of every length around its windows."""

import torch

from magihuman.codecs.turbo_vaed import TurboCodec, TurboConfig
from magihuman.zoo.checks import Case, Result, compare

TURBO = 1e-4


def check_turbo(case: Case) -> list[Result]:
    """Names and parameters, one window as first and as later one, then whole clips through the windows."""
    config = TurboConfig.from_json(case.meta["config"])
    tensors = case.tensors
    codec = TurboCodec.from_released(case.group("w/"), config, case.name, tensors["mean"], tensors["std"])
    names = set(codec.state_dict()) ^ set(case.meta["keys"])
    parameters = sum(parameter.numel() for parameter in codec.parameters())
    results = [
        Result("names that differ", float(len(names)), 0.0),
        Result("parameters", float(abs(parameters - case.meta["num_params"])), 0.0),
    ]
    window = codec.denormalise(tensors[f"len{case.meta['lens'][0]}/z"])
    with torch.no_grad():
        for name, first in (("raw/first_chunk_true", True), ("raw/first_chunk_false", False)):
            results.append(compare(name, codec.decoder(window, first), tensors[name], TURBO))
        for length in case.meta["lens"]:
            clip = codec.decode(tensors[f"len{length}/z"])
            results.append(compare(f"len{length}/video", clip, tensors[f"len{length}/video"], TURBO))
    return results
