"""Stored runs of the released sampling loop, repeated by `inference.sampling.sample`."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from inference.sampling import sample
from magihuman.flow.sampling import Noise, Pair
from magihuman.models.denoiser import Denoiser
from magihuman.zoo.checks import Parameters, Result, VectorCase
from magihuman.zoo.checks.loop import check_loop
from magihuman.zoo.verify import read_manifest


def check_released_loop(folder: Path, name: str) -> list[Result]:
    """A stored run of the release, repeated by the loop of inference."""
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / f"{name}.safetensors").items()}
    return check_loop(VectorCase(name, Parameters(read_manifest(folder)[name]["meta"]), tensors), inference_loop)


def inference_loop(
    denoiser: Denoiser,
    text: list[torch.Tensor],
    negative_text: list[torch.Tensor] | None,
    noise: Noise,
    *,
    image_latent: torch.Tensor | None,
    keep_audio: bool,
    on_step: Any,
    **settings: Any,
) -> Pair:
    """`inference.sampling.sample` as a `magihuman.zoo.checks.loop.Loop`."""
    shape = noise.start.video.shape[1:], noise.start.audio.shape[1:]
    video, audio = sample(
        denoiser,
        text,
        negative_text,
        shape,
        image_latent=image_latent,
        audio_latent=noise.start.audio if keep_audio else None,
        noise=noise,
        progress=lambda i, n, video, audio: on_step(Pair(video, audio)),
        **settings,
    )
    return Pair(video, audio)
