"""Random networks and inputs for the tests of faster tiers."""

import torch
from torch import Tensor

from magihuman import zoo
from magihuman.models.config import DiTConfig, PackConfig
from magihuman.models.denoiser import Denoiser

DEEP = DiTConfig(
    num_layers=40,
    hidden_size=64,
    head_dim=16,
    num_query_groups=2,
    video_in_channels=12,
    audio_in_channels=6,
    text_in_channels=10,
    mm_layers=(0, 1, 2, 3, 36, 37, 38, 39),
    gelu7_layers=(0, 1, 2, 3),
)
"""The release's layers at a small width; its feed-forward width 168 is no multiple of 16, as 13652 is not."""


def network(
    config: DiTConfig, dtype: torch.dtype = torch.float32, pack: PackConfig | None = None, seed: int = 0
) -> Denoiser:
    """All weights random, also the norms and heads that start at zero; the same numbers in every dtype.

    Matrices are rounded to bf16, so that networks of both dtypes hold the same ones.
    """
    denoiser = zoo.build(config, pack or PackConfig(2, "v2", 1), compute_dtype=torch.float32, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator) * (parameter.ndim == 1))
        for head in (denoiser.model.final_linear_video, denoiser.model.final_linear_audio):
            head.weight.normal_(std=0.1, generator=generator)
        for parameter in denoiser.model.block.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.bfloat16().float())
    if dtype == torch.float32:
        return denoiser.eval()
    other = zoo.build(config, denoiser.pack, compute_dtype=dtype, linear_dtype=dtype, seed=seed)
    other.model.load_state_dict(denoiser.model.state_dict())
    return other.eval()


def inputs(
    text: list[int], audio: int = 5, frames: int = 3, side: int = 4, seed: int = 1
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A batch for networks of 12, 6 and 10 channels."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(len(text), 3, frames, side, side, generator=generator)
    sound = torch.randn(len(text), audio, 6, generator=generator)
    return video, sound, [torch.randn(n, 10, generator=generator) for n in text]


@torch.no_grad()
def velocities(denoiser: Denoiser, batch: tuple[Tensor, Tensor, list[Tensor]]) -> Tensor:
    """Both outputs as one vector, fp32."""
    return torch.cat([part.flatten() for part in denoiser(*batch)])


def error(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance."""
    return float((ours - theirs).norm() / theirs.norm())
