"""Pretraining: joint flow matching of video and audio.

Both modalities go along the straight path x_s = (1 - s) x0 + s eps, and one network predicts both velocities
eps - x0 from the noisy pair and the text (Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv
2209.03003). The network has no noise level as input, so it learns E[v | x] under the sigma prior of training; the
prior is part of the checkpoint.

One batch:
  1. draw a noise level for each modality of each sample, shared or independent;
  2. condition some samples: the first latent frame, the whole audio or the whole video stays clean;
  3. drop some texts, for classifier-free guidance;
  4. loss: squared velocity error, averaged per sample and modality over what is not clean, then weighted.
     Moving positions may get a larger weight (motion_floor < 1): they contain the lips, and they are few.
A missing or clean modality adds nothing to the loss.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from magihuman.errors import UserError
from magihuman.flow.path import masked_mean_per_sample, velocity_target
from magihuman.flow.sigmas import SigmaPrior
from magihuman.io.export import ExportConfig, Sampling
from magihuman.models.config import TreadConfig
from magihuman.models.flops import passes
from magihuman.training.context import TrainingContext
from magihuman.training.motion import motion_weight, sync_gap
from magihuman.training.optim import Ramp, require_shares, require_weights, value_at
from magihuman.training.rng import BatchRng
from recipes.base import Recipe


@dataclass(frozen=True)
class NoisedBatch:
    """A noised batch: network inputs, targets and masks.

    Attributes:
        video, audio: network inputs [B,C,T,h,w], [B,A,Ca]; text: B tensors [S,Ct].
        video_target, audio_target: velocities.
        video_mask [B,1,T,1,1], audio_mask [B,1,1]: 1 where the loss counts, 0 where the input is clean.
        video_sigma, audio_sigma: [B].
    """

    video: Tensor
    audio: Tensor
    text: list[Tensor]
    video_target: Tensor
    audio_target: Tensor
    video_mask: Tensor
    audio_mask: Tensor
    video_sigma: Tensor
    audio_sigma: Tensor


class Pretrain(Recipe):
    """Flow-matching pretraining.

    Args:
        sigma: prior of the noise levels.
        sampling: settings stored in the export for inference.
        video_weight, audio_weight: of the modalities' losses.
        motion_floor: loss weight of positions without motion (`motion_weight`); 1 gives all the same weight. May be a ramp.
        text_drop: probability that the text is replaced by the empty prompt's.
        first_frame, audio_conditioning, video_conditioning: probabilities that it stays clean. May be ramps.
        tread: token routing, or None.

    Raises:
        UserError: values out of range, or probabilities that sum to more than one.
    """

    def __init__(
        self,
        context: TrainingContext,
        *,
        sigma: SigmaPrior,
        sampling: Sampling,
        video_weight: float = 1.0,
        audio_weight: float = 1.0,
        motion_floor: float | Ramp = 1.0,
        text_drop: float = 0.1,
        first_frame: float | Ramp = 0.1,
        audio_conditioning: float | Ramp = 0.1,
        video_conditioning: float | Ramp = 0.0,
        tread: TreadConfig | None = None,
    ) -> None:
        super().__init__(context)
        self.sigma, self.sampling, self.tread = sigma, sampling, tread
        self.video_weight, self.audio_weight, self.motion_floor = video_weight, audio_weight, motion_floor
        self.text_drop, self.first_frame = text_drop, first_frame
        self.audio_conditioning, self.video_conditioning = audio_conditioning, video_conditioning
        require_weights(video_weight=video_weight, audio_weight=audio_weight)
        require_shares(
            motion_floor=motion_floor, text_drop=text_drop, first_frame=first_frame,
            audio_conditioning=audio_conditioning, video_conditioning=video_conditioning,
        )  # fmt: skip
        for share in (0.0, 1.0):
            both = value_at(audio_conditioning, share) + value_at(video_conditioning, share)
            if both > 1:
                raise UserError(
                    f"recipe.audio_conditioning + recipe.video_conditioning = {both:g} exceeds 1; lower one of them"
                )

    def configure_model(self) -> None:
        super().configure_model()
        assert self.denoiser is not None
        self.denoiser.model.tread = self.tread

    def export_config(self) -> ExportConfig:
        """As in every recipe, with the latest floor of the motion weights, which a fake score should be trained with, too."""
        config, floor = super().export_config(), value_at(self.motion_floor, self.progress)
        return replace(config, provenance={**config.provenance, "motion_floor": floor})

    def loss(self, batch: dict[str, Any], rng: BatchRng) -> Tensor:
        noised = self.noised(batch, rng, conditioned=True)
        video_velocity, audio_velocity = self.trained(noised.video, noised.audio, noised.text)

        video_error = (video_velocity - noised.video_target).square()
        audio_error = (audio_velocity - noised.audio_target).square()
        moving = motion_weight(batch["video"], value_at(self.motion_floor, self.progress))
        video_loss = masked_mean_per_sample(moving * video_error, noised.video_mask)  # [B]
        audio_loss = masked_mean_per_sample(audio_error, noised.audio_mask)  # [B]

        total = (self.video_weight * video_loss + self.audio_weight * audio_loss).mean()
        plain = masked_mean_per_sample(video_error, noised.video_mask)
        has_audio = noised.audio_mask.flatten(1).amax(1) * (1.0 if noised.audio.shape[1] else 0.0)
        has_video = noised.video_mask.flatten(1).amax(1)
        self.meter.add("loss", total)
        self.meter.add("loss/video", plain, has_video)
        self.meter.add("loss/audio", audio_loss, has_audio)
        self.meter.add_bands("video", plain, noised.video_sigma, has_video)
        self.meter.add_bands("audio", audio_loss, noised.audio_sigma, has_audio)
        return total

    def noised(self, batch: dict[str, Any], rng: BatchRng, conditioned: bool) -> NoisedBatch:
        """Noise a batch; with conditioning and dropped texts where `conditioned`."""
        video, audio = batch["video"], batch["audio"]
        device, samples, frames = video.device, len(video), video.shape[2]

        levels = [self.sigma.sample(1, generator) for generator in rng.generators]
        video_sigma = torch.cat([level[0] for level in levels]).to(device)
        audio_sigma = torch.cat([level[1] for level in levels]).to(device)
        video_noise = rng.normal(video.shape[1:]).to(device)
        audio_noise = rng.normal(audio.shape[1:]).to(device)
        first, which, dropped = rng.uniform(), rng.uniform(), rng.uniform()

        text = list(batch["text"])
        video_mask = torch.ones(samples, 1, frames, 1, 1, device=device)
        audio_mask = torch.ones(samples, 1, 1, device=device)
        if conditioned:
            if frames > 1:
                clean = (first < value_at(self.first_frame, self.progress)).to(device)
                video_mask[:, :, 0] = (~clean).float().view(-1, 1, 1, 1)
            if audio.shape[1]:  # at most one modality is clean, and only if the other exists
                clean_audio = which < value_at(self.audio_conditioning, self.progress)
                clean_video = which >= 1 - value_at(self.video_conditioning, self.progress)
                audio_mask *= (~clean_audio).float().view(-1, 1, 1).to(device)
                video_mask *= (~clean_video).float().view(-1, 1, 1, 1, 1).to(device)
            null = self.context.null_text.to(device)
            text = [null if drop else t for t, drop in zip(text, dropped < self.text_drop, strict=True)]

        # Conditioning has noise level 0, frame by frame for the video.
        video_level = video_sigma.view(-1, 1, 1, 1, 1) * video_mask
        audio_level = audio_sigma.view(-1, 1, 1) * audio_mask
        return NoisedBatch(
            video=(1 - video_level) * video + video_level * video_noise,
            audio=(1 - audio_level) * audio + audio_level * audio_noise,
            text=text,
            video_target=velocity_target(video, video_noise),
            audio_target=velocity_target(audio, audio_noise),
            video_mask=video_mask,
            audio_mask=audio_mask,
            video_sigma=video_sigma,
            audio_sigma=audio_sigma,
        )

    @torch.no_grad()
    def validation_metrics(self, network: Any, batch: dict[str, Any], rng: BatchRng) -> dict[str, float]:
        """Unweighted losses, and the sync gap, which tells whether lips will follow the audio."""
        noised = self.noised(batch, rng, conditioned=False)
        video_velocity, audio_velocity = network(noised.video, noised.audio, noised.text)
        metrics = {"val/video": float((video_velocity - noised.video_target).square().mean())}
        if batch["audio"].shape[1]:
            metrics["val/audio"] = float((audio_velocity - noised.audio_target).square().mean())
            noise = (noised.video_target + batch["video"], noised.audio_target + batch["audio"])
            metrics["val/sync_gap"] = sync_gap(network, batch["video"], batch["audio"], batch["text"], noise)
        return metrics

    def batch_flops(self, batch: dict[str, Any]) -> float:
        """See `Recipe.batch_flops`; with token routing, only the tokens that a layer processes count."""
        model, _ = self.context.transformer
        return float(sum(passes(model, sample, tread=self.tread).update for sample in self.samples(batch)))
