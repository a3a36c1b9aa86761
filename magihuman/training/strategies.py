"""Names to Lightning strategies, with what stock Lightning gets wrong switched off.

| name | what | for |
|---|---|---|
| single | one process | the tiny world, one GPU |
| ddp | a copy per process | small models on many GPUs |
| fsdp2 | sharded weights, gradients, optimiser, average | everything large; any number of optimisers |
| zero2, zero3 | DeepSpeed ZeRO | recipes with one optimiser, where DeepSpeed is preferred |
"""

import os
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from magihuman.config import StrategySettings, TrainerSettings
from magihuman.errors import UserError
from magihuman.training.checkpoint import SyncedFiles


def check_device(trainer: TrainerSettings) -> None:
    """Raise when the machine lacks what `trainer` asks for.

    Raises:
        UserError: no CUDA device, or fewer than asked for.
    """
    import torch

    if trainer.accelerator != "cuda":
        return
    found = torch.cuda.device_count()
    if found < trainer.devices:
        raise UserError(
            f"trainer.accelerator=cuda with trainer.devices={trainer.devices}, but {found} CUDA devices are visible; "
            "lower trainer.devices, or set trainer.accelerator=cpu"
        )


def build_strategy(
    settings: StrategySettings, trainer: TrainerSettings, alternating: bool = False
) -> Strategy | str:
    """The Lightning strategy for `settings`.

    Args:
        alternating: whether the recipe's steps train one of several networks each.

    Raises:
        UserError: DeepSpeed is asked for and not installed.
    """
    if settings.name == "single":
        return "auto"
    if settings.name == "ddp":
        # All weights take part in every step (a missing modality contributes zero), so none has to be
        # searched for; unless networks take turns.
        return DDPStrategy(
            find_unused_parameters=alternating, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    if settings.name == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=trainer.devices * trainer.nodes, tensor_parallel_size=1
        )
    return _zero(int(settings.name[-1]), settings.offload)


def _zero(stage: int, offload: bool) -> Strategy:
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        raise UserError(
            f"strategy=zero{stage} needs DeepSpeed; install it with pip install -e '.[scale]', or choose strategy=fsdp2"
        )
    from lightning.pytorch.strategies import DeepSpeedStrategy

    return DeepSpeedStrategy(
        stage=stage, offload_optimizer=offload, offload_parameters=offload and stage == 3
    )


def plugins(settings: StrategySettings) -> list[Any]:
    """Lightning plugins: synced checkpoint files, and Slurm without Lightning's own requeue (see `preempt`)."""
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    found: list[Any] = []
    if settings.name in ("single", "ddp"):
        found.append(SyncedFiles())
    if SLURMEnvironment.detect() and "TORCHELASTIC_RUN_ID" not in os.environ:
        found.append(SLURMEnvironment(auto_requeue=False))
    return found
