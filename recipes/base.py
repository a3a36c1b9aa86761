"""Base class of the recipes: makes, averages and exports the network, counts steps; no algorithm."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from magihuman import zoo
from magihuman.context_parallel import context_group, parallelise, require_same
from magihuman.errors import UserError
from magihuman.flow.sigmas import SigmaPrior
from magihuman.io.export import ExportConfig, Sampling, released_dtypes, save_export
from magihuman.models.denoiser import Denoiser
from magihuman.models.dit import SingleStreamDiT
from magihuman.models.flops import SampleTokens, passes, samples
from magihuman.training import parallel
from magihuman.training.callbacks import Meter
from magihuman.training.context import TrainingContext
from magihuman.training.optim import EMA, build_optimizer, build_schedule, clip_gradients
from magihuman.training.rng import BatchRng, stream

NOT_FINITE_LIMIT = 20
"""Steps in a row without a finite gradient after which a training stops."""


def require_finite_weights(weights: Mapping[str, Tensor]) -> None:
    """Raises UserError, naming the first weight that is not finite."""
    wrong = next((name for name, weight in weights.items() if not weight.isfinite().all()), None)
    if wrong is not None:
        raise UserError(
            f"the trained weights are not finite ({wrong}) and are not exported; start again under another name= with a "
            "lower learning rate, or continue from an earlier checkpoint with resume="
        )


class Recipe(L.LightningModule):
    """A Lightning module that trains one network. A recipe implements `loss`, with all random numbers from `rng`.

        class Mine(Recipe):
            sigma, sampling = SigmaPrior("uniform"), Sampling("unipc", 32)
            def loss(self, batch, rng): ...

    Args:
        context: network, latents and engine settings.

    Attributes:
        sigma: prior of the noise levels; sampling: settings of inference. A recipe sets both; exports store them.
        parent: config of the checkpoint `init` that the transformer starts from, or None.
        denoiser: the trained network (made in `configure_model`, so that sharded strategies can shard it).
        ema: average of its weights, or None.
        step: optimiser steps so far; batches: batches of this process so far. Both are kept over a resume.
        stepped: whether the latest batch completed a step; only then callbacks log, save and stop.
        meter: averages for the next log line; spent: seconds of callbacks since the last one, by
            what they did.
        optimizers_needed: number of optimisers of the recipe; more than one excludes DeepSpeed.
        may_differ_from_init: settings of the model in which it may differ from the checkpoint `init`.
        fixed_on_resume: names of the recipe's settings that a resumed training must not change (`gan.taps` for a setting
            inside another).
        renamed_values: old -> new names of values of these settings, for runs of earlier versions.
        needs_clips: whether the recipe trains on clips in any case; then data=prompts, prompts alone, is refused.
        strategies: names of the strategies that the recipe supports.
        watched: names of the losses that end the training when they diverge (`magihuman.training.callbacks.Divergence`).
        shown: names of the metrics in the lines of progress.
        learning_rates: settings to lower if the training diverges, in words.
    """

    sigma: SigmaPrior
    sampling: Sampling
    optimizers_needed = 1
    needs_clips = True
    may_differ_from_init: tuple[str, ...] = ()
    fixed_on_resume: tuple[str, ...] = ()
    renamed_values: ClassVar[Mapping[str, str]] = {}
    strategies: tuple[str, ...] = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
    watched: tuple[str, ...] = ("loss",)
    shown: tuple[str, ...] = ("loss", "loss/video", "loss/audio", "val/sync_gap")
    learning_rates = "optim.lr"

    def __init__(self, context: TrainingContext) -> None:
        super().__init__()
        self.context = context
        self.max_steps = context.trainer.max_steps
        self.denoiser: Denoiser | None = None
        self.ema: EMA | None = None
        self.step = 0
        self.batches = 0
        self.stepped = False
        self.meter = Meter(self.watched)
        self.spent: dict[str, float] = {}
        self._not_finite: dict[str, int] = {}
        self.parent = None if context.init is None or context.model is None else zoo.config_of(context.init)
        self._context_group: Any = None

    # What a recipe implements

    def loss(self, batch: dict[str, Any], rng: BatchRng) -> Tensor:
        """The objective of one batch, a scalar; also adds the values to log to the meter."""
        raise NotImplementedError

    def validation_metrics(self, network: Any, batch: dict[str, Any], rng: BatchRng) -> dict[str, float]:
        """Metrics of `network` on a batch that is never trained on, by name (`val/...`)."""
        return {}

    def notes(self) -> list[str]:
        """What is odd about the settings although it can be trained; printed before the training."""
        found, warmup, trainer = [], self.context.optim.warmup, self.context.trainer
        if warmup > self.max_steps:
            found.append(
                f"optim.warmup={warmup} is longer than trainer.max_steps={self.max_steps}: the learning rate does not reach "
                "optim.lr"
            )
        together = self.context.strategy.context_parallel
        if trainer.nodes > 1 and trainer.devices % together:
            found.append(
                f"strategy.context_parallel={together} does not divide trainer.devices={trainer.devices}: tokens and heads are "
                "exchanged between nodes in every layer, which is slow"
            )
        if self.parent is not None and self.parent.sigma_prior is None:
            found.append(
                f"the noise levels that init={self.context.init} was trained with are unknown; this training uses recipe.sigma="
                f"{self.sigma.to_dict()}"
            )
        return found

    def batch_flops(self, batch: dict[str, Any]) -> float:
        """Model FLOPs (`magihuman.models.flops`) of the latest step, on this batch; here one forward and one
        backward pass of a network whose weights are all trained."""
        model, _ = self.context.transformer
        return float(sum(passes(model, sample).update for sample in self.samples(batch)))

    def samples(self, batch: dict[str, Any]) -> list[SampleTokens]:
        """Token counts of a batch; a dropped text counts with its own length."""
        lengths = [len(text) for text in batch["text"]]
        return samples(self.context.transformer[1], batch["video"].shape, batch["audio"].shape[1], lengths)

    # The network

    def setup(self, stage: str) -> None:
        # Made here, the network has its weights when DeepSpeed shards it; made in configure_model, DeepSpeed would
        # shard the tensors before their initialisation.
        if self.context.strategy.name.startswith("zero"):
            self.configure_model()

    def configure_model(self) -> None:
        """Make the network with its initial weights and its average, and shard both if the strategy does."""
        if self.denoiser is not None:
            return
        if self.context.strategy.name == "fsdp2":
            self._make_sharded()
        else:
            self.denoiser = self.make_network()
            if self.context.optim.ema_decay > 0:
                self.ema = EMA(self.denoiser, self.context.optim.ema_decay)
        assert self.denoiser is not None
        if self.context.strategy.name == "zero3":
            parallel.zero3_units(self.denoiser)
        self.denoiser.model.gradient_checkpointing = self.context.trainer.activation_checkpointing
        if self.context.trainer.compile:
            parallel.compile_blocks(self.denoiser)
        self.split_tokens(self.denoiser)
        if self.ema is not None:
            assert isinstance(self.ema.module, Denoiser)
            self.split_tokens(self.ema.module)

    def split_tokens(self, network: Denoiser) -> None:
        """Compute a network together with the other processes of a context group, where strategy.context_parallel asks
        for it; every process calls it for the same networks in the same order."""
        together = self.context.strategy.context_parallel
        if together == 1:
            return
        if self._context_group is None:
            self._context_group = context_group(together)
        parallelise(network.model, self._context_group)

    @property
    def data_rank(self) -> int:
        """Number of this process among those with other samples; the processes of a context group have the same."""
        return self.global_rank // self.context.strategy.context_parallel

    def _shell(self) -> Denoiser:
        dtype = torch.bfloat16 if self.context.trainer.precision == "bf16" else torch.float32
        shape, pack = self.context.transformer
        return Denoiser(SingleStreamDiT(shape, compute_dtype=dtype, linear_dtype=torch.float32), pack)

    def make_network(self) -> Denoiser:
        """The network with its initial weights: those of `init`, or random ones from the seed."""
        denoiser = self._shell()
        if self.context.init is None:
            denoiser.model.init_weights(seed=stream(self.context.seed, "weights"))
        else:
            loaded = zoo.load(self.context.init, compute_dtype=torch.float32)
            denoiser.model.load_state_dict(loaded.denoiser.model.state_dict())
        return denoiser

    def _make_sharded(self) -> None:
        weights = self.make_network().state_dict() if self.global_rank == 0 else None
        with torch.device("meta"):
            self.denoiser = self._shell()
            if self.context.optim.ema_decay > 0:
                self.ema = EMA(self.denoiser, self.context.optim.ema_decay)
        self.shard(self.denoiser, weights)
        if self.ema is not None:
            assert isinstance(self.ema.module, Denoiser)
            self.shard(self.ema.module, weights)

    def shard(self, network: Denoiser, weights: Mapping[str, Tensor] | None) -> None:
        """Shard a network that was made on the meta device over the processes (FSDP2).

        Args:
            weights: the whole state dict on rank 0; None elsewhere.
        """
        assert self.device_mesh is not None
        mesh, strategy = self.device_mesh, self.context.strategy
        parallel.shard(
            network, mesh, gather=strategy.gather,
            reshard_after_forward=strategy.reshard_after_forward, offload=strategy.offload,
        )  # fmt: skip
        device = torch.device("cpu") if strategy.offload else self.trainer.strategy.root_device
        parallel.fill(network, weights, device)

    def frozen_checkpoint(self, name: str) -> Denoiser:
        """A checkpoint next to the trained network, without gradients of its weights; sharded and split like that one.

        Every process calls it at the same place. The matrices are stored in the dtype of the products.
        """
        dtype = torch.bfloat16 if self.context.trainer.precision == "bf16" else torch.float32
        if self.context.strategy.name != "fsdp2":
            network = zoo.load(name, compute_dtype=dtype).denoiser.requires_grad_(False)
        else:
            config = zoo.config_of(name)
            network = zoo.build(config.model, config.pack, compute_dtype=dtype, linear_dtype=dtype, device="meta")
            network.requires_grad_(False)
            whole = zoo.load(name, compute_dtype=dtype).denoiser.state_dict() if self.global_rank == 0 else None
            self.shard(network, whole)
        self.split_tokens(network)
        return network

    @property
    def trained(self) -> nn.Module:
        """The network that is optimised and averaged; a recipe may override it."""
        assert self.denoiser is not None
        return self.denoiser

    @property
    def network(self) -> nn.Module:
        """The network that is sampled from, evaluated and exported: the average, or without one the trained network."""
        return self.ema.module if self.ema is not None else self.trained

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        return min(1.0, self.step / self.max_steps)

    # One step

    def begin_batch(self, batch: dict[str, Any]) -> BatchRng:
        """The random numbers of a batch; also seeds torch's own generators (for token routing) from the same key.

        Raises:
            UserError: processes that share tokens have read different samples.
        """
        self.stepped = False
        if self._context_group is not None:
            digest = stream("samples", *batch["index"].tolist(), *batch.get("key", ()))
            require_same(digest, f"samples of batch {self.batches}", self._context_group, self.device)
        torch.manual_seed(stream(self.context.seed, "torch", self.batches, self.data_rank))
        return BatchRng(self.context.seed, self.batches, batch["index"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        rng = self.begin_batch(batch)
        self.batches += 1
        return self.loss(batch, rng)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.trained, self.context.model, self.context.optim)
        schedule = build_schedule(optimizer, self.context.optim, self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        if self.context.strategy.name.startswith("zero"):
            return  # DeepSpeed holds the gradients, and clips them in its step
        norm = clip_gradients([p for g in optimizer.param_groups for p in g["params"]], self.context.optim.clip_norm)
        self.count_norm("grad_norm", norm)

    def count_norm(self, name: str, norm: float) -> None:
        """Log a gradient norm; stop the training when it was not finite for too long.

        Raises:
            UserError: after `NOT_FINITE_LIMIT` steps in a row.
        """
        finite = math.isfinite(norm)
        self.meter.add(name, norm if finite else 0.0, torch.tensor([float(finite)]))
        self.meter.add("not_finite", 0.0 if finite else 1.0)
        # By name: the finite gradients of one network must not reset the count of another.
        self._not_finite[name] = 0 if finite else self._not_finite.get(name, 0) + 1
        self.require_finite(NOT_FINITE_LIMIT)

    def require_finite(self, limit: int) -> None:
        """Raise if a gradient was not finite in the last `limit` steps.

        Raises:
            UserError: with what to change.
        """
        for name, steps in self._not_finite.items():
            if steps >= limit:
                raise UserError(
                    f"the gradient ({name}) was not finite for {steps} steps up to step {self.step}; "
                    f"lower {self.learning_rates}, lengthen optim.warmup, or set trainer.precision=fp32"
                )

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        zero = self.context.strategy.name.startswith("zero")
        # DeepSpeed accumulates by itself: it is asked for a step after every batch, and takes one after the last of them.
        engine: Any = self.trainer.model
        last = not zero or engine.is_gradient_accumulation_boundary()
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if not last:
            return
        if zero:
            norm = float(engine.get_global_grad_norm())
            # DeepSpeed returns -1 for a norm that is not finite.
            self.count_norm("grad_norm", norm if norm >= 0 else math.nan)
        self.after_step()

    def after_step(self) -> None:
        """Count an optimiser step and update the average."""
        self.step += 1
        self.stepped = True
        if self.ema is not None:
            self.ema.update(self.trained)

    # Saving

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = {
            "step": self.step,
            "batches": self.batches,
            "ema_updates": self.ema.updates if self.ema is not None else 0,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["recipe"]
        self.step, self.batches = state["step"], state["batches"]
        if self.ema is not None:
            self.ema.updates = state["ema_updates"]

    def export_config(self) -> ExportConfig:
        """config.json of the exported checkpoint."""
        model, pack = self.context.transformer
        return ExportConfig(
            model=model,
            pack=pack,
            codecs=self.context.codecs,
            contract=self.context.contract,
            size=self.context.size,
            provenance={**self.context.provenance, "steps": self.step, "averaged": self.context.optim.ema_decay > 0},
            # What the weights had learned before has noise levels that are unknown then, whatever they were trained with here.
            sigma_prior=None if self.parent is not None and self.parent.sigma_prior is None else self.sigma,
            sampling=self.sampling,
        )

    def exported_weights(self) -> dict[str, Tensor]:
        """The whole network under the released keys; complete on rank 0."""
        chosen = self.network
        assert isinstance(chosen, Denoiser)
        return parallel.whole_state_dict(chosen.model)

    def export(self, folder: Path) -> None:
        """Write the network in the released layout; call it on every process, the main one writes."""
        weights = self.exported_weights()
        if self.global_rank == 0:
            require_finite_weights(weights)
            save_export(folder, released_dtypes(weights, self.context.transformer[0]), self.export_config())
