"""Settings of the fake score, and checks of combinations of settings that DMD-2 cannot train with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from magihuman.errors import UserError
from magihuman.models.config import LORAS
from magihuman.training.context import TrainingContext


@dataclass(frozen=True)
class FakeScoreSettings:
    """Training of the fake score (config `recipe.fake_score`).

    Attributes:
        lr: peak learning rate; all other optimiser settings are the student's.
        updates: R, per iteration.
        warmup: iterations at the start in which only the fake score is trained.
        samples_per_rollout: updates that use a rollout before the student is rolled out again.
        first_step: steps before this one are left out, since their data estimates are blurred; None is the last step.
        motion_floor: of the weights of its loss (`magihuman.training.motion`), which should be the teacher's; None takes the
            one that the teacher's training ended with, 1 (no weights) where that is not recorded.

    Raises:
        UserError: at construction, for values out of range.
    """

    lr: float = 2e-4
    updates: int = 5
    warmup: int = 10
    samples_per_rollout: int = 6
    first_step: int | None = 0
    motion_floor: float | None = None

    def __post_init__(self) -> None:
        if self.updates < 1 or self.samples_per_rollout < 1 or self.warmup < 0 or not self.lr > 0:
            raise UserError(
                f"recipe.fake_score needs updates and samples_per_rollout of at least 1, a warmup of at least 0 and a "
                f"positive lr, not {self.updates}, {self.samples_per_rollout}, {self.warmup} and {self.lr}"
            )


def check_settings(context: TrainingContext, sharing: str, micro_batch: int | None) -> None:
    """Refuse combinations of settings that DMD-2 cannot train with.

    Args:
        sharing: recipe.networks.

    Raises:
        UserError: naming the setting.
    """
    if context.trainer.accumulate != 1:
        raise UserError(
            f"trainer.accumulate={context.trainer.accumulate} is not supported by dmd2, which updates two networks; "
            "raise data.module.batch_size and set recipe.micro_batch to what fits into memory"
        )
    if micro_batch is not None and micro_batch < 1:
        raise UserError(f"recipe.micro_batch={micro_batch} must be at least 1, or null for the whole batch")
    if sharing not in LORAS:
        raise UserError(f"recipe.networks={sharing!r} is unknown; choose from {', '.join(LORAS)}")
    if sharing != "full" and context.optim.algorithm == "muon":
        raise UserError(
            f"optim.algorithm={context.optim.algorithm} does not support LoRA; choose optim=adamw, or "
            "recipe.networks=full"
        )
    if context.strategy.name == "fsdp2" and not context.strategy.reshard_after_forward:
        raise UserError(
            "strategy.reshard_after_forward=false would keep all networks of dmd2 gathered in memory; leave it true"
        )


def first_steps(steps: int, student: int | None, fake_score: int | None) -> tuple[int, int]:
    """First step of a K-step student that student and fake score are trained on; None gives K // 2 and K - 1.

        first_steps(8, None, None)    # (4, 7)
        first_steps(1, None, None)    # (0, 0)

    Raises:
        UserError: no step at all, or a step that the student does not have.
    """
    if steps < 1:
        raise UserError(f"recipe.steps={steps} must be at least 1")
    given = {"recipe.first_step": student, "recipe.fake_score.first_step": fake_score}
    if wrong := [f"{name}={step}" for name, step in given.items() if step is not None and not 0 <= step < steps]:
        raise UserError(
            f"{' and '.join(wrong)} must be one of the steps 0 to {steps - 1} of recipe.steps={steps}; null derives it"
        )
    return steps // 2 if student is None else student, steps - 1 if fake_score is None else fake_score


def check_resume(checkpoint: Mapping[str, Any], init: str | None, state: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another teacher or of other networks.

    Args:
        state: state dict of the recipe; sharded checkpoints contain none to compare it with.

    Raises:
        UserError: naming the setting to change.
    """
    saved = checkpoint["recipe"].get("init", init)  # older checkpoints do not have it
    if saved != init:
        raise UserError(f"the checkpoint was distilled from init={saved}, not from init={init}; give init={saved}")
    if "state_dict" in checkpoint and checkpoint["state_dict"].keys() != state.keys():
        raise UserError(
            "the checkpoint holds other networks than these settings build; continue with recipe.networks, "
            "recipe.lora, recipe.gan.weight and optim.ema_decay of its config.yaml"
        )


def rename_old_names(checkpoint: dict[str, Any]) -> None:
    """Rename the entries of a checkpoint of version 0.1.0 (critic, adversary, health) in place."""

    def rename(name: str) -> str:
        for old, new in (("critic", "fake_score"), ("adversary", "discriminator"), ("health/", "monitor/")):
            name = name.replace(old, new)
        return name.replace("spread_", "diversity_")

    recipe = checkpoint["recipe"]
    if "health" not in recipe:
        return
    monitor = recipe.pop("health")
    for group in (monitor["strikes"], monitor["sums"], monitor["reference"] or {}):
        for name in [name for name in group if rename(name) != name]:
            group[rename(name)] = group.pop(name)
    if "start" in (monitor["reference"] or {}):
        monitor["reference"]["start"] = {rename(k): v for k, v in monitor["reference"]["start"].items()}
    recipe |= {"monitor": monitor, "fake_score_updates": recipe.pop("critic_updates")}
    if "state_dict" in checkpoint:
        checkpoint["state_dict"] = {rename(key): value for key, value in checkpoint["state_dict"].items()}
