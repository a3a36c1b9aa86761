"""A `Denoiser` with a `FastTransformer`; the result of `inference.fast.prepare`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inference.fast.tiers import Options, Tier
from inference.fast.transformer import FastTransformer
from magihuman.models.denoiser import Denoiser
from magihuman.models.tokens import Layout


class FastDenoiser(Denoiser):
    """See `Denoiser`; `tier` and `options` say what runs.

    Args:
        denoiser: the reference; its embedders and heads are shared.
        device: where it will run; release: see `FastTransformer`.

    Raises:
        UserError: as `FastTransformer`.
    """

    def __init__(
        self, denoiser: Denoiser, tier: Tier, options: Options, device: torch.device, release: bool = False
    ) -> None:
        model: Any = FastTransformer(denoiser.model, options, device, release)
        super().__init__(model, denoiser.pack)
        self.tier, self.options = tier, options
        self.eval()

    def layout_for(
        self,
        video_shape: Sequence[int],
        audio_len: int,
        text_lens: Sequence[int],
        device: torch.device | str | None = None,
    ) -> Layout:
        """See `Denoiser.layout_for`; also makes all else that does not change between steps.

        Raises:
            UserError: see `FastTransformer.plan`.
        """
        layout = super().layout_for(video_shape, audio_len, text_lens, device)
        model: Any = self.model
        with torch.no_grad():
            model.plan(layout)
        return layout

    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        text: Sequence[Tensor],
        layout: Layout | None = None,
        lora: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Denoiser.forward`; a LoRA has to be merged beforehand."""
        model: Any = self.model
        if model.cache is not None:
            # A sampling loop passes the same features in every step, so they identify its passes.
            model.cache.enter((video.shape, *map(id, text)))
        return super().forward(video, audio, text, layout, lora)

    def begin(self, steps: int) -> None:
        """A trajectory starts: forget what was kept between the steps of the last one."""
        model: Any = self.model
        if model.cache is not None:
            model.cache.begin(steps)
