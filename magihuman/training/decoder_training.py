"""Losses and sampled latents for the training of video decoders.

The losses compare pixels, detail at several scales, and the change from frame to frame. They take and return fp32;
frames are [B,3,F,H,W] in about [-1,1].
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from magihuman.errors import UserError


def charbonnier(prediction: Tensor, truth: Tensor, eps: float = 1e-2) -> Tensor:
    """Charbonnier loss, mean of sqrt(d^2 + eps^2) - eps: absolute error, smooth at zero (Charbonnier et al. 1994)."""
    return ((prediction - truth).square() + eps**2).sqrt().mean() - eps


def laplacian_bands(frames: Tensor, levels: int = 3) -> list[Tensor]:
    """Laplacian pyramid of all frames, finest band first: [N,3,H/2^i,W/2^i] each (Burt and Adelson 1983).

    A band is what halving the resolution loses. Small frames have fewer levels: a side is halved while it is even.
    """
    x = frames.transpose(1, 2).flatten(0, 1)  # [N,3,H,W]
    bands = []
    for _ in range(levels):
        if x.shape[-1] % 2 or x.shape[-2] % 2:
            break
        small = F.avg_pool2d(x, 2)
        bands.append(x - F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False))
        x = small
    return bands


def laplacian(prediction: Tensor, truth: Tensor, levels: int = 3) -> Tensor:
    """Mean absolute difference of the Laplacian bands, summed over levels: weighs edges and texture. A scalar."""
    pairs = zip(laplacian_bands(prediction, levels), laplacian_bands(truth, levels), strict=True)
    parts = [(a - b).abs().mean() for a, b in pairs]
    return torch.stack(parts).sum() if parts else prediction.new_zeros(())


def flicker(prediction: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute error of the change from frame to frame; 0 for a single frame. A scalar."""
    if prediction.shape[2] < 2:
        return prediction.new_zeros(())
    return (prediction.diff(dim=2) - truth.diff(dim=2)).abs().mean()


class SampledLatents:
    """Latents that a diffusion model sampled, with the frames that a teacher decodes them to, read clip by clip.

    One safetensors file (`python -m inference.sample_latents` writes it): video [N,C,T,h,w] fp16 and frames
    [N,3,F,H,W] uint8.

        sampled = SampledLatents("sampled.safetensors", channels=12)
        latents, frames = sampled[0]

    Args:
        path: of the file. channels: C of the latents that are wanted; codec: theirs, compared where the file names its
            own.

    Raises:
        UserError: it is missing, or holds something else.
    """

    def __init__(self, path: str | Path, channels: int, codec: str | None = None) -> None:
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise UserError(f"recipe.sampled={path} is not a file; make it with `python -m inference.sample_latents`")
        try:
            file = safe_open(path, "pt")
            self._parts = {name: file.get_slice(name) for name in ("video", "frames")}
            found = (file.metadata() or {}).get("codec", codec)
        except (SafetensorError, OSError) as error:
            raise UserError(f"recipe.sampled={path} cannot be read ({error}); make it again") from error
        if codec not in (None, found):
            raise UserError(f"recipe.sampled={path} holds latents of {found!r}, not of {codec!r}; make it again")
        self.shape, self.frames = (self._parts[name].get_shape() for name in ("video", "frames"))
        if self.shape[1] != channels or self.frames[0] != self.shape[0]:
            raise UserError(
                f"recipe.sampled={path} holds latents {self.shape} and frames {self.frames}; this training needs "
                f"{channels} channels and frames for each"
            )

    def __len__(self) -> int:
        return int(self.shape[0])

    def fits(self, latents: Sequence[int], frames: Sequence[int]) -> bool:
        """Whether the clips have these shapes, [C,T,h,w] and [3,F,H,W]."""
        return list(latents) == self.shape[1:] and list(frames) == self.frames[1:]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """A clip: latents fp32 [C,T,h,w], frames uint8 [3,F,H,W]."""
        return self._parts["video"][number].float(), self._parts["frames"][number]

    def read(self, position: float) -> tuple[Tensor, Tensor]:
        """The clip at `position` in [0, 1) of the file."""
        return self[int(position * len(self))]
