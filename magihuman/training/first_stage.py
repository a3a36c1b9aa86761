"""First-stage latents for the training of super-resolution: a clip's own latents at base size, degraded.

At inference, super-resolution refines samples of a base model, which lack details and have small errors. `FirstStage`
makes such latents from the clip's own ones, so that they stay paired with the clip at its full size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from magihuman.codecs.protocols import VideoCodec
from magihuman.errors import UserError
from magihuman.flow.path import add_noise
from magihuman.flow.solvers import Euler
from magihuman.flow.super_resolution import coarsen, shrink_pictures
from magihuman.media import images
from magihuman.models.denoiser import Denoiser
from magihuman.training.rng import BatchRng


@dataclass(frozen=True)
class FirstStageSettings:
    """Source of the latents at base size, and how they are degraded.

    Attributes:
        size: (height, width) in pixels of the first stage; each clip is decoded at the second stage's size, made
            smaller and encoded again, so that the shards need not hold it. None: the shards hold both sizes
            (`data.prepare` with sr_sizes).
        coarse: probability that a clip is downsampled and enlarged again, by a factor drawn from `coarse_factors`.
        base: checkpoint of a first stage, or None; base_share: probability that a clip is noised to a level
            drawn from `base_sigma` and denoised again by it in `base_steps` steps with the clip's clean audio (Meng et
            al. 2022, SDEdit, arXiv 2108.01073), which resembles the samples of inference.

    Raises:
        UserError: values out of range.
    """

    size: tuple[int, int] | None = None
    coarse: float = 0.0
    coarse_factors: tuple[int, ...] = (2, 4)
    base: str | None = None
    base_share: float = 0.0
    base_sigma: tuple[float, float] = (0.5, 0.95)
    base_steps: int = 4

    def __post_init__(self) -> None:
        low, high = self.base_sigma
        if not 0 < low <= high < 1:
            raise UserError(f"recipe.first_stage.base_sigma={[low, high]} should be a range inside (0, 1)")
        for name in ("coarse", "base_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"recipe.first_stage.{name}={getattr(self, name)} should be in [0, 1]")
        if self.base_share and self.base is None:
            raise UserError("recipe.first_stage.base_share needs recipe.first_stage.base=CHECKPOINT")
        if self.base_steps < 1 or not self.coarse_factors or min(self.coarse_factors) < 1:
            raise UserError("recipe.first_stage: base_steps and coarse_factors start at 1")


class FirstStage:
    """Makes first-stage latents of a batch; all random numbers come from `rng`.

    Args:
        base: frozen first stage, needed for settings.base_share > 0.
        codec: of the latents, needed for settings.size.
    """

    def __init__(
        self, settings: FirstStageSettings, base: Denoiser | None = None, codec: VideoCodec | None = None
    ) -> None:
        self.settings = settings
        self.base = base
        self.codec = codec

    @torch.no_grad()
    def downsized(self, large: Tensor) -> Tensor:
        """Latents [B,C,T,H,W] of clips at the second stage's size -> [B,C,T,h,w] at the first one's.

        Raises:
            UserError: the first stage's size is larger, of another aspect ratio, or not a multiple of the codec's stride.
        """
        assert self.codec is not None
        assert self.settings.size is not None
        frames = self.codec.decode(large)
        self._require_smaller(frames.shape[-2:], large.shape[-2:])
        return self.codec.encode(shrink_pictures(frames, *self.settings.size))

    def _require_smaller(self, pixels: Sequence[int], cells: Sequence[int]) -> None:
        assert self.settings.size is not None
        (height, width), (tall, wide) = self.settings.size, pixels
        stride = tall // cells[0], wide // cells[1]
        known = f"recipe.first_stage.size={[height, width]} (height, width) and clips of {[tall, wide]} pixels"
        if height % stride[0] or width % stride[1] or not 0 < height <= tall or not 0 < width <= wide:
            raise UserError(f"{known}: give a smaller size, of multiples of {list(stride)}")
        if not images.same_aspect((height, width), (tall, wide)):
            raise UserError(
                f"{known} differ in aspect ratio; prepare clips of several aspect ratios with sr_sizes= instead"
            )

    @torch.no_grad()
    def __call__(self, video: Tensor, audio: Tensor, text: Sequence[Tensor], rng: BatchRng) -> Tensor:
        """The clips' own latents [B,C,T,h,w], [B,A,Ca] -> video latents like those of a first stage [B,C,T,h,w]."""
        chosen, what, level = rng.uniform(), rng.uniform(), rng.uniform()
        noise = rng.normal(video.shape[1:]).to(video.device)
        settings, result = self.settings, video
        if settings.base_share > 0:
            result = self._resampled(video, audio, text, chosen < settings.base_share, level, noise)
        if settings.coarse > 0:
            # The upper end of the same random number: a clip is either resampled or made coarse, if both shares fit.
            coarse = chosen >= 1 - settings.coarse
            factors = torch.tensor(settings.coarse_factors)[(what * len(settings.coarse_factors)).long()]
            for i in coarse.nonzero().flatten().tolist():
                result = result.index_copy(
                    0, torch.tensor([i], device=result.device), coarsen(result[i : i + 1], int(factors[i]))
                )
        return result

    def _resampled(
        self, video: Tensor, audio: Tensor, text: Sequence[Tensor], chosen: Tensor, level: Tensor, noise: Tensor
    ) -> Tensor:
        """SDEdit of the chosen clips [B] bool, each from its own noise level (a position in `base_sigma`)."""
        rows = chosen.nonzero().flatten()
        if not len(rows):
            return video
        assert self.base is not None
        low, high = self.settings.base_sigma
        sigma = (low + (high - low) * level[rows]).to(video.device)
        rows = rows.to(video.device)
        words, own_audio = [text[i] for i in rows.tolist()], audio[rows]
        x = add_noise(video[rows], noise[rows], sigma)
        # The solver's grid from 1 to 0, scaled to begin at each clip's own level.
        grid = Euler(self.settings.base_steps).sigmas.tolist()
        for here, after in pairwise(grid):
            velocity, _ = self.base(x, own_audio, words)
            x = x + ((after - here) / grid[0]) * sigma.view(-1, 1, 1, 1, 1) * velocity
        return video.index_copy(0, rows, x)
