"""DMD-2: a few-step student without guidance, for joint audio and video and without timestep input.

Improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867) of a flow-matching teacher.
Three networks of one shape, all started from the teacher:

    student  v_G   samples in K steps with the released re-noising solver; what is exported
    teacher  v_T   frozen, with its own guidance s_m(sigma) for each modality m
    critic   v_C   learns, by flow matching, what the student's samples look like: the "fake score"

One cycle, all of it on the student's current samples:
  1. simulate: K steps of the student from noise, without gradients; all states x_k and estimates x0_k are kept.
  2. critic, R times: noise the x0_k of a random k to a level of the teacher's prior, fit v_C to eps - x0_k.
  3. student, once: repeat the call at one x_k with gradients, noise its estimate x0 to y at a level s, and move
     x0 along   g_m = s (v_T - v_C)_m / mean |x0 - (y - s v_T)|_m,   v_T guided.
The critic is two time scales ahead (R updates per cycle, and a warm-up before the student's first): with
critic = teacher the first gradient would be a pure push of the guidance.

What is peculiar here:
  - The networks are not told the noise level, so v_C equals v_T at p_student = p_data only when both were
    trained under the same prior of levels. The critic's prior is the teacher's, by assertion. The level of
    step 3 may be drawn at will: it weighs the integral, nothing else.
  - Audio has a hundredth of the video's entries. Every mean and every normaliser is of one modality.
  - Given first frames and given sounds stay clean in the inputs of all three networks, and count nowhere.
  - The critic cannot know which step made an estimate. Trained on all of them it learns a mixture, and final samples
    overshoot to make up for early estimates, which are blurred: `critic.first_step` leaves those out.
  - How often samples show what the prompt leaves open is read at high levels alone and drifts. An adversary on real
    latents (`magihuman.distill.discriminator`) holds it, `magihuman.distill.collapse_monitor` watches it: the student's samples
    against the teacher's at fixed prompts and noise. A run that collapses ends with advice.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from magihuman import zoo
from magihuman.distill.collapse_monitor import Health, HealthLimits, turn_signals
from magihuman.distill.discriminator import Adversary, AdversarySettings
from magihuman.distill.networks import ADAPTERS, Networks, follow, hold, resting, without_base
from magihuman.distill.objective import critic_loss, matching_gradient, surrogate_loss
from magihuman.distill.rollout import Part, Rollout, parts, roll_out, sampler
from magihuman.distill.settings import CriticSettings, require_possible, require_same_parts
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance, combine
from magihuman.flow.path import add_noise, x0_from_velocity
from magihuman.flow.sampling import MODALITIES, Pair, each
from magihuman.flow.sigmas import ScoreLevels, SigmaPrior
from magihuman.io.export import Sampling
from magihuman.models.config import LoraConfig
from magihuman.models.denoiser import Denoiser
from magihuman.models.lora import base_state, lora_state, merge
from magihuman.models.training_flops import dmd2_flops
from magihuman.training import parallel
from magihuman.training.callbacks import evaluating
from magihuman.training.context import TrainingContext
from magihuman.training.ema import decay_at
from magihuman.training.optim import build_optimizer, build_schedule, clip_gradients, fill_state
from magihuman.training.rng import BatchRng, stream
from magihuman.zoo.lora_files import save_lora
from recipes.base import Recipe

SCORE, CRITIC, LORA = ScoreLevels(), CriticSettings(), LoraConfig(64)
HEALTH, GAN = HealthLimits(), AdversarySettings()


class DMD2(Recipe):
    """Distribution matching distillation.

    Args:
        sampling: of the student: solver, steps K, shift; guidance is off.
        sigma: the critic's prior of noise levels; None takes the teacher's, and another one is refused, unless the
            teacher's is not known: published weights say none, and count as uniform.
        score: noise levels of the student's objective.
        guidance: of the teacher in the objective; None takes what its checkpoint is sampled with.
        critic: how it keeps up.
        networks: full, lora_critic or lora, see `magihuman.distill.networks`; lora: size of adapters.
        health: what a run has to hold, and how often that is looked at.
        gan: the adversary, see `magihuman.distill.discriminator`; without weight there is none.
        video_weight, audio_weight: of the modalities, in both objectives.
        first_frame, given_audio: probabilities of conditions, taken from the batch's latents.
        first_step: the student learns this step and later ones.
        micro_batch: samples that go through the networks together; None for the whole batch.

    Raises:
        UserError: settings that cannot be distilled with.
    """

    optimizers_needed = 2

    def __init__(
        self,
        context: TrainingContext,
        *,
        sampling: Sampling,
        sigma: SigmaPrior | None = None,
        score: ScoreLevels = SCORE,
        guidance: Guidance | None = None,
        critic: CriticSettings = CRITIC,
        networks: str = "full",
        lora: LoraConfig = LORA,
        health: HealthLimits = HEALTH,
        gan: AdversarySettings = GAN,
        video_weight: float = 1.0,
        audio_weight: float = 1.0,
        first_frame: float = 0.1,
        given_audio: float = 0.1,
        first_step: int = 0,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(context)
        self.automatic_optimization = False
        if context.init is None:
            raise UserError(
                "dmd2 distils a trained checkpoint; give init=NAME_OR_FOLDER, for example init=tiny/base"
            )
        teacher = zoo.config_of(context.init)
        first = {"recipe.first_step": first_step, "recipe.critic.first_step": critic.first_step}
        require_possible(context, teacher, sigma, networks, first, sampling.steps, micro_batch)
        self.sigma = sigma or teacher.sigma_prior
        self.teacher_sampling = teacher.sampling
        self.guidance = guidance or teacher.sampling.guidance
        self.sampling = replace(sampling, guidance=Guidance(1, 1, 0, 1))
        self.score, self.critic_settings = score, critic
        self.holding, self.lora = networks, lora
        self.modality_weights = {"video": video_weight, "audio": audio_weight}
        self.first_frame, self.given_audio = first_frame, given_audio
        self.first_step, self.micro_batch = first_step, micro_batch
        self.health = Health(health, stream(context.seed, "health") % 2**40)
        self.gan, self.taps = gan, gan.layers(context.transformer[0].num_layers)
        self.adversary: Adversary | None = None
        self.student_updates = self.critic_updates = 0
        self.networks: Networks | None = None
        self.strict_loading = networks == "full"  # else the frozen base is not in the checkpoint

    # One cycle

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:  # type: ignore[override]
        assert self.networks is not None
        self.stepped = False
        torch.manual_seed(stream(self.context.seed, "torch", self.batches, self.global_rank))
        rng = BatchRng(self.context.seed, self.batches, batch["index"])
        student, critic = self.optimizers()  # type: ignore[attr-defined]
        first, sound = self.first_frame, self.given_audio
        judged, size = self.adversary is not None, self.micro_batch
        some = list(parts(batch, rng, first_frame=first, given_audio=sound, judged=judged, size=size))
        if self.health.due(self.step):
            self.look(batch)
        for turn in range(self.critic_settings.updates):
            for part in some:
                self.manual_backward(self.critic_turn(part, turn) * (len(part.text) / len(rng)))
            self.update("critic", critic)
            self.critic_updates += 1
        if self.step >= self.critic_settings.warmup:
            adversary = [] if self.adversary is None else list(self.adversary.parameters())
            with resting([*self.networks.weights("critic").values(), *adversary]):
                for part in some:
                    self.manual_backward(self.student_turn(part) * (len(part.text) / len(rng)))
            self.update("student", student)
            self.lr_schedulers().step()  # type: ignore[union-attr]
            self.student_updates += 1
        self.batches += 1
        self.after_step()

    def update(self, role: str, optimizer: Any) -> None:
        """Clip, step, and free the gradients: those of two networks never lie in memory together."""
        assert self.networks is not None
        norm = clip_gradients(list(self.networks.weights(role).values()), self.context.optim.clip_norm)
        self.count_norm("grad_norm" if role == "student" else "grad_norm/critic", norm)
        if role == "critic" and self.adversary is not None and self.judged:  # its heads learn with the critic
            heads = list(self.adversary.parameters())
            if self.context.strategy.name == "fsdp2":
                parallel.average_gradients(heads)
            self.count_norm("grad_norm/gan", clip_gradients(heads, None))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def simulated(self, part: Part) -> Rollout:
        """The part's rollout; a fresh one when it was drawn from often enough."""
        if part.rollout is None or part.uses >= self.critic_settings.samples_per_rollout:
            part.rollout, part.uses = self.rollout(part), 0
        part.uses += 1
        return part.rollout

    def rollout(self, part: Part) -> Rollout:
        """Sample with the student as inference does."""
        velocity = partial(self.velocity, "student", part.text)
        return roll_out(self.sampling, velocity, part.generators, part.given)

    def step_of(self, part: Part, turn: int, first: int) -> Tensor:
        """[B] on the CPU: the step k >= first of every sample, uniform, and stratified over the whole batch."""
        count = self.sampling.steps - first
        offset = stream(self.context.seed, "step", self.batches, turn) % count
        return first + (part.position + offset) % count

    def critic_turn(self, part: Part, turn: int) -> Tensor:
        """The critic's loss on student samples."""
        rollout, given = self.simulated(part), part.given
        x0 = rollout.estimate(self.step_of(part, turn, self.critic_settings.first_step))
        levels = [self.sigma.sample(1, g) for g in part.generators]
        sigma = Pair(*(torch.cat([level[m] for level in levels]).to(x0.video.device) for m in (0, 1)))
        noise = part.normal()
        noisy = given.insert(each(add_noise, x0, noise, sigma))
        velocity = self.velocity("critic", part.text, noisy, sigma)
        losses = each(critic_loss, velocity, x0, noise, given.mask)
        for name, values, mask in zip(MODALITIES, losses, given.mask, strict=True):
            self.meter.add(f"critic/{name}", values, mask.flatten(1).amax(1))
        loss = self.weighted(losses)
        if self.judged:
            assert self.adversary is not None
            level = self.score.at(part.uniform()).to(x0.video.device)
            judgement = self.adversary.loss(partial(self.features, part.text), x0, noise, level, given)
            self.meter.add("gan/heads", judgement)
            loss = loss + judgement
        return loss

    def student_turn(self, part: Part) -> Tensor:
        """The student's loss; its gradient is the distribution matching gradient."""
        rollout, given, text = self.simulated(part), part.given, part.text
        k = self.step_of(part, self.critic_settings.updates, self.first_step)
        x, level = rollout.state(k), rollout.sigma(k)
        velocity = self.velocity("student", text, x, Pair(level, level))
        x0 = given.insert(each(lambda a, b: x0_from_velocity(a, b, level), x, velocity))

        sigma = self.score.at(part.uniform()).to(level.device)
        noise = part.normal()
        noisy = given.insert(each(lambda a, b: add_noise(a, b, sigma), x0, noise))
        with torch.no_grad():
            both = Pair(sigma, sigma)
            real, plain = self.teacher_velocity(noisy, text, both)
            fake = self.velocity("critic", text, noisy, both)
            found = [
                matching_gradient(x0[m], noisy[m], real[m], fake[m], sigma, given.mask[m]) for m in (0, 1)
            ]
        gradient = Pair(found[0][0], found[1][0])
        figures = turn_signals(x0, noise, gradient, plain, fake, given.mask)
        self.health.remember(figures)
        for name, (values, weights) in figures.items():
            self.meter.add(name, values, weights)
        self.meter.add("loss", figures["dm/video"][0], figures["dm/video"][1])
        self.meter.add("dm_not_finite", torch.stack([1 - f[1].float() for f in found]).amax(0))
        loss = self.weighted(each(surrogate_loss, x0, gradient, given.mask))
        if self.judged:
            assert self.adversary is not None
            against = self.adversary.student_loss(partial(self.features, text), noisy, sigma)
            self.meter.add("gan/student", against)
            loss = loss + self.gan.weight * against
        return loss

    def weighted(self, losses: Pair) -> Tensor:
        """Sum over modalities, mean over samples."""
        return sum(
            self.modality_weights[name] * loss.mean() for name, loss in zip(MODALITIES, losses, strict=True)
        )  # type: ignore[return-value]

    def velocity(self, role: str, text: list[Tensor], x: Pair, sigma: Pair) -> Pair:
        """v of the student, its average, the critic or the teacher without guidance; [B,...] like x.

        Args:
            sigma: noise levels [B], for networks that are told them; these are not.
        """
        assert self.networks is not None
        return Pair(*self.networks.role(role)(x.video, x.audio, text))

    @property
    def judged(self) -> bool:
        """Whether the adversary takes part in this cycle."""
        return self.adversary is not None and self.step >= self.gan.start

    def features(self, text: list[Tensor], x: Pair) -> list[tuple[Tensor, Tensor]]:
        """What the adversary's heads look at."""
        assert self.networks is not None
        return self.networks.role(self.gan.network).features(x.video, x.audio, text, self.taps)

    @torch.no_grad()
    def teacher_velocity(
        self, x: Pair, text: list[Tensor], sigma: Pair, guidance: Guidance | None = None
    ) -> tuple[Pair, Pair]:
        """v_T at noise levels [B]: with guidance (of the objective, or another), and without."""
        guidance = guidance or self.guidance
        plain = self.velocity("teacher", text, x, sigma)
        if not guidance.needed:
            return plain, plain
        null = [self.context.null_text.to(x.video.device)] * len(text)
        other = self.velocity("teacher", null, x, sigma)
        scales = (guidance.at(name, levels, x.video) for name, levels in zip(MODALITIES, sigma, strict=True))
        return Pair(*map(combine, plain, other, scales)), plain

    def look(self, batch: dict[str, Any]) -> None:
        """Compare the student's samples with the teacher's; see `magihuman.distill.collapse_monitor`."""
        sampled = partial(sampler, device=self.device, size=self.micro_batch)

        def guided(text: list[Tensor], x: Pair, sigma: Pair) -> Pair:
            return self.teacher_velocity(x, text, sigma, self.teacher_sampling.guidance)[0]

        latents = Pair(batch["video"], batch["audio"])
        self.health.refer(batch["text"], latents, sampled(self.teacher_sampling, guided))
        with evaluating(self.network):
            student = sampled(self.sampling, partial(self.velocity, "average"))
            signals = self.health.look(student, self.device) | self.health.ratios(self.device)
        for name, value in signals.items():
            self.meter.add(name, value)
        # Before its first update it is the teacher in few steps: nothing that a setting could have spoilt.
        if self.student_updates:
            self.health.judge(signals, self.step)

    def after_step(self) -> None:
        """Count a cycle; the average follows the student's updates only."""
        self.step += 1
        self.stepped = True
        if self.networks is None or not self.student_updates:
            return
        if self.ema is not None:
            self.ema.update(self.trained)
        elif self.holding == "lora":
            average, student = (self.networks.weights(role).values() for role in ("average", "student"))
            follow(average, student, decay_at(self.student_updates - 1, self.context.optim.ema_decay))

    def batch_flops(self, batch: dict[str, Any]) -> float:
        """Of the latest iteration, which `step` already includes; samples of the health monitor do not count."""
        critic, step = self.critic_settings, self.step - 1
        with_gan = self.adversary is not None and step >= self.gan.start
        count = partial(
            dmd2_flops, self.context.transformer[0], adapters=ADAPTERS[self.holding], lora=self.lora,
            steps=self.sampling.steps, updates=critic.updates, samples_per_rollout=critic.samples_per_rollout,
            student_updated=step >= critic.warmup, discriminator=self.gan.network if with_gan else None,
            null_text=len(self.context.null_text) if self.guidance.needed else None,
            discriminator_layers=self.taps[-1] + 1,
        )  # fmt: skip
        return float(sum(count(sample) for sample in self.samples(batch)))

    # The networks

    def configure_model(self) -> None:
        if self.networks is not None:
            return
        student = None
        if self.holding != "lora":
            super().configure_model()
            assert self.denoiser is not None
            assert isinstance(self.network, Denoiser)
            student = self.denoiser, self.network
        networks = hold(self.holding, self.another, student, self.lora, stream(self.context.seed, "lora"))
        if networks.shared is None:
            self.critic = networks.critic
        else:
            self.shared = networks.shared
        if self.gan.weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(stream(self.context.seed, "adversary"))
                width = self.context.transformer[0].hidden_size
                self.adversary = Adversary(width, len(self.taps), self.gan)
        # The teacher is no part of what is saved, since `init` names it: a frozen dataclass keeps it from Lightning.
        self.networks = networks

    def another(self, frozen: bool, prepare: Callable[[Denoiser], None]) -> Denoiser:
        """One more network with the teacher's weights, spread like the student."""
        assert self.context.init is not None
        compute = torch.bfloat16 if self.context.trainer.precision == "bf16" else torch.float32
        shape, pack = self.context.transformer
        # Frozen matrices are kept as the network computes with them.
        kept = compute if frozen else torch.float32
        network = zoo.build(shape, pack, compute_dtype=compute, linear_dtype=kept, device="meta")
        sharded = self.context.strategy.name == "fsdp2"
        if not sharded or self.global_rank == 0:
            weights = zoo.load(self.context.init, compute_dtype=kept).denoiser.state_dict()
            network.to_empty(device="cpu").load_state_dict(weights)
        network.requires_grad_(not frozen)
        prepare(network)
        if sharded:
            whole = network.state_dict() if self.global_rank == 0 else None
            self.shard(network.to("meta"), whole)
        network.model.gradient_checkpointing = self.context.trainer.activation_checkpointing
        if self.context.trainer.compile:
            parallel.compile_blocks(network)
        return network

    @property
    def network(self) -> nn.Module:
        if self.holding == "lora":
            assert self.networks is not None
            return self.networks.average
        return super().network

    def on_fit_start(self) -> None:
        assert self.networks is not None
        self.networks.teacher.to(self.device)

    def configure_optimizers(self) -> Any:
        assert self.networks is not None
        given, settings = self.context, self.critic_settings
        shape, _ = given.transformer
        critic_optim = replace(given.optim, lr=settings.lr, schedule="constant", warmup=1)
        student = build_optimizer(self.networks.weights("student"), shape, given.optim)
        critic = build_optimizer(self.networks.weights("critic"), shape, critic_optim)
        if self.adversary is not None:
            critic.add_param_group({"params": list(self.adversary.parameters()), "lr": self.gan.lr})
        # The student and the adversary may start after the first checkpoint.
        if given.strategy.name == "fsdp2":
            fill_state(student)
            fill_state(critic)
        schedule = build_schedule(student, given.optim, max(1, self.max_steps - settings.warmup))
        return [student, critic], [{"scheduler": schedule, "interval": "step"}]

    # Saving

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Everything but the frozen base, which `init` names."""
        return without_base(super().state_dict(*args, **kwargs), "shared.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["recipe"] |= {
            "init": self.context.init,
            "student_updates": self.student_updates,
            "critic_updates": self.critic_updates,
            "health": self.health.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        require_same_parts(checkpoint, self.context.init, self.state_dict())
        state = checkpoint["recipe"]
        self.student_updates, self.critic_updates = state["student_updates"], state["critic_updates"]
        self.health.load_state_dict(state["health"])

    def exported_weights(self) -> dict[str, Tensor]:
        if self.holding != "lora":
            return super().exported_weights()
        assert self.networks is not None
        state = parallel.whole_state_dict(self.networks.teacher.model)
        return dict(merge(base_state(state), lora_state(state, "average"), self.lora))

    def export(self, folder: Path) -> None:
        super().export(folder)
        if self.holding == "lora":  # beside the merged weights, whose bf16 rounds small changes away
            assert self.networks is not None
            state = parallel.whole_state_dict(self.networks.teacher.model)
            if self.global_rank == 0:
                adapter = lora_state(state, "average")
                save_lora(
                    folder.parent / "adapter",
                    adapter,
                    self.lora,
                    self.export_config(),
                    str(self.context.init),
                )

    def export_settings(self) -> dict[str, Any]:
        return {"sigma_prior": self.sigma, "sampling": self.sampling}
