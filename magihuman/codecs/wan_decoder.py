"""The Wan 2.2 decoder for training: whole clips with gradients, as the puppets' teacher decoder (`data.tiny.fit_decoder`).

`wan.WanCodec` decodes latent by latent, as inference needs. Here every convolution runs once over the whole clip, with
the same result (tested).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from magihuman.errors import UserError
from magihuman.schema import PlainConfig


@dataclass(frozen=True)
class WanDecoderConfig(PlainConfig):
    """Hyperparameters of a decoder in Wan 2.2's layout.

    Attributes:
        latent_channels: C.
        width: channels of the last block; multipliers: of the blocks' widths, last block first.
        blocks: residual blocks per block, less one.
        double_time: for all blocks but the last, first block first: whether it doubles the frames; all of them double
            rows and columns.
        patch: side of the square of pixels per position of the last block.
    """

    latent_channels: int
    width: int
    multipliers: tuple[int, ...]
    double_time: tuple[bool, ...]
    blocks: int = 2
    patch: int = 1

    def __post_init__(self) -> None:
        if len(self.double_time) != len(self.multipliers) - 1 or min(self.multipliers, default=0) < 1:
            raise UserError(
                f"teacher decoder: {len(self.multipliers)} multipliers {list(self.multipliers)} need one less "
                f"double_time, not {list(self.double_time)}"
            )

    @property
    def stride(self) -> tuple[int, int, int]:
        """(frames, rows, columns) of pixels per latent."""
        space = 2 ** len(self.double_time) * self.patch
        return 2 ** sum(self.double_time), space, space


class WanDecoder(nn.Module):
    """Normalised latents [B,C,T,h,w] -> frames [B,3,F,H,W], about [-1,1], not clamped; differentiable.

    Args:
        decoder: diffusers' `WanDecoder3d` of the Wan 2.2 kind.
        patch: see `WanDecoderConfig`.
    """

    def __init__(self, decoder: Any, patch: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.patch = patch
        self.channels: int = decoder.z_dim
        doublings = [b.upsampler.mode == "upsample3d" for b in decoder.up_blocks if b.upsampler is not None]
        space = patch * 2 ** len(doublings)
        self.stride: tuple[int, int, int] = (2 ** sum(doublings), space, space)

    @classmethod
    def build(cls, config: WanDecoderConfig) -> "WanDecoder":
        """A decoder with random weights."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d

        decoder = WanDecoder3d(
            dim=config.width, z_dim=config.latent_channels, dim_mult=list(config.multipliers),
            num_res_blocks=config.blocks, temperal_upsample=list(config.double_time),
            out_channels=3 * config.patch**2, is_residual=True,
        )  # fmt: skip
        return cls(decoder, config.patch)

    def forward(self, latents: Tensor) -> Tensor:
        """A whole clip."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        decoder = self.decoder
        x = decoder.mid_block(decoder.conv_in(latents.to(decoder.conv_in.weight.dtype)))
        for block in decoder.up_blocks:
            x = _up(block, x)
        return unpatchify(decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x))), self.patch)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """`forward` without gradients, fp32 out, as in `magihuman.codecs.protocols.VideoCodec`."""
        return self(latents.to(self.decoder.conv_in.weight.device)).float()


def _up(block: Any, x: Tensor) -> Tensor:
    """One `WanResidualUpBlock` over a whole clip."""
    start = x
    for resnet in block.resnets:
        x = resnet(x)
    if block.upsampler is not None:
        if block.upsampler.mode == "upsample3d":
            x = _double_time(block.upsampler.time_conv, x)
        images = block.upsampler.resample(x.transpose(1, 2).flatten(0, 1))
        x = images.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
    if block.avg_shortcut is not None:
        x = x + block.avg_shortcut(start, first_chunk=True)
    return x


def _double_time(convolution: Any, x: Tensor) -> Tensor:
    """T frames -> 2 T - 1: the first one stays single and is not part of the convolution over time."""
    if x.shape[2] == 1:
        return x
    pairs = convolution(x[:, :, 1:]).unflatten(1, (2, -1))  # [B,2,C,T-1,h,w]
    return torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)
