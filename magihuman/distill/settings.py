"""What a distillation can be told, and what it refuses."""

from dataclasses import dataclass

from magihuman.distill.networks import HOLDINGS
from magihuman.errors import UserError
from magihuman.flow.sigmas import SigmaPrior
from magihuman.training.setup import Setup
from magihuman.weights import ExportConfig


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


def require_possible(
    setup: Setup,
    teacher: ExportConfig,
    sigma: SigmaPrior | None,
    holding: str,
    first_steps: dict[str, int],
    steps: int,
) -> None:
    """Raise unless these settings go together.

    Args:
        sigma: prior that the critic was asked to have, or None.
        first_steps: by setting, the first step that something is learned of; steps: K.

    Raises:
        UserError: naming the setting.
    """
    if sigma is not None and sigma != teacher.sigma_prior:
        raise UserError(
            f"recipe.sigma={sigma.to_dict()} is not the prior that {setup.init} was trained with "
            f"({teacher.sigma_prior.to_dict()}); without timestep input the critic needs the teacher's: remove it"
        )
    if setup.trainer.accumulate != 1:
        raise UserError(
            f"trainer.accumulate={setup.trainer.accumulate} does not go with dmd2, which updates two networks; "
            "raise data.module.batch_size and set recipe.micro_batch to what fits into memory"
        )
    if holding not in HOLDINGS:
        raise UserError(f"recipe.networks={holding!r} is unknown; choose from {', '.join(HOLDINGS)}")
    for name, step in first_steps.items():
        if not 0 <= step < steps:
            raise UserError(f"{name}={step} is none of {steps} steps; give 0 to {steps - 1}")
