"""Turbo VAE: a light, causal decoder for the latents of a frozen video codec.

The codec's encoder and its latents stay as they are; only the decoder is trained anew, with an order of magnitude fewer
FLOPs (the idea of Turbo-VAED, Zou et al. 2025, and of the released decoder; the student's architecture is ours,
`magihuman.codecs.causal_decoder`). One batch:

  1. latents and the frames that they were encoded from; a share of them is replaced by latents that a diffusion model
     sampled, with the teacher's frames, because at inference the decoder gets sampled latents;
  2. loss: pixels (Charbonnier), detail (Laplacian pyramid) and change from frame to frame.

Matching the teacher's features, as published decoders are trained, lowered quality in the puppet world at every weight
(eval/results/tiny_turbo/ablation) and was removed. An adversarial stage and LPIPS: `recipes.turbo_vae_gan`.
"""

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from magihuman.errors import UserError
from magihuman.io.released_files import read_state
from magihuman.training import decoder_training as losses
from magihuman.training.context import TrainingContext
from magihuman.training.decoder_training import SampledLatents
from magihuman.training.optim import EMA, clip_gradients, require_weights
from magihuman.training.rng import BatchRng, stream
from magihuman.zoo import decoders
from recipes.base import Recipe, require_finite_weights

PEAK = 2.0  # of frames in [-1,1]


class TurboVAE(Recipe):
    """Distillation of a video codec's decoder.

    Args:
        student: {layout, network}, as a file of configs/decoder has them; its `codecs` is ignored.
        pixel, perceptual, temporal: weights of the losses.
        crop: side of the square of latents to train on, at a random position; None for whole frames. A side of the
            frames that is shorter is not cropped.
        sampled: file of sampled latents (`inference.sample_latents`), or in a configuration the call that makes it; None:
            none. sampled_share: share of the samples that it replaces.
    """

    strategies = ("single", "ddp")
    watched = ("loss/pixel",)  # an adversarial loss may begin late
    shown = ("loss", "loss/pixel", "val/psnr")

    def __init__(
        self,
        context: TrainingContext,
        *,
        student: dict[str, Any],
        pixel: float = 1.0,
        perceptual: float = 1.0,
        temporal: float = 0.25,
        crop: int | None = None,
        sampled: str | dict[str, Any] | None = None,
        sampled_share: float = 0.25,
    ) -> None:
        super().__init__(context)
        self.config = _config(student, context)
        self.pixel, self.perceptual, self.temporal = pixel, perceptual, temporal
        self.crop, self.sampled_share = crop, sampled_share
        self.decoder: nn.Module | None = None
        if context.trainer.activation_checkpointing or context.trainer.compile:
            raise UserError("this recipe takes trainer.activation_checkpointing=false and trainer.compile=false")
        require_weights(pixel=pixel, perceptual=perceptual, temporal=temporal)
        if (crop is not None and crop < 1) or not 0 <= sampled_share <= 1:
            raise UserError(
                f"recipe.crop={crop} is at least 1 or null, recipe.sampled_share={sampled_share} lies in [0, 1]"
            )
        self.sampled = None
        if sampled is not None:
            self.sampled = SampledLatents(str(sampled), self.config.latents.channels, self.config.latents.codec)
            usual = [3, context.size.frames, context.size.height, context.size.width]
            if self.sampled.frames[1:] != usual:
                raise UserError(
                    f"recipe.sampled={sampled} holds frames {self.sampled.frames[1:]}, the shards mostly {usual}; "
                    "sample clips of the shards' size, or set recipe.sampled=null"
                )

    # The network

    def configure_model(self) -> None:
        """Make the student and its average, with weights from the seed or from `init`."""
        if self.decoder is not None:
            return
        decoder = cast(nn.Module, decoders.build(self.config, seed=stream(self.context.seed, "weights")))
        if self.context.init is not None:
            decoder.load_state_dict(_init_weights(self.context.init, self.config))
        self.decoder = decoder
        if self.context.optim.ema_decay > 0:
            self.ema = EMA(decoder, self.context.optim.ema_decay)

    @property
    def trained(self) -> nn.Module:
        assert self.decoder is not None
        return self.decoder

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        # The decoder's weights alone: other networks in the optimiser must not scale its gradient down.
        norm = clip_gradients(list(self.trained.parameters()), self.context.optim.clip_norm)
        self.count_norm("grad_norm", norm)

    # One batch

    def loss(self, batch: dict[str, Any], rng: BatchRng) -> Tensor:
        latents, truth = self.examples(batch, rng)
        total = self.objective(self.decode(self.trained, latents), truth)
        self.meter.add("loss", total)
        return total

    def objective(self, decoded: Tensor, truth: Tensor) -> Tensor:
        """The weighted sum of the losses of decoded and true frames [B,3,F,H,W], a scalar."""
        parts = {
            "pixel": (self.pixel, losses.charbonnier(decoded, truth)),
            "perceptual": (self.perceptual, losses.laplacian(decoded, truth)),
            "temporal": (self.temporal, losses.flicker(decoded, truth)),
        }
        for name, (_, part) in parts.items():
            self.meter.add(f"loss/{name}", part)
        return torch.stack([weight * part for weight, part in parts.values()]).sum()

    def examples(self, batch: dict[str, Any], rng: BatchRng) -> tuple[Tensor, Tensor]:
        """Latents [B,C,T,h,w] and the frames [B,3,F,H,W] fp32 in [-1,1] that they should become.

        Raises:
            UserError: shards without frames.
        """
        if "frames" not in batch:
            raise UserError(
                "these shards hold no frames to decode to; make them with `python -m data.prepare ... pixels=true`"
            )
        latents, frames = batch["video"], batch["frames"]
        use, which, positions = rng.uniform(), rng.uniform(), (rng.uniform(), rng.uniform())
        if self.sampled is not None:
            fits = self.sampled.fits(latents.shape[1:], frames.shape[1:])
            rows = (use < self.sampled_share).nonzero().flatten().tolist() if fits else []
            latents, frames = latents.clone(), frames.clone()
            for row in rows:
                chosen = self.sampled.read(float(which[row]))
                latents[row], frames[row] = (part.to(latents.device) for part in chosen)
            self.meter.add("sampled", len(rows) / len(latents))
        if self._trained_on(latents) != tuple(latents.shape[-2:]):
            latents, frames = self._cropped(latents, frames, positions)
        return latents, frames.float() / 127.5 - 1

    def _trained_on(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of a batch's latents after cropping; a side that is shorter than `crop` stays."""
        rows, columns = latents.shape[-2:]
        return (rows, columns) if self.crop is None else (min(rows, self.crop), min(columns, self.crop))

    def _cropped(self, latents: Tensor, frames: Tensor, positions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        sides, strides = self._trained_on(latents), self.config.latents.stride[1:]
        pairs = []
        for i in range(len(latents)):
            few, shown = [], []
            for position, whole, side, stride in zip(positions, latents.shape[-2:], sides, strides, strict=True):
                first = int(position[i] * (whole - side + 1))
                few.append(slice(first, first + side))
                shown.append(slice(first * stride, (first + side) * stride))
            pairs.append((latents[i, ..., few[0], few[1]], frames[i, ..., shown[0], shown[1]]))
        return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])

    def decode(self, decoder: nn.Module, latents: Tensor) -> Tensor:
        """Frames fp32 of a student, whose matrix products run in the precision of the training."""
        half = self.context.trainer.precision == "bf16"
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=half):
            frames: Tensor = decoder(latents)
        return frames.float()

    def batch_flops(self, batch: dict[str, Any]) -> float:
        channels, frames = batch["video"].shape[1:3]
        shape = (channels, frames, *self._trained_on(batch["video"]))
        return 3.0 * len(batch["video"]) * forward_flops(self.config, shape)

    @torch.no_grad()
    def validation_metrics(self, network: Any, batch: dict[str, Any], rng: BatchRng) -> dict[str, float]:
        """PSNR on the fixed range [-1,1], mean over frames, and the error of the change from frame to frame."""
        truth = batch["frames"].float() / 127.5 - 1
        decoded = self.decode(network, batch["video"]).clamp(-1, 1)
        errors = (decoded - truth).square().mean(dim=(1, 3, 4))  # [B,F]
        return {
            "val/psnr": float((20 * math.log10(PEAK) - 10 * errors.clamp_min(1e-10).log10()).mean()),
            "val/temporal": float(losses.flicker(decoded, truth)),
        }

    # Saving

    def export(self, folder: Path) -> None:
        """Write the decoder with its latent contract."""
        if self.global_rank == 0:
            facts = {**self.context.provenance, "steps": self.step, "averaged": self.ema is not None}
            config = decoders.DecoderConfig(self.config.layout, self.config.network, self.config.latents, facts)
            weights = self.network.state_dict()
            require_finite_weights(weights)
            decoders.save(folder, weights, config)


@lru_cache(maxsize=64)
def _flops(layout: str, network: str, latents: decoders.Latents, shape: tuple[int, ...]) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        config = decoders.DecoderConfig(layout, json.loads(network), latents)
        decoders.build(config, "meta")(torch.empty(1, *shape))
    return int(counter.get_total_flops())


def forward_flops(config: decoders.DecoderConfig, shape: tuple[int, ...]) -> int:
    """Multiply-adds x 2 of decoding one clip of latents [C,T,h,w]; counted without computing anything."""
    return _flops(config.layout, json.dumps(config.network), config.latents, shape)


def _config(student: dict[str, Any], context: TrainingContext) -> decoders.DecoderConfig:
    """The student's config for the latents of the shards."""
    if set(student) - {"codecs"} != {"layout", "network"}:
        raise UserError(f"recipe.student has {sorted(student)}; choose decoder=NAME, or give layout and network")
    if student["layout"] not in ("causal", "released"):
        raise UserError(f"recipe.student.layout={student['layout']} cannot be trained; choose causal or released")
    latents = decoders.Latents.of(context.contract)
    return decoders.DecoderConfig(student["layout"], student["network"], latents)


def _init_weights(init: str, config: decoders.DecoderConfig) -> dict[str, Tensor]:
    """Weights of another decoder of the same architecture."""
    folder, other = decoders.require(init, "init"), decoders.config_of(init)
    assert other is not None
    if (other.layout, other.network, other.latents) != (config.layout, config.network, config.latents):
        raise UserError(f"init={init} is another decoder than recipe.student; choose the one it was trained as")
    return {key: value.float() for key, value in read_state(folder / decoders.MODEL).items()}
