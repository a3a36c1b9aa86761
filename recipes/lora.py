"""LoRA fine-tuning: flow matching with low-rank weight updates on a frozen checkpoint (Hu et al. 2021, arXiv 2106.09685).

The loss is pretraining's (`recipes.pretrain`); the base is `init`, frozen, with block matrices in bf16. Two
LoRAs are added to it (`magihuman.models.lora`): the trained one and its moving average, which is sampled from and exported.
Gradients, optimiser states and checkpoints cover the LoRAs only; the base is loaded from `init` at each start.

Exports in the run folder:
    adapter/    the LoRA in peft's format: infer checkpoint=BASE lora=RUN
    export/     with `merge`, the network with the LoRA merged: infer checkpoint=RUN

A few-step checkpoint (tiny/distill, weights/distill) should not be fine-tuned like this: flow matching knows nothing of
the distillation and undoes it. Fine-tune the teacher and distil it again.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from magihuman import zoo
from magihuman.errors import UserError
from magihuman.flow.sigmas import SigmaPrior
from magihuman.io.export import ExportConfig, Sampling, save_export
from magihuman.io.provenance import fingerprint
from magihuman.models.config import LoraConfig
from magihuman.models.denoiser import Denoiser, WithLora
from magihuman.models.flops import passes
from magihuman.models.lora import add_lora, base_state, copy_lora, lora_parameters, lora_state, without_base
from magihuman.training import parallel
from magihuman.training.context import TrainingContext
from magihuman.training.optim import decay_at, ema_update
from magihuman.training.rng import stream
from magihuman.zoo import lora_files
from recipes.base import require_finite_weights
from recipes.pretrain import Pretrain

TUNED, AVERAGE = "tuned", "average"
BASE = "denoiser.model."


class Lora(Pretrain):
    """Pretraining of low-rank weight updates on a frozen checkpoint.

    Args:
        lora: rank, alpha, and whether embedders and heads are trained.
        merge: also export the merged network.
        sigma: prior of the noise levels; None takes the checkpoint's, uniform levels where that is unknown. Without
            timestep input the network infers the level from its input under this prior, so another prior makes it unlearn.
        sampling: settings stored in the exports; None takes the checkpoint's.
        pretraining: the other settings of `recipes.pretrain.Pretrain`, without `tread`.

    Raises:
        UserError: no `init`, token routing, or an optimiser without LoRA support.
    """

    strategies = ("single", "ddp", "fsdp2")
    fixed_on_resume = ("lora",)

    def __init__(
        self,
        context: TrainingContext,
        *,
        lora: LoraConfig,
        merge: bool = True,
        sigma: SigmaPrior | None = None,
        sampling: Sampling | None = None,
        **pretraining: Any,
    ) -> None:
        if context.init is None:
            raise UserError(
                "lora fine-tunes a trained checkpoint; give init=NAME_OR_FOLDER, for example init=scene/base"
            )
        if context.optim.algorithm == "muon":
            raise UserError(f"optim.algorithm={context.optim.algorithm} does not support LoRA; choose optim=adamw")
        if pretraining.get("tread") is not None:
            raise UserError("recipe.tread routes tokens in pretraining only; leave it out of a LoRA fine-tuning")
        parent = zoo.config_of(context.init)
        super().__init__(
            # The average is a second LoRA, not a second network.
            replace(context, optim=replace(context.optim, ema_decay=0.0)),
            sigma=sigma or parent.assumed_prior,
            sampling=sampling or parent.sampling,
            **pretraining,
        )
        self.decay = context.optim.ema_decay
        self.base, self.lora, self.merge = context.init, lora, merge
        self.strict_loading = False  # checkpoints do not contain the base

    def batch_flops(self, batch: dict[str, Any]) -> float:
        """See `Recipe.batch_flops`; without weight gradients of the frozen base, with the products of the LoRA."""
        model, _ = self.context.transformer
        return float(sum(passes(model, sample, lora=self.lora).update for sample in self.samples(batch)))

    # The network

    def make_network(self) -> Denoiser:
        """The frozen checkpoint with the LoRAs."""
        denoiser = zoo.load(self.base, compute_dtype=torch.bfloat16).denoiser
        denoiser.model.compute_dtype = self.compute_dtype
        return self.add_loras(denoiser)

    def _shell(self) -> Denoiser:
        shape, pack = self.context.transformer
        return self.add_loras(
            zoo.build(shape, pack, compute_dtype=self.compute_dtype, linear_dtype=torch.bfloat16, device="meta")
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the matrix products."""
        return torch.bfloat16 if self.context.trainer.precision == "bf16" else torch.float32

    def add_loras(self, denoiser: Denoiser) -> Denoiser:
        """Freeze a network and add the trained LoRA and its average."""
        denoiser.requires_grad_(False)
        for name in {TUNED: None, self.exported: None}:
            add_lora(denoiser.model, name, self.lora, stream(self.context.seed, "lora"))
        if self.exported == AVERAGE:
            copy_lora(denoiser.model, TUNED, AVERAGE)
            for weight in lora_parameters(denoiser.model, AVERAGE).values():
                weight.requires_grad_(False)
        return denoiser

    @property
    def exported(self) -> str:
        """Name of the LoRA that is evaluated and exported."""
        return AVERAGE if self.decay > 0 else TUNED

    @property
    def trained(self) -> WithLora:
        assert self.denoiser is not None
        return WithLora(self.denoiser, TUNED)

    @property
    def network(self) -> WithLora:
        assert self.denoiser is not None
        return WithLora(self.denoiser, self.exported)

    def after_step(self) -> None:
        """Count a step and update the average."""
        super().after_step()
        if self.exported == AVERAGE:
            assert self.denoiser is not None
            average, tuned = (lora_parameters(self.denoiser, name).values() for name in (AVERAGE, TUNED))
            ema_update(average, tuned, decay_at(self.step - 1, self.decay))

    # Saving

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The LoRAs; `init` names the base."""
        return without_base(super().state_dict(*args, **kwargs), BASE)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["recipe"]["base"] = self.base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        base = checkpoint["recipe"]["base"]
        if base != self.base:
            raise UserError(f"the checkpoint's LoRA belongs to init={base}, not to init={self.base}; give init={base}")

    def export_config(self) -> ExportConfig:
        config = super().export_config()
        facts = {"averaged": self.decay > 0, "init": self.base, "lora": self.lora.to_dict()}
        return replace(config, provenance=config.provenance | facts)

    def export(self, folder: Path) -> None:
        """Write the LoRA next to `folder`, and the merged network into it."""
        assert self.denoiser is not None
        whole = parallel.whole_state_dict(self.denoiser.model)
        if self.global_rank != 0:
            return
        config = self.export_config()
        facts = {"base": fingerprint(zoo.find(self.base))}
        config = replace(config, provenance=config.provenance | facts)
        own = lora_state(whole, self.exported)
        require_finite_weights(own)
        lora_files.save_lora(folder.parent / "adapter", own, self.lora, config, self.base)
        if self.merge:
            save_export(folder, lora_files.merged(base_state(whole), own, self.lora, config.model), config)
