"""Continuous-time consistency distillation: a student of one or two steps, for joint audio and video. Experimental.

The student's data estimate f(x, s) = x - s F(x) is to be the clip at which the teacher's probability-flow ODE arrives from x,
for every x on the way (Song et al. 2023, arXiv 2303.01469; in continuous time sCM, Lu and Song 2024, arXiv 2410.11081).

The path and its tangent. On x_s = (1 - s) x0 + s eps with v = eps - x0, the ODE is dx/ds = v(x), v the teacher's velocity with
guidance. Let s hold the noise level of every entry: that of its modality, which may differ between video and audio, and 0
where the latents are conditioning. Scaling all levels by tau from 1 to 0 leads to the data, with dx/dtau = s v. The network is
told no level, so F changes along this path only because x does:
    df/dtau = s v - s F(x) - s J_F(x) (s v) = s g,        g = v - F - J_F(x) (s v).
There is no derivative by time, and f(x, 0) = x holds for any F. f is constant along the path if and only if g = 0. The
product of Jacobian and direction is one forward-mode pass (`magihuman.distill.tangent`).

The objective. With sg for stop-gradient, the gradient of sCM is that of E[w(s) f . sg(df/dtau)] by the weights of F. With
w = 1 / s^2 it is that of
    1/2 mean |F - sg(F + g / (rms(g) + c))|^2
per sample and modality, over generated positions: F moves along g, whose size is normalised. So this is MeanFlow's identity
(Geng et al. 2025, arXiv 2505.13447) for the mean velocity from s to 0, with the teacher's velocity instead of the sample's.
The student starts as the teacher, and the weight of the derivative in g rises from 0 (the tangent warm-up of sCM): with
weight 0 the target is the teacher's velocity with guidance.

Sampling: with K = 1, f of noise; with K steps the re-noising solver. Over all K its levels have the distribution of the prior
`shifted` with the solver's shift, which is the default prior of training.

What forward-mode differentiation excludes: torch.compile, DeepSpeed (zero1 to zero3) and context parallelism are refused. The
derivative is computed in fp32 with unfused attention whatever the precision of the training.
rCM (arXiv 2510.08431) adds the distribution matching of `recipes.dmd2` for sharper samples; this recipe does not.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from magihuman import zoo
from magihuman.codecs.bundle import bundle_spec
from magihuman.distill.objective import surrogate_loss
from magihuman.distill.rollout import MicroBatch, micro_batches
from magihuman.distill.tangent import consistency_tangent, normalised, velocity_and_derivative
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance, combine
from magihuman.flow.path import add_noise, expand_like, masked_mean_per_sample
from magihuman.flow.sampling import MODALITIES, Pair, each
from magihuman.flow.sigmas import SigmaPrior
from magihuman.io.export import Sampling
from magihuman.models.denoiser import Denoiser
from magihuman.models.flops import passes
from magihuman.training.context import TrainingContext
from magihuman.training.optim import Ramp, require_shares, require_weights, value_at
from magihuman.training.rng import BatchRng
from recipes.base import Recipe

UNGUIDED = Guidance(1, 1, 0, 1)
SIGMA = SigmaPrior("shifted", shift=5.0)
DERIVATIVE = Ramp(0.0, 1.0, 0.0, 0.3)


class Consistency(Recipe):
    """Continuous-time consistency distillation.

    Args:
        steps: K of the exported sampling settings, which use the re-noising solver without guidance; shift: of its grid.
        sigma: prior of the noise levels. The student's own; it need not be the teacher's.
        guidance: of the teacher; None takes the one that its checkpoint is sampled with.
        derivative: weight of the derivative in the tangent, a number or a ramp.
        floor: c, in units of the velocity.
        video_weight, audio_weight: of the modalities' losses.
        first_frame, audio_conditioning: probabilities of conditioning on the batch's latents.

    Raises:
        UserError: settings that cannot be trained with.
    """

    strategies = ("single", "ddp", "fsdp2")
    # The loss has about the same size throughout, since tangents are normalised.
    watched = ("tangent/video", "tangent/audio")
    shown = ("tangent/video", "tangent/audio", "val/tangent_video", "val/tangent_audio")

    def __init__(
        self,
        context: TrainingContext,
        *,
        steps: int = 2,
        shift: float = 5.0,
        sigma: SigmaPrior = SIGMA,
        guidance: Guidance | None = None,
        derivative: float | Ramp = DERIVATIVE,
        floor: float = 0.1,
        video_weight: float = 1.0,
        audio_weight: float = 1.0,
        first_frame: float = 0.1,
        audio_conditioning: float = 0.1,
    ) -> None:
        super().__init__(context)
        if context.init is None:
            raise UserError(
                "consistency distils a trained checkpoint; give init=NAME_OR_FOLDER, for example init=scene/base"
            )
        if steps < 1 or not shift > 0 or not floor > 0:
            raise UserError(
                f"recipe.steps={steps} must be at least 1, recipe.shift={shift} and recipe.floor={floor} greater than 0"
            )
        if context.trainer.compile:
            raise UserError(
                "trainer.compile=true excludes the forward-mode derivative of recipe=consistency; leave it out"
            )
        if context.strategy.context_parallel > 1:
            raise UserError(
                f"strategy.context_parallel={context.strategy.context_parallel} excludes the forward-mode derivative of "
                "recipe=consistency; leave it 1"
            )
        require_weights(video_weight=video_weight, audio_weight=audio_weight)
        require_shares(derivative=derivative, first_frame=first_frame, audio_conditioning=audio_conditioning)
        self.sigma, self.sampling = sigma, Sampling("renoise", steps, shift, UNGUIDED)
        self.guidance = guidance or zoo.config_of(context.init).sampling.guidance
        if self.guidance.needed and bundle_spec(context.codecs).negative_prompt:
            raise UserError(
                "the released model is guided away from its own negative prompt, which recipe=consistency does not take; set "
                "recipe.guidance={video_high: 1, video_low: 1, audio: 1}"
            )
        self.derivative, self.floor = derivative, floor
        self.modality_weights = Pair(video_weight, audio_weight)  # type: ignore[arg-type]
        self.first_frame, self.audio_conditioning = first_frame, audio_conditioning
        # In a list, so that Lightning does not save it as a submodule; `init` names it.
        self.teacher: list[Denoiser] = []

    # The objective

    def loss(self, batch: dict[str, Any], rng: BatchRng) -> Tensor:
        micro, x, sigma = self.noised(batch, rng)
        teacher, velocity, derivative = self.fields(self.trained, micro.text, x, sigma)
        weight = value_at(self.derivative, self.progress)
        trained = Pair(*self.trained(x.video, x.audio, micro.text))
        total = x.video.new_zeros(())
        for m, name in enumerate(MODALITIES):
            mask = micro.conditioning.mask[m]
            tangent = consistency_tangent(teacher[m], velocity[m], derivative[m], weight)
            loss = surrogate_loss(trained[m], -normalised(tangent, mask, self.floor), mask)
            total = total + self.modality_weights[m] * loss.mean()
            # Logged with the whole derivative, so that the values before and after the warm-up can be compared.
            full = consistency_tangent(teacher[m], velocity[m], derivative[m])
            error = masked_mean_per_sample(full.square(), mask)
            generated = mask.flatten(1).amax(1) * (1.0 if x[m].shape[1:].numel() else 0.0)
            self.meter.add(f"tangent/{name}", error, generated)
            self.meter.add_bands(f"tangent/{name}", error, sigma[m].flatten(1).amax(1), generated)
        self.meter.add("loss", total)
        return total

    def noised(self, batch: dict[str, Any], rng: BatchRng, conditioned: bool = True) -> tuple[MicroBatch, Pair, Pair]:
        """A batch with its conditioning, its noisy latents x, and every entry's noise level, of the shapes of the masks."""
        first, audio = (self.first_frame, self.audio_conditioning) if conditioned else (0.0, 0.0)
        (micro,) = micro_batches(batch, rng, first_frame=first, audio_conditioning=audio, gan=False, size=None)
        clean, mask = micro.conditioning.latents, micro.conditioning.mask
        draws = [self.sigma.sample(1, g) for g in micro.generators]
        levels = Pair(*(torch.cat([draw[m] for draw in draws]).to(clean.video.device) for m in (0, 1)))
        x = micro.conditioning.insert(each(add_noise, clean, micro.normal(), levels))
        return micro, x, each(lambda level, at: expand_like(level, at) * at, levels, mask)

    def fields(self, network: Any, text: list[Tensor], x: Pair, sigma: Pair) -> tuple[Pair, Pair, Pair]:
        """v of the teacher, F of `network` and J_F(x) (s v) at x, without gradients.

        Args:
            sigma: s, the noise level of every entry, of the shapes of the masks.
        """
        teacher = self.teacher_velocity(x, text, sigma)
        direction = each(lambda level, v: level * v, sigma, teacher)
        return teacher, *velocity_and_derivative(network, x, text, direction)

    @torch.no_grad()
    def teacher_velocity(self, x: Pair, text: list[Tensor], sigma: Pair) -> Pair:
        """v with guidance."""
        (network,) = self.teacher
        positive = Pair(*network(x.video, x.audio, text))
        if not self.guidance.needed:
            return positive
        null = [self.context.null_text.to(x.video.device)] * len(text)
        negative = Pair(*network(x.video, x.audio, null))
        levels = (level.flatten(1).amax(1) for level in sigma)
        scales = (self.guidance.at(name, level, x.video) for name, level in zip(MODALITIES, levels, strict=True))
        return Pair(*map(combine, positive, negative, scales))

    def validation_metrics(self, network: Any, batch: dict[str, Any], rng: BatchRng) -> dict[str, float]:
        """Mean square of the tangent, 0 for a consistent network."""
        micro, x, sigma = self.noised(batch, rng, conditioned=False)
        tangents = each(consistency_tangent, *self.fields(network, micro.text, x, sigma))
        pairs = zip(MODALITIES, tangents, strict=True)
        return {f"val/tangent_{name}": float(g.square().mean()) for name, g in pairs if g.numel()}

    def batch_flops(self, batch: dict[str, Any]) -> float:
        """See `Recipe.batch_flops`: the student's update, its derivative, and the teacher's passes."""
        model, _ = self.context.transformer
        total = 0
        for sample in self.samples(batch):
            student = passes(model, sample)
            total += (
                student.update + student.through + student.forward
            )  # a derivative costs what a backward to the input does
            if self.guidance.needed:
                total += passes(model, replace(sample, text=len(self.context.null_text))).forward
        return float(total)

    # The teacher

    def configure_model(self) -> None:
        if self.denoiser is not None:
            return
        super().configure_model()
        assert self.context.init is not None
        self.teacher = [self.frozen_checkpoint(self.context.init)]

    def on_fit_start(self) -> None:
        for network in self.teacher:
            network.to(self.device)

    # Saving

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["recipe"]["init"] = self.context.init

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved, init = checkpoint["recipe"]["init"], self.context.init
        if saved != init:
            raise UserError(f"the checkpoint was distilled from init={saved}, not from init={init}; give init={saved}")
