"""A transformer of four layers with random weights, its inputs, and the same with two LoRAs."""

from dataclasses import replace

import torch
from torch import Tensor

from magihuman import zoo
from magihuman.models import lora
from magihuman.models.config import DiTConfig, LoraConfig, PackConfig
from magihuman.models.denoiser import Denoiser

CONFIG = DiTConfig(4, 32, 16, 1, 12, 6, 10, mm_layers=(0, 3), gelu7_layers=(0,))
SIZE = LoraConfig(rank=3, alpha=4.5)
LOCAL = replace(CONFIG, local_attn_layers=(1,), post_norm_layers=(2, 3))


def make(config: DiTConfig = CONFIG, dtype: torch.dtype = torch.float32, seed: int = 0) -> Denoiser:
    denoiser = zoo.build(config, PackConfig(2, "v2", 1), compute_dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in denoiser.parameters():  # heads and norms start at zero, which would hide mistakes
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return denoiser


def inputs(text: list[int], audio: int = 5, seed: int = 1) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(len(text), 3, 3, 4, 4, generator=generator)
    sound = torch.randn(len(text), audio, 6, generator=generator)
    return video, sound, [torch.randn(n, 10, generator=generator) for n in text]


def gradients(denoiser: Denoiser, batch: tuple[Tensor, Tensor, list[Tensor]]) -> list[Tensor]:
    denoiser.zero_grad()
    video, audio = denoiser(*batch)
    (video.square().mean() + audio.square().mean()).backward()
    return [p.grad.clone() for p in denoiser.parameters() if p.grad is not None]


def adapted(dtype: torch.dtype = torch.float32, config: LoraConfig = SIZE) -> Denoiser:
    """A frozen base with two adapters, of which `student` is away from its start."""
    denoiser = make(LOCAL, dtype).requires_grad_(False)
    for seed, name in enumerate(("critic", "student")):
        lora.add_lora(denoiser.model, name, config, seed)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lora.lora_parameters(denoiser.model, "student").values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return denoiser


def loss(velocities: tuple[Tensor, Tensor]) -> Tensor:
    return velocities[0].square().mean() + velocities[1].square().mean()


def merged(denoiser: Denoiser, name: str) -> dict[str, Tensor]:
    """State dict of a plain network equal to this one with a LoRA."""
    state, config = denoiser.model.state_dict(), denoiser.model.lora_configs[name]
    return dict(lora.merge(lora.base_state(state), lora.lora_state(state, name), config))


def patchify_target(z: Tensor, patch: int) -> Tensor:
    """Inverse of `unpatchify`: latents [B,C,T,h,w] -> tokens [B,N,p p C] in the model's output order."""
    grid = z.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # [B,C,T,h/p,p,w/p,p]
    return grid.permute(0, 2, 3, 5, 4, 6, 1).flatten(4).flatten(1, 3)
