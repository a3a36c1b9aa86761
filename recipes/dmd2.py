"""DMD-2: distils a flow-matching teacher into a few-step student, for joint audio and video.

Improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867) for a network without timestep
conditioning. Three networks of one shape start from the teacher's weights:

    student     v_G   samples in K steps with the re-noising solver, without guidance; is exported
    teacher     v_T   frozen, with guidance s_m(sigma) per modality m
    fake score  v_F   fitted to the student's samples by flow matching

One iteration:
  1. Roll out the student: K steps from noise without gradients; all states x_k and data estimates x0_k are kept.
  2. Fake score, R updates: noise x0_k of a random step k to a level of the teacher's prior, fit v_F to eps - x0_k.
  3. Student, one update: repeat the call at one x_k with gradients, noise its estimate x0 to y at a level s, and follow
         g_m = s (v_T - v_F)_m / mean |x0 - (y - s v_T)|_m     with v_T guided.
The two-time-scale rule (R updates per iteration, and a warm-up before the student's first update) keeps the fake score
accurate: with v_F = v_T the gradient would only push along the guidance.

Specific to this network and to joint audio and video:
  - Without timestep input v_F = v_T at p_student = p_data holds only if both were trained with the same prior of noise
    levels, so the fake score uses the teacher's prior. The more entries the latents have, the less the prior matters,
    since they show the level. The levels of step 3 are free: they weight the integral.
  - Motion weights of a loss change what it learns (`magihuman.training.motion`), so the fake score has the teacher's.
  - Audio has a hundredth of the video's entries, so every mean and normaliser is per modality.
  - First frames and audio given as conditioning stay clean in the inputs of all networks, and are left out of the loss.
  - The fake score cannot tell the steps k apart. Fitted to all of them it learns a mixture, and final samples
    overshoot to compensate for the blurred estimates of early steps: `fake_score.first_step` leaves those out.
  - The frequencies of attributes not specified by the prompt are visible only at high noise levels, and drift. A GAN
    loss on real latents (`magihuman.distill.discriminator`) prevents it; `magihuman.distill.collapse_monitor` measures it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from magihuman import zoo
from magihuman.codecs.bundle import bundle_spec
from magihuman.distill.collapse_monitor import CollapseMonitor, MonitorSettings, update_statistics
from magihuman.distill.discriminator import Discriminator, GanSettings
from magihuman.distill.fake_score_settings import (
    FakeScoreSettings,
    check_resume,
    check_settings,
    first_steps,
    rename_old_names,
)
from magihuman.distill.networks import Networks, build_networks, frozen
from magihuman.distill.objective import fake_score_loss, matching_gradient, surrogate_loss
from magihuman.distill.rollout import MicroBatch, Rollout, micro_batches, roll_out, sampler
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance, combine
from magihuman.flow.path import add_noise, x0_from_velocity
from magihuman.flow.sampling import MODALITIES, Pair, each
from magihuman.flow.sigmas import ScoreLevels, SigmaPrior
from magihuman.io.export import Sampling
from magihuman.io.text_features import read_text_features
from magihuman.models.config import LORAS, LoraConfig
from magihuman.models.denoiser import Denoiser
from magihuman.models.flops import distillation_flops
from magihuman.models.lora import base_state, lora_state, merge, without_base
from magihuman.training import parallel
from magihuman.training.callbacks import evaluating
from magihuman.training.context import TrainingContext
from magihuman.training.motion import motion_weight
from magihuman.training.optim import (
    build_optimizer,
    build_schedule,
    clip_gradients,
    decay_at,
    ema_update,
    fill_state,
    require_shares,
    require_weights,
)
from magihuman.training.rng import stream
from magihuman.zoo.lora_files import save_lora
from recipes.base import Recipe

SCORE, FAKE_SCORE, LORA = ScoreLevels(), FakeScoreSettings(), LoraConfig(64)
MONITOR, GAN = MonitorSettings(), GanSettings()


class DMD2(Recipe):
    """Distribution matching distillation (DMD-2).

    Args:
        steps: K of the student, which is sampled without guidance; solver, shift: of its sampler.
        sigma: prior of the fake score's noise levels; None takes the teacher's, uniform levels where that is unknown (released
            weights). Another one than a known prior is noted.
        score: noise levels of the student's objective.
        guidance: of the teacher in the objective; None takes the one that its checkpoint is sampled with.
        negative: file with the text features of the teacher's unconditional branch (`python -m inference.encode_text`); None
            takes those of the empty prompt, which is refused where the codecs' guided models expect a negative prompt.
        fake_score: its learning rate, updates R and steps.
        networks: weight sharing: full, lora_fake_score or lora, see `magihuman.distill.networks`; lora: size of LoRAs.
        monitor: limits of the collapse monitor.
        gan: GAN loss on real latents, off with weight 0.
        video_weight, audio_weight: of the modalities, in both objectives.
        first_frame, audio_conditioning: probabilities of conditioning on the batch's latents.
        first_step: the student is trained on this step and later ones; None is K // 2.
        micro_batch: samples that go through the networks together; None for the whole batch.

    Raises:
        UserError: settings that cannot be trained with.
    """

    optimizers_needed = 2
    needs_clips = False  # without conditioning and GAN loss
    watched = ("fake_score/video", "fake_score/audio")  # "loss", the size of the gradient, may grow from nothing
    shown = ("fake_score/video", "fake_score/audio", "loss", "monitor/diversity_video")
    learning_rates = "optim.lr and recipe.fake_score.lr"
    fixed_on_resume = ("networks", "lora", "gan.taps")
    renamed_values: ClassVar[dict[str, str]] = {"lora_critic": "lora_fake_score"}

    def __init__(
        self,
        context: TrainingContext,
        *,
        steps: int = 8,
        solver: str = "renoise",
        shift: float = 5.0,
        sigma: SigmaPrior | None = None,
        score: ScoreLevels = SCORE,
        guidance: Guidance | None = None,
        negative: str | None = None,
        fake_score: FakeScoreSettings = FAKE_SCORE,
        networks: str = "full",
        lora: LoraConfig = LORA,
        monitor: MonitorSettings = MONITOR,
        gan: GanSettings = GAN,
        video_weight: float = 1.0,
        audio_weight: float = 1.0,
        first_frame: float = 0.1,
        audio_conditioning: float = 0.1,
        first_step: int | None = 0,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(context)
        self.automatic_optimization = False
        if context.init is None:
            raise UserError("dmd2 distils a trained checkpoint; give init=NAME_OR_FOLDER, for example init=scene/base")
        assert self.parent is not None
        teacher = self.parent
        self.first_step, self.fake_score_first_step = first_steps(steps, first_step, fake_score.first_step)
        check_settings(context, networks, micro_batch)
        require_weights(video_weight=video_weight, audio_weight=audio_weight)
        require_shares(first_frame=first_frame, audio_conditioning=audio_conditioning)
        if fake_score.warmup >= self.max_steps:
            raise UserError(
                f"recipe.fake_score.warmup={fake_score.warmup} leaves the student none of trainer.max_steps="
                f"{self.max_steps}; raise max_steps, or lower the warm-up"
            )
        self.sigma = sigma or teacher.assumed_prior
        self.teacher_sampling = teacher.sampling
        self.guidance = guidance or teacher.sampling.guidance
        self.negative = self.unconditional_text(negative, monitor.every > 0)
        self.sampling = Sampling(solver, steps, shift, Guidance(1, 1, 0, 1))
        self.score, self.fake_score_settings = score, fake_score
        recorded = (
            teacher.provenance.get("motion_floor") if fake_score.motion_floor is None else fake_score.motion_floor
        )
        self.motion_weights_known = recorded is not None
        self.motion_floor = 1.0 if recorded is None else float(recorded)
        require_shares(**{"fake_score.motion_floor": self.motion_floor})
        self.sharing, self.lora = networks, lora
        self.modality_weights = {"video": video_weight, "audio": audio_weight}
        self.first_frame, self.audio_conditioning = first_frame, audio_conditioning
        self.micro_batch = micro_batch
        self.monitor = CollapseMonitor(monitor, stream(context.seed, "health") % 2**40)
        self.gan, self.taps = gan, gan.layers(context.transformer[0].num_layers)
        self.discriminator: Discriminator | None = None
        self.student_updates = self.fake_score_updates = 0
        self.networks: Networks | None = None
        self.strict_loading = networks == "full"  # else the frozen base is not in the checkpoint

    def unconditional_text(self, negative: str | None, monitored: bool) -> Tensor:
        """[S,Ct] text features of the teacher's unconditional branch; `monitored`: its samples are watched, too.

        Raises:
            UserError: the file `negative` cannot be used, is given for nothing, or is needed and not given.
        """
        guided = self.guidance.needed or (monitored and self.teacher_sampling.guidance.needed)
        if negative is not None:
            if not guided:
                raise UserError(f"recipe.negative={negative} has no effect, as the teacher is not guided: leave it out")
            return read_text_features(negative, "recipe.negative", self.context.codecs, self.context.contract)
        if guided and bundle_spec(self.context.codecs).negative_prompt:
            raise UserError(
                "guidance of the released model needs the features of its negative prompt: "
                "`MAGIHUMAN_RELEASE=CHECKOUT python -m inference.encode_text output=negative.safetensors` makes them; give "
                "recipe.negative=negative.safetensors (or, for the empty prompt, null_text.safetensors of the shards)"
            )
        return self.context.null_text

    def notes(self) -> list[str]:
        found = super().notes()
        if self.gan.weight and self.gan.updates is not None and self.gan.updates > self.fake_score_settings.updates:
            found.append(
                f"recipe.gan.updates={self.gan.updates} is more than the fake score's {self.fake_score_settings.updates} "
                "(recipe.fake_score.updates); the discriminator is trained with all of them"
            )
        if self.gan.weight and self.gan.start >= self.max_steps:
            found.append(f"recipe.gan.start={self.gan.start} is not reached within trainer.max_steps={self.max_steps}")
        if not self.motion_weights_known:
            found.append(
                f"the motion weights of the loss that init={self.context.init} was trained with are unknown; the fake score is "
                "trained without motion weights (recipe.fake_score.motion_floor=F sets them)"
            )
        assert self.parent is not None
        if self.parent.sigma_prior not in (None, self.sigma):
            found.append(
                f"recipe.sigma={self.sigma.to_dict()} is not the prior that {self.context.init} was trained with "
                f"({self.parent.sigma_prior.to_dict()}), and without timestep input both infer the level under theirs; remove "
                "recipe.sigma to take the teacher's"
            )
        return found

    # One iteration

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:  # type: ignore[override]
        assert self.networks is not None
        rng = self.begin_batch(batch)
        student_optimizer, fake_score_optimizer = self.optimizers()  # type: ignore[attr-defined]
        micro = list(
            micro_batches(
                batch, rng, first_frame=self.first_frame, audio_conditioning=self.audio_conditioning,
                gan=self.discriminator is not None, size=self.micro_batch,
            )
        )  # fmt: skip
        if self.monitor.due(self.step):
            self.check_collapse(batch)
        for update in range(self.fake_score_settings.updates):
            for m in micro:
                self.manual_backward(self.fake_score_objective(m, update) * (len(m.text) / len(rng)))
            self.update("fake_score", fake_score_optimizer, heads=self.trains_heads(update))
            self.fake_score_updates += 1
        if self.step >= self.fake_score_settings.warmup:
            heads = [] if self.discriminator is None else list(self.discriminator.parameters())
            with frozen([*self.networks.weights("fake_score").values(), *heads]):
                for m in micro:
                    self.manual_backward(self.student_objective(m) * (len(m.text) / len(rng)))
            self.update("student", student_optimizer)
            self.lr_schedulers().step()  # type: ignore[union-attr]
            self.student_updates += 1
        self.batches += 1
        self.after_step()

    def fake_score_objective(self, micro: MicroBatch, update: int) -> Tensor:
        """Loss of the fake score, and of the discriminator once the GAN loss is active."""
        rollout, conditioning = self.current_rollout(micro), micro.conditioning
        x0 = rollout.estimate(self.choose_steps(micro, update, self.fake_score_first_step))
        levels = [self.sigma.sample(1, g) for g in micro.generators]
        sigma = Pair(*(torch.cat([level[m] for level in levels]).to(x0.video.device) for m in (0, 1)))
        noise = micro.normal()
        noisy = conditioning.insert(each(add_noise, x0, noise, sigma))
        velocity = self.velocity("fake_score", micro.text, noisy, sigma)
        weights = Pair(motion_weight(x0.video, self.motion_floor), torch.ones_like(sigma.audio).view(-1, 1, 1))
        losses = each(fake_score_loss, velocity, x0, noise, conditioning.mask, weights)
        for name, values, mask in zip(MODALITIES, losses, conditioning.mask, strict=True):
            self.meter.add(f"fake_score/{name}", values, mask.flatten(1).amax(1))
        loss = self.weighted(losses)
        if self.trains_heads(update):
            assert self.discriminator is not None
            level = self.score.at(micro.uniform()).to(x0.video.device)
            features = partial(self.features, micro.text)
            gan_loss = self.discriminator.loss(features, x0, noise, level, conditioning)
            self.meter.add("gan/discriminator", gan_loss)
            loss = loss + gan_loss
        return loss

    def student_objective(self, micro: MicroBatch) -> Tensor:
        """Loss of the student, whose gradient is the distribution matching gradient, plus the GAN loss."""
        rollout, conditioning, text = self.current_rollout(micro), micro.conditioning, micro.text
        k = self.choose_steps(micro, self.fake_score_settings.updates, self.first_step)
        x, level = rollout.state(k), rollout.sigma(k)
        velocity = self.velocity("student", text, x, Pair(level, level))
        x0 = conditioning.insert(each(lambda a, b: x0_from_velocity(a, b, level), x, velocity))

        sigma = self.score.at(micro.uniform()).to(level.device)
        noise = micro.normal()
        noisy = conditioning.insert(each(lambda a, b: add_noise(a, b, sigma), x0, noise))
        with torch.no_grad():
            both = Pair(sigma, sigma)
            real, unguided = self.teacher_velocity(noisy, text, both)
            fake = self.velocity("fake_score", text, noisy, both)
            found = [matching_gradient(x0[m], noisy[m], real[m], fake[m], sigma, conditioning.mask[m]) for m in (0, 1)]
        gradient = Pair(found[0][0], found[1][0])
        statistics = update_statistics(x0, noise, gradient, unguided, fake, conditioning.mask)
        self.monitor.add(statistics)
        for name, (values, weights) in statistics.items():
            self.meter.add(name, values, weights)
        self.meter.add("loss", *statistics["dm/video"])
        self.meter.add("dm_not_finite", torch.stack([1 - f[1].float() for f in found]).amax(0))
        loss = self.weighted(each(surrogate_loss, x0, gradient, conditioning.mask))
        if self.gan_active:
            assert self.discriminator is not None
            gan_loss = self.discriminator.student_loss(partial(self.features, text), noisy, sigma)
            self.meter.add("gan/student", gan_loss)
            loss = loss + self.gan.weight * gan_loss
        return loss

    def update(self, role: str, optimizer: Any, heads: bool = False) -> None:
        """Clip, step, and free the gradients, so that memory holds those of one network at a time.

        Args:
            heads: whether those of the discriminator were trained, too; the fake score's optimiser has them.
        """
        assert self.networks is not None
        norm = clip_gradients(list(self.networks.weights(role).values()), self.context.optim.clip_norm)
        self.count_norm("grad_norm" if role == "student" else f"grad_norm/{role}", norm)
        if heads:
            assert self.discriminator is not None
            weights = list(self.discriminator.parameters())
            if self.context.strategy.name == "fsdp2":
                parallel.average_gradients(weights)
            self.count_norm("grad_norm/gan", clip_gradients(weights, None))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def current_rollout(self, micro: MicroBatch) -> Rollout:
        """The micro-batch's rollout; a new one after `samples_per_rollout` uses."""
        if micro.rollout is None or micro.uses >= self.fake_score_settings.samples_per_rollout:
            micro.rollout, micro.uses = self.rollout(micro), 0
        micro.uses += 1
        return micro.rollout

    def rollout(self, micro: MicroBatch) -> Rollout:
        """Sample with the student as inference does."""
        velocity = partial(self.velocity, "student", micro.text)
        return roll_out(self.sampling, velocity, micro.generators, micro.conditioning)

    def choose_steps(self, micro: MicroBatch, update: int, first: int) -> Tensor:
        """[B] on the CPU: a step k >= first per sample, uniform, and stratified over the whole batch."""
        count = self.sampling.steps - first
        offset = stream(self.context.seed, "step", self.batches, update) % count
        return first + (micro.index + offset) % count

    def weighted(self, losses: Pair) -> Tensor:
        """Sum over modalities, mean over samples."""
        return sum(self.modality_weights[name] * loss.mean() for name, loss in zip(MODALITIES, losses, strict=True))  # type: ignore[return-value]

    def velocity(self, role: str, text: list[Tensor], x: Pair, sigma: Pair) -> Pair:
        """v of student, average, fake score or teacher without guidance; [B,...] like x.

        Args:
            sigma: noise levels [B], for networks with timestep conditioning; unused by this one.
        """
        assert self.networks is not None
        return Pair(*self.networks.role(role)(x.video, x.audio, text))

    @torch.no_grad()
    def teacher_velocity(
        self, x: Pair, text: list[Tensor], sigma: Pair, guidance: Guidance | None = None
    ) -> tuple[Pair, Pair]:
        """v_T at noise levels [B] with guidance (default: of the objective), and without."""
        guidance = guidance or self.guidance
        unguided = self.velocity("teacher", text, x, sigma)
        if not guidance.needed:
            return unguided, unguided
        negative = [self.negative.to(x.video.device)] * len(text)
        unconditional = self.velocity("teacher", negative, x, sigma)
        scales = (guidance.at(name, levels, x.video) for name, levels in zip(MODALITIES, sigma, strict=True))
        return Pair(*map(combine, unguided, unconditional, scales)), unguided

    @property
    def gan_active(self) -> bool:
        """Whether this iteration has a GAN loss."""
        return self.discriminator is not None and self.step >= self.gan.start

    def trains_heads(self, update: int) -> bool:
        """Whether the discriminator is trained with the fake score's update number `update` of this iteration."""
        return self.gan_active and (self.gan.updates is None or update < self.gan.updates)

    def features(self, text: list[Tensor], x: Pair) -> list[tuple[Tensor, Tensor]]:
        """Inputs of the discriminator heads."""
        assert self.networks is not None
        return self.networks.role(self.gan.network).features(x.video, x.audio, text, self.taps)

    def check_collapse(self, batch: dict[str, Any]) -> None:
        """Compare samples of student and teacher; see `magihuman.distill.collapse_monitor`."""
        make_sampler = partial(sampler, device=self.device, size=self.micro_batch)

        def guided(text: list[Tensor], x: Pair, sigma: Pair) -> Pair:
            return self.teacher_velocity(x, text, sigma, self.teacher_sampling.guidance)[0]

        latents = Pair(batch["video"], batch["audio"])
        together = self.context.strategy.context_parallel
        self.monitor.sample_teacher(batch["text"], latents, make_sampler(self.teacher_sampling, guided), together)
        with evaluating(self.network):
            student = make_sampler(self.sampling, partial(self.velocity, "average"))
            statistics = self.monitor.measure(student) | self.monitor.ratios()
        for name, value in statistics.items():
            self.meter.add(name, value)
        # Before its first update the student is the teacher in few steps, which no setting can improve.
        if self.student_updates:
            self.monitor.check(statistics, self.step)

    def after_step(self) -> None:
        """Count an iteration; the average is updated with the student only."""
        self.step += 1
        self.stepped = True
        if self.networks is None or not self.student_updates:
            return
        if self.ema is not None:
            self.ema.update(self.trained)
        elif self.sharing == "lora":
            average, student = (self.networks.weights(role).values() for role in ("average", "student"))
            ema_update(average, student, decay_at(self.student_updates - 1, self.context.optim.ema_decay))

    def batch_flops(self, batch: dict[str, Any]) -> float:
        """Of the latest iteration, which `step` already includes; samples of the collapse monitor do not count."""
        settings, step = self.fake_score_settings, self.step - 1
        with_gan = self.discriminator is not None and step >= self.gan.start
        count = partial(
            distillation_flops, self.context.transformer[0], loras=LORAS[self.sharing], lora=self.lora,
            steps=self.sampling.steps, updates=settings.updates,
            samples_per_rollout=settings.samples_per_rollout, student_updated=step >= settings.warmup,
            discriminator=self.gan.network if with_gan else None,
            null_text=len(self.negative) if self.guidance.needed else None,
            discriminator_layers=self.taps[-1] + 1, discriminator_updates=self.gan.updates,
        )  # fmt: skip
        return float(sum(count(sample) for sample in self.samples(batch)))

    # The networks

    def configure_model(self) -> None:
        if self.networks is not None:
            return
        student = None
        if self.sharing != "lora":
            super().configure_model()
            assert self.denoiser is not None
            assert isinstance(self.network, Denoiser)
            student = self.denoiser, self.network
        seed = stream(self.context.seed, "lora")
        networks = build_networks(self.sharing, self.copy_teacher, student, self.lora, seed)
        if networks.shared is None:
            self.fake_score = networks.fake_score
        else:
            self.shared = networks.shared
        if self.gan.weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(stream(self.context.seed, "adversary"))
                width = self.context.transformer[0].hidden_size
                self.discriminator = Discriminator(width, len(self.taps), self.gan)
        # Not a submodule, so that Lightning does not save the teacher, which `init` names.
        self.networks = networks

    def copy_teacher(self, frozen: bool, prepare: Callable[[Denoiser], None]) -> Denoiser:
        """A network with the teacher's weights, sharded like the student; `prepare` is applied before sharding."""
        assert self.context.init is not None
        compute = torch.bfloat16 if self.context.trainer.precision == "bf16" else torch.float32
        shape, pack = self.context.transformer
        # Frozen matrices are stored in the compute dtype.
        stored = compute if frozen else torch.float32
        network = zoo.build(shape, pack, compute_dtype=compute, linear_dtype=stored, device="meta")
        sharded = self.context.strategy.name == "fsdp2"
        if not sharded or self.global_rank == 0:
            weights = zoo.load(self.context.init, compute_dtype=stored).denoiser.state_dict()
            network.to_empty(device="cpu").load_state_dict(weights)
        network.requires_grad_(not frozen)
        prepare(network)
        if sharded:
            whole = network.state_dict() if self.global_rank == 0 else None
            self.shard(network.to("meta"), whole)
        network.model.gradient_checkpointing = self.context.trainer.activation_checkpointing
        if self.context.trainer.compile:
            parallel.compile_blocks(network)
        self.split_tokens(network)
        return network

    @property
    def network(self) -> nn.Module:
        if self.sharing == "lora":
            assert self.networks is not None
            return self.networks.average
        return super().network

    def on_fit_start(self) -> None:
        assert self.networks is not None
        self.networks.teacher.to(self.device)

    def configure_optimizers(self) -> Any:
        assert self.networks is not None
        optim, settings = self.context.optim, self.fake_score_settings
        shape, _ = self.context.transformer
        fake_score_optim = replace(optim, lr=settings.lr, schedule="constant", warmup=1)
        student = build_optimizer(self.networks.weights("student"), shape, optim)
        fake_score = build_optimizer(self.networks.weights("fake_score"), shape, fake_score_optim)
        if self.discriminator is not None:
            fake_score.add_param_group({"params": list(self.discriminator.parameters()), "lr": self.gan.lr})
        # A sharded checkpoint may be saved before the first update of student and discriminator.
        if self.context.strategy.name == "fsdp2":
            fill_state(student)
            fill_state(fake_score)
        schedule = build_schedule(student, optim, max(1, self.max_steps - settings.warmup))
        return [student, fake_score], [{"scheduler": schedule, "interval": "step"}]

    # Saving

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """State without the frozen base, which `init` names."""
        return without_base(super().state_dict(*args, **kwargs), "shared.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["recipe"] |= {
            "init": self.context.init,
            "student_updates": self.student_updates,
            "fake_score_updates": self.fake_score_updates,
            # Every process looks at prompts of its own.
            "monitor": parallel.gathered(self.monitor.state_dict()),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        rename_old_names(checkpoint)
        check_resume(checkpoint, self.context.init, self.state_dict())
        state = checkpoint["recipe"]
        self.student_updates = state["student_updates"]
        self.fake_score_updates = state["fake_score_updates"]
        monitors = state["monitor"] if isinstance(state["monitor"], list) else [state["monitor"]]  # one until 0.2.0
        self.monitor.load_state_dict(monitors[self.global_rank % len(monitors)])

    def exported_weights(self) -> dict[str, Tensor]:
        if self.sharing != "lora":
            return super().exported_weights()
        assert self.networks is not None
        state = parallel.whole_state_dict(self.networks.teacher.model)
        return dict(merge(base_state(state), lora_state(state, "average"), self.lora))

    def export(self, folder: Path) -> None:
        """Write the student; in addition its LoRA, where it is one.

        Raises:
            UserError: it was never trained.
        """
        if not self.student_updates:
            raise UserError(
                f"the training ended at step {self.step}, within the warm-up of the fake score "
                f"(recipe.fake_score.warmup={self.fake_score_settings.warmup}): the student is still the teacher and is not "
                "exported; the same command continues"
            )
        super().export(folder)
        if self.sharing == "lora":  # in addition to the merged weights, whose bf16 rounds small updates away
            assert self.networks is not None
            state = parallel.whole_state_dict(self.networks.teacher.model)
            if self.global_rank == 0:
                average, target = lora_state(state, "average"), folder.parent / "adapter"
                save_lora(target, average, self.lora, self.export_config(), str(self.context.init))
