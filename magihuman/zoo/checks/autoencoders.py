"""Video VAE, audio VAE and Turbo decoder against stored encodings and decodings, with weights under released names."""

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from magihuman.codecs import oobleck, wan
from magihuman.codecs.oobleck import OobleckCodec, cross_fade
from magihuman.codecs.turbo_vaed import TurboCodec, TurboConfig
from magihuman.codecs.wan import WanCodec
from magihuman.media.images import to_playback_rate
from magihuman.zoo.checks import Parameters, Result, Unsupported, VectorCase, agree, compare
from magihuman.zoo.checks.network import vector_arithmetic

VAE = 1e-4
RESAMPLE = 1e-5
TURBO = 1e-4
AUDIO_RATE = 51200
LONGEST_AUDIO = 600 * AUDIO_RATE
_WAN_NAMES = {"base_dim": "dim", "decoder_base_dim": "dec_dim"}


def check_wan(case: VectorCase) -> list[Result]:
    """Key map, normalised latents and unclamped frames at every stored length."""
    state = case.group("w/")
    codec = WanCodec.from_released(state, case.name, case.tensors["mean"], case.tensors["std"])
    found = wan.released_config(state, case.name)
    ours = {_WAN_NAMES.get(name, name): value for name, value in found.items()}
    results = [agree(name, ours[name], case.meta[name]) for name in ours if name in case.meta]
    results += _key_map(case, wan.key_map(codec.vae))
    with vector_arithmetic():
        for name in sorted(key.removesuffix("/video") for key in case.tensors if key.endswith("/video")):
            stored = case.group(f"{name}/")
            results.append(compare(f"{name}/latent", codec.encode(stored["video"]), stored["latent"], VAE))
            results.append(compare(f"{name}/decoded", codec.decode(stored["latent"]), stored["decoded"], VAE))
    return results


def check_wan_statistics(case: VectorCase) -> list[Result]:
    """The published means and standard deviations of the latent channels."""
    ours = {"mean": wan.LATENT_MEAN, "std": wan.LATENT_STD}
    return [
        compare(name, torch.tensor(values, dtype=torch.float64), case.tensors[name]) for name, values in ours.items()
    ]


def check_oobleck(case: VectorCase) -> list[Result]:
    """Key map, a bottleneck sample with the stored noise, and a decoded waveform."""
    codec = _oobleck(case)
    sound, noise = case.tensors["enc/wav"][None], case.tensors["enc/noise"].transpose(1, 2)
    latent = case.tensors["dec/latent"].T[None]
    return [
        *_key_map(case, oobleck.key_map(codec.vae)),
        _compare_audio("enc/latent", codec, lambda: _encode(codec, sound, [noise]), case.tensors["enc/latent"]),
        _compare_audio("dec/wav", codec, lambda: codec.decode(latent), case.tensors["dec/wav"]),
    ]


def check_audio_encode(case: VectorCase) -> list[Result]:
    """A waveform, in one piece or in cross-faded windows, with the stored noise per window."""
    codec, seconds, samples = _oobleck(case), case.meta["seconds"], case.meta["samples"]
    if samples > LONGEST_AUDIO:
        raise Unsupported(f"samples={samples} is stated, and {LONGEST_AUDIO} is the most")
    sound = _test_audio(samples)
    sound = sound if seconds is None else sound[: int(seconds * AUDIO_RATE)]
    stored = case.group("noise/")
    noise = [stored[str(index)].transpose(1, 2) for index in range(len(stored))]
    return [_compare_audio("out", codec, lambda: _encode(codec, sound[None, None], noise), case.tensors["out"])]


def check_audio_utils(case: VectorCase) -> list[Result]:
    """Cross-fading of blocks, and the way back from the model's time base to 44.1 kHz."""
    results = []
    for i, stated in enumerate(case.meta["cases"]):
        blocks = case.tensors[f"{i}/in"]  # [n,1,A,Ca]
        shape = [stated["blocks"], 1, stated["frames"], stated["channels"]]
        merged = cross_fade(list(blocks), stated["overlap"])
        results.append(agree(f"{i}/in", list(blocks.shape), shape))
        results.append(compare(f"{i}/out", merged, case.tensors[f"{i}/out"], 1e-6))
    resampled = to_playback_rate(case.tensors["resample/in"].T, AUDIO_RATE).T
    return [*results, compare("resample/out", resampled, case.tensors["resample/out"], RESAMPLE)]


def check_turbo(case: VectorCase) -> list[Result]:
    """Names and parameters, one window as first and as later one, then whole clips through the windows."""
    stated, known = case.meta["config"], {field.name for field in fields(TurboConfig)}
    stated.require(scaling_factor=1.0)
    config = TurboConfig.from_json({key: stated[key] for key in stated if key in known or key.startswith("aligned_")})
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


def _oobleck(case: VectorCase) -> OobleckCodec:
    """The codec of a case; the sizes that its configuration states twice must agree."""
    model: Parameters = case.meta["config"]["model"]
    codec = OobleckCodec.from_released(case.group("w/"), model, case.name)
    model.require(latent_dim=codec.channels, downsampling_ratio=codec.hop, io_channels=codec.waveform_channels)
    return codec


def _encode(codec: OobleckCodec, sound: Tensor, noise: list[Tensor]) -> Tensor:
    return codec.encode(sound, noise=noise).transpose(1, 2)  # the vectors keep [B,Ca,A]


def _test_audio(samples: int) -> Tensor:
    """Tone and rising chirp of the cases; the order of the products decides the last digits."""
    t = np.arange(samples) / AUDIO_RATE
    sound = 0.5 * np.sin(2 * np.pi * 220 * t) + 0.3 * np.sin(2 * np.pi * 50 * t * t)
    return torch.from_numpy(sound.astype(np.float32))


def _key_map(case: VectorCase, ours: dict[str, str]) -> list[Result]:
    stored = case.meta.get("key_map_to_diffusers")
    if stored is None:
        return []
    different = {key for key in ours.keys() | stored.keys() if ours.get(key) != stored.get(key)}
    return [Result("key map (names that differ)", float(len(different)), 0.0)]


def _compare_audio(what: str, codec: OobleckCodec, run: Callable[[], Tensor], stored: Tensor) -> Result:
    """Compare at VAE; where kernels differ from the vectors', allow for fp32 rounding.

    sin^2 of exponentials makes random weights chaotic: the fp32 rounding of outputs near 100 can exceed 1e-4. It
    is measured as our distance from our own fp64 run, which no error of ours can enlarge.
    """
    with vector_arithmetic():
        ours = run()
        result = compare(what, ours, stored, VAE)
        if result.passed:
            return result
        codec.vae.double()
        rounding = (run() - ours).abs().max().item()
        codec.vae.float()
    return compare(f"{what} (fp32 rounds by {rounding:.0e})", ours, stored, max(VAE, 2 * rounding))
