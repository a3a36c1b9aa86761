"""Super-resolution: the second stage, which refines upsampled latents of the first, conditioned on the clip's audio.

What inference does (SPEC 4.4). Let u be the upsampled first-stage latents, and let a = table[k] and b = sqrt(1 - a^2) be
the variance-preserving weights of index k = 220 (.839 and .544). The solver starts at its first noise level,
sigma_0 = .9998, from X = a u + b eps, and reads the network's output as a velocity, so that its data estimate is
m_i = x_i - sigma_i v_i. X is not a point of the flow path between data and noise (oddity O7): on that path, a clip at
sigma = .9998 is noise, while X is a clip with the noise-to-signal ratio of sigma = b / (a + b) = .39, scaled
by a + b = 1.38.

Which path to train on. One step of the solver (first order; higher orders add differences of the m_i) is
    x_{i+1} = r x_i + (1 - r) m_i,    r = sigma_{i+1} / sigma_i.
If the estimates are right, m_i = z, then by induction x_i = s X + (1 - s) z with s = sigma_i / sigma_0: the states
of inference lie on the straight line from X to the clip z, for any X. The field that transports the
distribution of X to that of z along these lines is
    v(x, s) = E[X - z | x_s = x],    x_s = (1 - s) z + s X,
flow matching with a coupled source (Albergo et al. 2023, arXiv 2310.03725). So the source of the path is X, and
the target is X - z. With the usual target eps - z the first estimate would be z + a u - (1 - b) eps, about
1.84 z - .46 eps, even for a perfect network: training on the plain path (`path: flow`, kept for the ablation)
cannot work with this solver. The network has no noise level as input and needs none: x_s contains noise of size s b.

Which noise levels. The grid of K steps is sigma(u) = 5u / (1 + 4u) at u = 1, 1 - 1/K, ..., 1/K. Over all K its points
have the distribution of the prior `shifted` with shift 5, which is therefore the prior of training. The last of K steps begins
at sigma(1/K), which is .556 for 5 steps, .833 for 2 and 1 for 1, and K steps or fewer ask for no velocity below: with
`sigma: null` u is uniform in the interval [1/K, 1], which ends there (the positions of inference are up to 2e-4 lower, since
the solver's u begins at .999).

Which weights. Euler's result is X - sum_i d_i v_i with d_i = sigma_i - sigma_{i+1}, so velocity errors e_i cause
the error sum_i d_i e_i, and since the d_i sum to one, Jensen's inequality bounds its square by sum_i d_i |e_i|^2:
an error counts as much as the length of its step. For many steps and under the shifted prior that is the
weight d sigma / d u = 5 / (1 + 4u)^2 (`weight: step`), the same objective as a uniform prior with weight one; for u
in [l, 1] its mean is 1 / (1 + 4l), by which it is divided. For five steps it is too large at the end: the last step
goes from s = .556 to 0 with the estimate at .556, and the weight below .556, which is .556 of the total, falls on
positions that inference never visits. `weight: one` counts all positions alike, a fifth of them below .556, and so
emphasises the first steps. The bound also ignores how far training can lower each error: close to the clip, v is
noise that x_s hardly contains any more, so that loss stays high (.24 below s = .2 against .02 above .8 in tiny/sr's
last steps) and dominates the others.
Measured after 150 steps from tiny/base, 3 seeds, 40 clips (eval/results/tiny_sr/ablation): `one` is .93 dB above
`step` and better in lip sync, hence the default; the plain path is 8.2 dB below it, a uniform prior .53 dB, the start
of the path alone .19 dB.

Fewer steps: distillation. v(x, s) is a mean over all clips z that fit x. One step from the start X leads to X - v(X, 1) =
E[z | X], the mean of the clips, which is blurred where many fit; further steps choose among them. With a `teacher`, a second
stage of more steps, the end of the path is not the clip but z = R(X), the teacher's own result from the same start X with the
same audio, text and first frame. R is a function, so X determines X - z: v(X, 1) = X - R(X), and one step leads to R(X). Below
the start v(x, s) is a mean only over those X whose lines meet in x. This is reflow, and with s = 1 alone its distillation to
one step (Liu et al. 2022, arXiv 2209.03003). The errors of the teacher's results are learned, too.

One batch: first-stage latents of each clip (`magihuman.training.first_stage`); index k and audio noise level from
ranges around the released values; X by the function of inference (`magihuman.flow.super_resolution.start`);
audio s eps + (1 - s) a, a point of the audio's own flow path, whose velocity is a small auxiliary task; for some clips
the first latent frame is clean, at the size of this stage. Texts are not dropped: the second stage uses no guidance.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from magihuman import zoo
from magihuman.codecs.bundle import load_bundle
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.flow.path import masked_mean_per_sample
from magihuman.flow.sampling import Conditioning, Noise, Pair, denoise
from magihuman.flow.sigmas import SigmaPrior, zero_snr_table
from magihuman.flow.solvers import make_solver
from magihuman.flow.super_resolution import AUDIO_NOISE, NOISE_INDEX, SOLVER, start
from magihuman.io.export import ExportConfig, Sampling, Size
from magihuman.models.config import DiTConfig, PackConfig
from magihuman.models.denoiser import Denoiser
from magihuman.models.flops import passes, samples
from magihuman.training.context import TrainingContext
from magihuman.training.first_stage import FirstStage, FirstStageSettings
from magihuman.training.motion import motion_weight
from magihuman.training.optim import Ramp, require_shares, require_weights, value_at
from magihuman.training.rng import BatchRng
from recipes.base import Recipe


@dataclass(frozen=True)
class SRBatch:
    """A noised batch: network inputs, targets and mask.

    Attributes:
        video [B,C,T,H,W], audio [B,A,Ca]: network inputs.
        video_target, audio_target: velocities.
        mask [B,1,T,1,1]: 1 where the loss counts, 0 where the frame is clean.
        sigma [B]: position on the path.
    """

    video: Tensor
    audio: Tensor
    video_target: Tensor
    audio_target: Tensor
    mask: Tensor
    sigma: Tensor


class SuperResolution(Recipe):
    """Training of the second stage.

    Args:
        first_stage: the latents to refine.
        steps: K of the exported sampling settings, which have no guidance; shift: of the solver's grid.
        sigma: prior of the position on the path (its audio part is not used); None: u uniform in [1/K, 1], which ends where the
            last step begins, see above.
        teacher: checkpoint of a second stage whose results, in the steps of its export and without guidance, are the ends of
            the paths; None: the clips are. It computes in the precision of the training.
        weight: of a velocity error by its position on the path: "one" or "step", see above.
        path: "bridge" from the solver's true start; "flow" from plain noise, for comparison only.
        noise_index: range of the index into the noise table; audio_noise: range of the audio's noise level.
        audio_weight: of the audio's loss.
        motion_floor: loss weight of positions without motion (`motion_weight`); 1 gives all the same weight. May be a ramp.
        first_frame: probability that the first frame is clean.

    Raises:
        UserError: shards without a second size, an invalid range, or a teacher that does not fit.
    """

    fixed_on_resume = ("teacher",)
    may_differ_from_init = ("coords_style", "frame_receptive_field", "local_attn_layers")

    def __init__(
        self,
        context: TrainingContext,
        *,
        first_stage: FirstStageSettings,
        steps: int = 5,
        shift: float = 5.0,
        sigma: SigmaPrior | None = None,
        teacher: str | None = None,
        weight: Literal["step", "one"] = "one",
        path: Literal["bridge", "flow"] = "bridge",
        noise_index: tuple[int, int] = (180, 260),
        audio_noise: tuple[float, float] = (0.6, 0.8),
        audio_weight: float = 0.1,
        motion_floor: float | Ramp = 1.0,
        first_frame: float = 0.1,
    ) -> None:
        if first_stage.size is None and context.sr_size is None:
            raise UserError(
                "these shards hold clips at one size; prepare them with sr_sizes=, or set "
                "recipe.first_stage.size=[HEIGHT,WIDTH] to make the first stage's latents from them"
            )
        if steps < 1:
            raise UserError(f"recipe.steps={steps} must be at least 1")
        super().__init__(context)
        self.settings, self.sampling = first_stage, Sampling(SOLVER, steps, shift, Guidance(1, 1, 0, 1))
        self.sigma = sigma or SigmaPrior("shifted", shift=shift, low=1 / steps)
        self.weight, self.path = weight, path
        self.noise_index, self.audio_noise = noise_index, audio_noise
        self.audio_weight, self.motion_floor, self.first_frame = audio_weight, motion_floor, first_frame
        self._first_stage: FirstStage | None = None
        require_weights(audio_weight=audio_weight)
        require_shares(motion_floor=motion_floor, first_frame=first_frame)
        if first_stage.base_share > 0:
            assert first_stage.base is not None
            base = zoo.config_of(first_stage.base)
            base.contract.require(context.contract, "recipe.first_stage.base", "the shards")
        if not 0 <= noise_index[0] <= noise_index[1] < 1000 or not 0 <= audio_noise[0] <= audio_noise[1] <= 1:
            raise UserError(
                f"recipe.noise_index={list(noise_index)} should be a range within 0 to 999 and "
                f"recipe.audio_noise={list(audio_noise)} one within 0 to 1"
            )
        self.teacher_config = None if teacher is None else self.require_teacher(teacher)
        # In a list, so that Lightning does not save it as a submodule; `recipe.teacher` names it.
        self.teacher: list[Denoiser] = []
        self.teacher_name = teacher

    def require_teacher(self, name: str) -> ExportConfig:
        """Config of the checkpoint `name`.

        Raises:
            UserError: it is no second stage for these clips, or the path has another start than its results.
        """
        if not name:
            raise UserError("recipe.teacher is empty; give a second stage, such as scene/sr, or null")
        try:
            config = zoo.config_of(name)
        except UserError as error:
            raise UserError(f"recipe.teacher={name}: {error}") from None
        _, pack = self.context.transformer
        if self.path != "bridge":
            raise UserError(
                f"recipe.teacher={name} refines from the start of recipe.path=bridge, not of {self.path}; leave one of the two "
                "settings out"
            )
        config.contract.require(self.context.contract, f"recipe.teacher={name}", "the shards")
        if config.codecs != self.context.codecs:
            raise UserError(
                f"recipe.teacher={name} is for the codecs {config.codecs}, and the shards have {self.context.codecs}; give a "
                "teacher of theirs"
            )
        if config.pack.coords_style != pack.coords_style:
            raise UserError(
                f"recipe.teacher={name} has coordinates {config.pack.coords_style}, and this training {pack.coords_style}; "
                "give a second stage, such as scene/sr"
            )
        return config

    def notes(self) -> list[str]:
        found, teacher, name = super().notes(), self.teacher_config, f"recipe.teacher={self.teacher_name}"
        if teacher is None:
            return found
        if teacher.sampling.guidance.needed:
            found.append(f"{name} is sampled with guidance by default; here its results are without")
        if teacher.sampling.steps <= self.sampling.steps:
            found.append(
                f"{name} is sampled in {teacher.sampling.steps} steps, no more than recipe.steps="
                f"{self.sampling.steps}: nothing is saved"
            )
        own, theirs = self.export_config(), teacher.size
        if theirs != own.size:
            found.append(f"{name} is for clips of {_shape(theirs)}, and this training is of {_shape(own.size)}")
        if teacher.model.local_attn_layers != own.model.local_attn_layers:
            found.append(
                f"{name} has local attention in layers {list(teacher.model.local_attn_layers)}, and this training in "
                f"{list(own.model.local_attn_layers)}"
            )
        return found

    def configure_model(self) -> None:
        if self.denoiser is not None:
            return
        super().configure_model()
        if self.teacher_name is not None:
            self.teacher = [self.frozen_checkpoint(self.teacher_name)]

    def on_fit_start(self) -> None:
        for network in self.teacher:
            network.to(self.device)

    @property
    def first_stage(self) -> FirstStage:
        """Made at its first use, on the training's device."""
        if self._first_stage is None:
            chosen, base, codec = self.settings, None, None
            if chosen.base_share > 0:
                assert chosen.base is not None
                dtype = torch.bfloat16 if self.context.trainer.precision == "bf16" else torch.float32
                loaded = zoo.load(chosen.base, self.device, dtype)
                base = loaded.denoiser.requires_grad_(False)
            if chosen.size is not None:
                codec = load_bundle(self.context.codecs, self.device).video_codec
            self._first_stage = FirstStage(chosen, base, codec)
        return self._first_stage

    def loss(self, batch: dict[str, Any], rng: BatchRng) -> Tensor:
        batch = self.paired(batch)
        noised = self.noised(batch, rng, conditioned=True)
        assert self.denoiser is not None
        video_velocity, audio_velocity = self.denoiser(noised.video, noised.audio, batch["text"])

        video_error = (video_velocity - noised.video_target).square()
        audio_error = (audio_velocity - noised.audio_target).square()
        moving = motion_weight(batch["video_sr"], value_at(self.motion_floor, self.progress))
        video_loss = masked_mean_per_sample(moving * video_error, noised.mask)  # [B]
        audio_loss = masked_mean_per_sample(audio_error)  # [B]; 0 without audio

        weight = self.step_weight(noised.sigma) if self.weight == "step" else 1.0
        total = (weight * video_loss + self.audio_weight * audio_loss).mean()
        plain = masked_mean_per_sample(video_error, noised.mask)
        self.meter.add("loss", total)
        self.meter.add("loss/video", plain)
        self.meter.add("loss/audio", audio_loss)
        self.meter.add_bands("video", plain, noised.sigma, torch.ones_like(plain))
        return total

    def step_weight(self, sigma: Tensor) -> Tensor:
        """d sigma / d u of the solver's grid at sigma [B], s / (1 + (s - 1) u)^2, divided by its mean for u in [low, 1].

        `low` is that of the prior; under a prior `shifted` with the solver's shift s the weights have mean 1.
        """
        shift = self.sampling.shift
        u = sigma / (shift - (shift - 1) * sigma)
        mean = 1 / (1 + (shift - 1) * self.sigma.low)
        return shift / (1 + (shift - 1) * u).square() / mean

    def paired(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `video` at the first stage's size and `video_sr` at the second's, fp32.

        Raises:
            UserError: a caption of one token, or clips without a second size.
        """
        if self.context.transformer[1].coords_style == "v1" and min(len(text) for text in batch["text"]) < 2:
            raise UserError(
                "a clip's caption is a single token, which has no position in coordinates v1 (SPEC 2.1); give every "
                "clip a caption (data.prepare captions=required)"
            )
        if self.settings.size is None:
            if "video_sr" not in batch:
                raise UserError(
                    f"clip {batch['key'][0]} is stored at one size and others at two; prepare all with sr_sizes="
                )
            return {**batch, "video_sr": batch["video_sr"].float()}
        large = batch.get("video_sr", batch["video"]).float()
        return {**batch, "video": self.first_stage.downsized(large), "video_sr": large}

    def noised(self, batch: dict[str, Any], rng: BatchRng, conditioned: bool) -> SRBatch:
        """Noise a paired batch; with a clean first frame for some clips where `conditioned`."""
        clean, audio = batch["video_sr"], batch["audio"]
        device, samples, frames = clean.device, len(clean), clean.shape[2]
        sigma = torch.cat([self.sigma.sample(1, g)[0] for g in rng.generators]).to(device)
        first = rng.uniform()
        noise = rng.normal(clean.shape[1:]).to(device), rng.normal(audio.shape[1:]).to(device)
        refined = self.first_stage(batch["video"], audio, batch["text"], rng)
        source, noisy_audio = self.source(refined, audio, noise, rng)
        if self.path == "flow":
            source = noise[0]
        mask = torch.ones(samples, 1, frames, 1, 1, device=device)
        if conditioned and frames > 1:
            mask[:, :, 0] = (first >= self.first_frame).float().view(-1, 1, 1, 1).to(device)
        end = self.refined(source, noisy_audio, batch["text"], clean, mask) if self.teacher else clean
        level = sigma.view(-1, 1, 1, 1, 1) * mask
        return SRBatch(
            video=(1 - level) * end + level * source,
            audio=noisy_audio,
            video_target=source - end,
            audio_target=noise[1] - audio,
            mask=mask,
            sigma=sigma,
        )

    def source(
        self, video: Tensor, audio: Tensor, noise: tuple[Tensor, Tensor], rng: BatchRng
    ) -> tuple[Tensor, Tensor]:
        """The start of inference, X and the noisy audio, at a random noise index and audio noise level.

        Args:
            video: first-stage latents [B,C,T,h,w]; audio: [B,A,Ca].
            noise: for both, the video's at the size of the second stage.
        """
        position, level = rng.uniform().double(), rng.uniform().double()
        low, high = self.noise_index
        index = (low + (high + 1 - low) * position).long()
        scale = self.audio_noise[0] + (self.audio_noise[1] - self.audio_noise[0]) * level
        self.meter.add("noise_index", index)
        self.meter.add("audio_noise", scale)
        return start(video, audio, noise, zero_snr_table()[index], scale)

    def refined(self, source: Tensor, audio: Tensor, text: list[Tensor], clean: Tensor, mask: Tensor) -> Tensor:
        """Results of the teacher [B,C,T,H,W], fp32, by the loop of inference, without gradients.

        Args:
            source, audio: the start X [B,C,T,H,W] and the noisy audio [B,A,Ca], as `SRBatch` has it.
            clean: the clips; frames where the mask [B,1,T,1,1] is 0 are theirs, in every step and in the result.
        """
        assert self.teacher_config is not None
        (network,), sampling = self.teacher, self.teacher_config.sampling
        solver = make_solver(SOLVER, sampling.steps, sampling.shift)
        given = Conditioning(Pair(clean, audio), Pair(mask, torch.ones_like(audio[:, :1, :1])))

        def velocity(x: Pair, _: int) -> Pair:
            return Pair(*network(x.video, x.audio, text))

        return denoise(velocity, (solver, None), Noise(Pair(source, audio)), given).video

    @torch.no_grad()
    def validation_metrics(self, network: Any, batch: dict[str, Any], rng: BatchRng) -> dict[str, float]:
        """Errors of the average or the trained network on clips without a given first frame.

        Returns:
            val/video, val/audio: mean squared velocity errors on the path of training, whose end is the teacher's result where
                there is a teacher, else the clip. val/start: mean squared error, against the clip, of the estimate from the
                released start, where the clip moves. val/audio_gap: (n - e) / n, where e is val/start and n the same error with
                noise for audio. Clips without audio have val/video alone.
        """
        batch = self.paired(batch)
        noised = self.noised(batch, rng, conditioned=False)
        video_velocity, audio_velocity = network(noised.video, noised.audio, batch["text"])
        metrics = {"val/video": float((video_velocity - noised.video_target).square().mean())}
        if not batch["audio"].shape[1]:
            return metrics
        metrics["val/audio"] = float((audio_velocity - noised.audio_target).square().mean())
        noise = rng.normal(batch["video_sr"].shape[1:]), rng.normal(batch["audio"].shape[1:])
        noise = noise[0].to(self.device), noise[1].to(self.device)
        signal = zero_snr_table()[NOISE_INDEX].item()
        moving = motion_weight(batch["video_sr"], floor=0.0)
        errors = []
        for scale in (AUDIO_NOISE, 1.0):
            video, noisy_audio = start(batch["video"], batch["audio"], noise, signal, scale)
            velocity, _ = network(video, noisy_audio, batch["text"])
            errors.append(float((moving * (video - velocity - batch["video_sr"]).square()).mean()))
        return metrics | {"val/start": errors[0], "val/audio_gap": (errors[1] - errors[0]) / max(errors[1], 1e-12)}

    def batch_flops(self, batch: dict[str, Any]) -> float:
        """See `Recipe.batch_flops`: the second stage's tokens, the teacher's steps, and the expected first-stage passes,
        which run on a random share of the clips. The codec does not count."""
        large = batch.get("video_sr", batch["video"])
        total, settings, teacher = super().batch_flops({**batch, "video": large}), self.settings, self.teacher_config
        if teacher is not None:
            total += teacher.sampling.steps * self.forward_flops(teacher.model, teacher.pack, large.shape, batch)
        if settings.base_share == 0:
            return total
        base = self.first_stage.base
        assert base is not None
        shape = tuple(batch["video"].shape)
        if settings.size is not None:
            strides = self.context.contract.video_stride[1:]
            shape = (*shape[:-2], *(side // by for side, by in zip(settings.size, strides, strict=True)))
        once = self.forward_flops(base.model.config, base.pack, shape, batch)
        return total + settings.base_share * settings.base_steps * once

    @staticmethod
    def forward_flops(model: DiTConfig, pack: PackConfig, shape: Sequence[int], batch: dict[str, Any]) -> int:
        """Of one forward pass of the batch through another network, with video latents of `shape` [...,T,h,w]."""
        lengths = [len(text) for text in batch["text"]]
        return sum(passes(model, sample).forward for sample in samples(pack, shape, batch["audio"].shape[1], lengths))

    def export_config(self) -> ExportConfig:
        """As in every recipe, with the size of the second stage as the clip's, and marked as a second stage."""
        config = super().export_config()
        config = replace(config, provenance={**config.provenance, "stage": "second"})
        if self.context.sr_size is not None:
            height, width = self.context.sr_size
            config = replace(config, size=replace(config.size, height=height, width=width))
        return config


def _shape(size: Size) -> str:
    return f"{size.frames} frames of {size.height} x {size.width}"
