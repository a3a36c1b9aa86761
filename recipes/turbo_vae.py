"""Turbo VAE: a light, causal decoder for the latents of a frozen video codec.

The codec's encoder stays, and so do the latents that diffusion models were trained on; only what turns them into
frames is made anew, an order of magnitude lighter (the idea of Turbo-VAED, Zou et al. 2025, and of the released
decoder; the student is ours, `magihuman.codecs.causal_decoder`). One batch:

  1. latents and the frames that they were encoded from; some are replaced by latents that a diffusion model made,
     with the teacher's frames, because those are what the decoder will meet;
  2. pixels (Charbonnier), detail (Laplacian pyramid; LPIPS on request) and change from frame to frame against them;
  3. on request, the student's features, mapped linearly, against those of the teacher's middle and first up block.
     Only these blocks of the teacher run. The term fades out before the end, so that the last word is the picture's.
     Published decoders are trained so; where true frames are at hand, it has only cost quality in the puppet world;
  4. in the last stage, on request, an adversarial loss.

The maps and the discriminator stay behind: the average and the export hold the decoder alone.
"""

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from magihuman.codecs.wan import FILES, REPO, WanCodec
from magihuman.codecs.wan_decoder import WanDecoder
from magihuman.errors import UserError
from magihuman.io.released_files import locate, read_state
from magihuman.training import decoder_losses as losses
from magihuman.training.context import TrainingContext
from magihuman.training.discriminator import Discriminator, Gan, adversarial_losses
from magihuman.training.ema import EMA
from magihuman.training.latent_file import SampledLatents
from magihuman.training.lpips import LPIPS
from magihuman.training.optim import Ramp, build_optimizer, build_schedule, clip_gradients, value_at
from magihuman.training.rng import BatchRng, stream
from magihuman.zoo import decoders
from recipes.base import Recipe

PEAK = 2.0  # of frames in [-1,1]


class TurboVAE(Recipe):
    """Distillation of a video codec's decoder.

    Args:
        student: an architecture of configs/turbo by name, or {layout, network} as such a file has them.
        teacher: decoder whose features are matched, where `align` is not 0: a name or folder of layout `wan`, or the
            file of the Wan 2.2 VAE.
        teacher_blocks: up blocks of the teacher whose features are matched, beside the middle block's.
        pixel, perceptual, temporal, align: weights of the losses; `align` may be a ramp.
        lpips: weight of LPIPS; lpips_backbone: file of its VGG-16.
        crop: side of the square of latents to train on, at a random place; None for whole pictures. A side of the
            picture that is shorter is not cut.
        sampled: file of sampled latents (`inference.sample_latents`), or in a configuration the call that makes it; None:
            none. sampled_share: of the samples.
        gan: the adversarial stage, or None.
    """

    strategies = ("single", "ddp")

    def __init__(
        self,
        context: TrainingContext,
        *,
        student: str | dict[str, Any],
        teacher: str | None = None,
        teacher_blocks: int = 1,
        pixel: float = 1.0,
        perceptual: float = 1.0,
        temporal: float = 0.25,
        align: float | Ramp = 0.0,
        lpips: float = 0.0,
        lpips_backbone: str | None = None,
        crop: int | None = None,
        sampled: str | dict[str, Any] | None = None,
        sampled_share: float = 0.25,
        gan: Gan | None = None,
    ) -> None:
        super().__init__(context)
        self.config = _config(student, context)
        self.pixel, self.perceptual, self.temporal, self.align = pixel, perceptual, temporal, align
        self.lpips, self.crop, self.gan = lpips, crop, gan
        self.sampled_share = sampled_share
        self.decoder: nn.Module | None = None
        self.heads = nn.ModuleList()
        self.taps: list[int] = []
        self.discriminator: Discriminator | None = None
        aligning = max(value_at(align, 0.0), value_at(align, 1.0)) > 0
        if aligning and teacher is None:
            raise UserError("recipe.align needs recipe.teacher; give one, or set recipe.align=0")
        if context.trainer.activation_checkpointing or context.trainer.compile:
            raise UserError(
                "this recipe takes trainer.activation_checkpointing=false and trainer.compile=false"
            )
        if (crop is not None and crop < 1) or not 0 <= sampled_share <= 1:
            raise UserError(
                f"recipe.crop={crop} is at least 1 or null, recipe.sampled_share={sampled_share} lies in [0, 1]"
            )
        if lpips and lpips_backbone is None:
            raise UserError(
                "recipe.lpips needs recipe.lpips_backbone, a file of torchvision's VGG-16 weights"
            )
        if teacher is not None:
            # What comes after the training needs it, too: a wrong name is to fail now.
            _teacher_config(teacher)
        # Frozen parts, in tuples so that neither checkpoints nor optimisers see them.
        self._teacher: tuple[WanDecoder, ...] = (
            (self._open_teacher(teacher, teacher_blocks),) if aligning and teacher is not None else ()
        )
        self._judge: tuple[LPIPS, ...] = (
            (LPIPS(lpips_backbone),) if lpips and lpips_backbone is not None else ()
        )
        self.blocks = teacher_blocks
        channels = self.config.latents.channels
        self.sampled = None
        if sampled is not None:
            self.sampled = SampledLatents(str(sampled), channels, self.config.latents.codec)
            usual = [3, context.size.frames, context.size.height, context.size.width]
            if self.sampled.frames[1:] != usual:
                raise UserError(
                    f"recipe.sampled={sampled} holds frames {self.sampled.frames[1:]}, the shards mostly {usual}; "
                    "sample clips of the shards' size, or set recipe.sampled=null"
                )

    # The networks

    def _open_teacher(self, source: str, blocks: int) -> WanDecoder:
        found = _teacher_config(source)
        if found is None:
            teacher = WanDecoder.from_codec(WanCodec.load(source, dtype=torch.float32))
        else:
            found.latents.require(self.config.latents, f"recipe.teacher={source}", "the student")
            loaded = decoders.load(source, dtype=torch.float32)
            if not isinstance(loaded, WanDecoder):
                raise UserError(f"recipe.teacher={source} is no decoder of layout wan; choose tiny/teacher")
            teacher = loaded
        wanted = self.config.latents
        if (teacher.channels, teacher.stride) != (wanted.channels, wanted.stride):
            raise UserError(
                f"recipe.teacher={source} takes {teacher.channels} channels and upsamples by {list(teacher.stride)}, "
                f"the student {wanted.channels} and {list(wanted.stride)}; choose the decoder of the shards' codec"
            )
        return teacher.truncated(blocks).eval().requires_grad_(False)

    def configure_model(self) -> None:
        """Make the student, the maps of its features and the discriminator, with weights from the seed or `init`."""
        if self.decoder is not None:
            return
        seed = self.context.seed
        decoder = cast(nn.Module, decoders.build(self.config, seed=stream(seed, "weights")))
        if self.context.init is not None:
            decoder.load_state_dict(_start(self.context.init, self.config))
        with torch.random.fork_rng():
            torch.manual_seed(stream(seed, "heads"))
            if self._teacher and not self.heads:
                self.heads, self.taps = self._make_heads(decoder)
            if self.gan is not None:
                self.discriminator = Discriminator(self.gan.width)
        self.decoder = decoder
        if self.context.optim.ema_decay > 0:
            self.ema = EMA(decoder, self.context.optim.ema_decay)

    def _make_heads(self, decoder: nn.Module) -> tuple[nn.ModuleList, list[int]]:
        """A map for each of the teacher's features, from the last of the student's that is not finer."""
        probe = torch.zeros(1, self.config.latents.channels, 3, 2, 2)
        with torch.no_grad():
            mine = [tap.shape for tap in decoder.taps(probe)[1]]  # type: ignore[operator]
            theirs = [tap.shape for tap in self._teacher[0].features(probe, self.blocks)]
        heads, taps = nn.ModuleList(), []
        for shape in theirs:
            fitting = [
                (i, (shape[2] - 1) // (tap[2] - 1), shape[3] // tap[3])
                for i, tap in enumerate(mine)
                if (shape[2] - 1) % (tap[2] - 1) == 0 and shape[3] % tap[3] == 0
            ]
            if not fitting:
                raise UserError(
                    f"the teacher's features {list(shape[2:])} are coarser than all of the student's, "
                    f"{[list(tap[2:]) for tap in mine]}; lower recipe.teacher_blocks or set recipe.align=0"
                )
            number, time, space = fitting[-1]
            taps.append(number)
            heads.append(losses.AlignmentHead(mine[number][1], shape[1], time, space))
        return heads, taps

    @property
    def trained(self) -> nn.Module:
        assert self.decoder is not None
        return self.decoder

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(nn.ModuleList([self.trained, self.heads]), None, self.context.optim)
        if self.discriminator is not None and self.gan is not None:
            weights = list(self.discriminator.parameters())
            optimizer.add_param_group({"params": weights, "lr": self.gan.lr, "weight_decay": 0.0})
        schedule = build_schedule(
            optimizer, self.context.optim, self.max_steps, constant=int(self.discriminator is not None)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        # The discriminator's gradient is not to scale the decoder's down.
        weights = [*self.trained.parameters(), *self.heads.parameters()]
        self.count_norm("grad_norm", clip_gradients(weights, self.context.optim.clip_norm))
        if self.discriminator is not None:
            clip_gradients(list(self.discriminator.parameters()), self.context.optim.clip_norm)

    def on_fit_start(self) -> None:
        for part in (*self._teacher, *self._judge):
            part.to(self.device)

    # One batch

    def loss(self, batch: dict[str, Any], rng: BatchRng) -> Tensor:
        latents, truth = self.examples(batch, rng)
        decoded, taps = self.run(self.trained, latents)
        parts = {
            "pixel": (self.pixel, losses.charbonnier(decoded, truth)),
            "perceptual": (self.perceptual, losses.laplacian(decoded, truth)),
            "temporal": (self.temporal, losses.flicker(decoded, truth)),
        }
        if self._judge:
            parts["lpips"] = (self.lpips, self._judge[0](decoded, truth))
        if self.heads:
            parts["align"] = (value_at(self.align, self.progress), self.misalignment(latents, taps))
        total = torch.stack([weight * part for weight, part in parts.values()]).sum()
        for name, (_, part) in parts.items():
            self.meter.add(f"loss/{name}", part)
        if self.discriminator is not None and self.gan is not None:
            total = total + self._adversarial(decoded, truth, total)
        self.meter.add("loss", total)
        return total

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
        use, which, places = rng.uniform(), rng.uniform(), (rng.uniform(), rng.uniform())
        if self.sampled is not None:
            fits = self.sampled.fits(latents.shape[1:], frames.shape[1:])
            rows = (use < self.sampled_share).nonzero().flatten().tolist() if fits else []
            latents, frames = latents.clone(), frames.clone()
            for row in rows:
                chosen = self.sampled.read(float(which[row]))
                latents[row], frames[row] = (part.to(latents.device) for part in chosen)
            self.meter.add("sampled", len(rows) / len(latents))
        if self._trained_on(latents) != tuple(latents.shape[-2:]):
            latents, frames = self._cropped(latents, frames, places)
        return latents, frames.float() / 127.5 - 1

    def _trained_on(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of a batch's latents after cropping; a side that is shorter than `crop` stays."""
        rows, columns = latents.shape[-2:]
        return (rows, columns) if self.crop is None else (min(rows, self.crop), min(columns, self.crop))

    def _cropped(
        self, latents: Tensor, frames: Tensor, places: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        sides, strides = self._trained_on(latents), self.config.latents.stride[1:]
        pairs = []
        for i in range(len(latents)):
            few, shown = [], []
            for place, whole, side, stride in zip(places, latents.shape[-2:], sides, strides, strict=True):
                first = int(place[i] * (whole - side + 1))
                few.append(slice(first, first + side))
                shown.append(slice(first * stride, (first + side) * stride))
            pairs.append((latents[i, ..., few[0], few[1]], frames[i, ..., shown[0], shown[1]]))
        return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])

    def run(self, decoder: nn.Module, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Frames fp32 and features of a student, its products in the precision of the training."""
        with torch.autocast(
            latents.device.type, torch.bfloat16, enabled=self.context.trainer.precision == "bf16"
        ):
            frames, taps = decoder.taps(latents)  # type: ignore[operator]
        return frames.float(), taps

    def misalignment(self, latents: Tensor, taps: list[Tensor]) -> Tensor:
        """Mean squared error of the mapped features, in units of the teacher's; 0 without gradient once it is off."""
        if value_at(self.align, self.progress) <= 0:
            # All weights take part in every step, which spares DDP the search for those that do not.
            return torch.stack([weight.sum() * 0.0 for weight in self.heads.parameters()]).sum()
        half = self.context.trainer.precision == "bf16"
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=half):
            with torch.no_grad():
                wanted = self._teacher[0].features(latents, self.blocks)
            pairs = zip(self.heads, self.taps, wanted, strict=True)
            return torch.stack([losses.aligned(head(taps[i]), tap) for head, i, tap in pairs]).mean()

    def _adversarial(self, decoded: Tensor, truth: Tensor, others: Tensor) -> Tensor:
        assert self.gan is not None
        assert self.discriminator is not None
        if self.progress < self.gan.start:
            return torch.stack([w.sum() * 0.0 for w in self.discriminator.parameters()]).sum()
        last = [p for p in self.trained.parameters() if p.ndim > 1][-1]
        wanted, judged = adversarial_losses(self.discriminator, decoded, truth, others, last)
        self.meter.add("loss/adversarial", wanted)
        self.meter.add("loss/discriminator", judged)
        return self.gan.weight * wanted + judged

    def batch_flops(self, batch: dict[str, Any]) -> float:
        channels, frames = batch["video"].shape[1:3]
        shape = (channels, frames, *self._trained_on(batch["video"]))
        return 3.0 * len(batch["video"]) * forward_flops(self.config, shape)

    @torch.no_grad()
    def validation_metrics(self, network: Any, batch: dict[str, Any], rng: BatchRng) -> dict[str, float]:
        """PSNR on the fixed range [-1,1], mean over frames, and the error of the change from frame to frame."""
        truth = batch["frames"].float() / 127.5 - 1
        decoded = self.run(network, batch["video"])[0].clamp(-1, 1)
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
            config = decoders.DecoderConfig(
                self.config.layout, self.config.network, self.config.latents, facts
            )
            decoders.save(folder, self.network.state_dict(), config)


@lru_cache(maxsize=64)
def _flops(layout: str, network: str, latents: decoders.Latents, shape: tuple[int, ...]) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        config = decoders.DecoderConfig(layout, json.loads(network), latents)
        decoders.build(config, "meta")(torch.empty(1, *shape))
    return int(counter.get_total_flops())


def forward_flops(config: decoders.DecoderConfig, shape: tuple[int, ...]) -> int:
    """Multiply-adds x 2 of decoding one clip of latents [C,T,h,w]; counted without computing anything."""
    return _flops(config.layout, json.dumps(config.network), config.latents, shape)


def _config(student: str | dict[str, Any], context: TrainingContext) -> decoders.DecoderConfig:
    """The student's config for the latents of the shards."""
    if isinstance(student, str):
        return decoders.config_for(student, context.contract)
    if set(student) != {"layout", "network"}:
        raise UserError(f"recipe.student has {sorted(student)}; give layout and network, or a name")
    if student["layout"] not in ("causal", "released"):
        raise UserError(
            f"recipe.student.layout={student['layout']} is no student's; choose causal or released"
        )
    latents = decoders.Latents.of(context.contract)
    return decoders.DecoderConfig(student["layout"], student["network"], latents)


def _teacher_config(source: str) -> decoders.DecoderConfig | None:
    """The config of a teacher of ours; None for the published VAE's file.

    Raises:
        UserError: it is neither.
    """
    found = decoders.config_of(source)
    if found is None:
        try:
            locate(source, FILES, REPO)
        except UserError as error:
            raise UserError(
                f"recipe.teacher={source} is no decoder of ours ({', '.join(decoders.names())}), and {error}"
            ) from None
    return found


def _start(init: str, config: decoders.DecoderConfig) -> dict[str, Tensor]:
    """Weights of another decoder of the same network."""
    folder, other = decoders.find(init), decoders.config_of(init)
    if folder is None or other is None:
        raise UserError(
            f"init={init} is no decoder; choose from {', '.join(decoders.names())}, or a run folder"
        )
    if (other.layout, other.network, other.latents) != (config.layout, config.network, config.latents):
        raise UserError(
            f"init={init} is another decoder than recipe.student; choose the one it was trained as"
        )
    return {key: value.float() for key, value in read_state(folder / decoders.MODEL).items()}
