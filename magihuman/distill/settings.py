"""What a distillation can be told, and what it refuses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from magihuman.distill.networks import HOLDINGS
from magihuman.errors import UserError
from magihuman.flow.sigmas import SigmaPrior
from magihuman.io.export import ExportConfig
from magihuman.training.context import TrainingContext


@dataclass(frozen=True)
class CriticSettings:
    """How the critic keeps up with the student.

    Attributes:
        lr: peak learning rate; the rest of the optimiser is the student's.
        updates: R, per cycle.
        warmup: cycles at the start in which the student stands still.
        samples_per_rollout: how often one rollout is drawn from before the student is simulated again.
        first_step: the critic learns the estimates of this step and later ones.
    """

    lr: float = 5e-4
    updates: int = 5
    warmup: int = 10
    samples_per_rollout: int = 6
    first_step: int = 0

    def __post_init__(self) -> None:
        if self.updates < 1 or self.samples_per_rollout < 1 or not self.lr > 0:
            raise UserError(
                f"recipe.critic needs updates and samples_per_rollout of at least 1 and a positive lr, not "
                f"{self.updates}, {self.samples_per_rollout} and {self.lr}"
            )


def require_possible(
    context: TrainingContext,
    teacher: ExportConfig,
    sigma: SigmaPrior | None,
    holding: str,
    first_steps: dict[str, int],
    steps: int,
    micro_batch: int | None,
) -> None:
    """Raise unless these settings go together.

    Args:
        sigma: prior that the critic was asked to have, or None; where nobody knows the teacher's, any will do.
        first_steps: by setting, the first step that something is learned of; steps: K.

    Raises:
        UserError: naming the setting.
    """
    # Published weights do not say what their prior was; config.json of one trained here does.
    if sigma is not None and sigma != teacher.sigma_prior and "released" not in teacher.provenance:
        raise UserError(
            f"recipe.sigma={sigma.to_dict()} is not the prior that {context.init} was trained with "
            f"({teacher.sigma_prior.to_dict()}); without timestep input the critic needs the teacher's: remove it"
        )
    if context.trainer.accumulate != 1:
        raise UserError(
            f"trainer.accumulate={context.trainer.accumulate} does not go with dmd2, which updates two networks; "
            "raise data.module.batch_size and set recipe.micro_batch to what fits into memory"
        )
    if micro_batch is not None and micro_batch < 1:
        raise UserError(f"recipe.micro_batch={micro_batch} is no number of samples; give at least 1, or null")
    if holding not in HOLDINGS:
        raise UserError(f"recipe.networks={holding!r} is unknown; choose from {', '.join(HOLDINGS)}")
    if holding != "full" and context.optim.algorithm != "adamw":
        raise UserError(
            f"optim.algorithm={context.optim.algorithm} has no rule for adapters; choose optim=adamw, or "
            "recipe.networks=full"
        )
    if context.strategy.name == "fsdp2" and not context.strategy.reshard_after_forward:
        raise UserError(
            "strategy.reshard_after_forward=false does not go with dmd2, whose networks take turns; leave it true"
        )
    for name, step in first_steps.items():
        if not 0 <= step < steps:
            raise UserError(f"{name}={step} is none of {steps} steps; give 0 to {steps - 1}")


def require_same_parts(checkpoint: Mapping[str, Any], init: str | None, mine: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint is of this teacher and of the parts that these settings make.

    Args:
        mine: state dict of now; sharded checkpoints bring none to compare it with.

    Raises:
        UserError: naming what to set.
    """
    then = checkpoint["recipe"].get("init", init)  # older checkpoints do not say
    if then != init:
        raise UserError(f"the checkpoint was distilled from init={then}, not from init={init}; give that one")
    if "state_dict" in checkpoint and checkpoint["state_dict"].keys() != mine.keys():
        raise UserError(
            "the checkpoint holds other parts than these settings make; continue with recipe.networks, recipe.lora, "
            "recipe.gan.weight and optim.ema_decay of its config.yaml"
        )
