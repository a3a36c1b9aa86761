"""A small Turbo VAE recipe, and batches whose frames follow from their latents."""

from typing import Any

import torch
import training_stub

from magihuman.config import OptimSettings, StrategySettings, TrainerSettings
from magihuman.io.export import Size
from magihuman.models.config import Contract
from magihuman.training.context import TrainingContext
from magihuman.training.rng import BatchRng
from recipes.turbo_vae import TurboVAE

STUDENT = {
    "layout": "causal",
    "network": {
        "latent_channels": 3,
        "stages": [{"width": 8, "blocks": 1, "kind": "full", "up": [2, 2]}, {"width": 8, "blocks": 1, "kind": "split"}],
        "patch": [2, 2],
    },
}


def recipe(contract: Contract = training_stub.CONTRACT, kind: type[TurboVAE] = TurboVAE, **settings: Any) -> TurboVAE:
    context = TrainingContext(
        model=None, pack=None, codecs="stub", contract=contract, size=Size(9, 16, 16),
        null_text=torch.zeros(1, 5), optim=OptimSettings(lr=1e-2, ema_decay=0.9),
        trainer=TrainerSettings(100, precision="fp32"), strategy=StrategySettings(),
    )  # fmt: skip
    made = kind(context, **{"student": STUDENT, **settings})
    made.configure_model()
    return made


def batch(count: int = 4) -> dict[str, Any]:
    """Clips whose frames follow from their latents: every pixel shows its latent, over 2."""
    made = training_stub.batch(range(count))
    spread = made["video"].repeat_interleave(4, 3).repeat_interleave(4, 4).repeat_interleave(4, 2)[:, :, 3:]
    made["frames"] = ((spread / 2 + 1) * 127.5).round().clamp(0, 255).byte()
    return made


def rng(count: int, number: int = 0) -> BatchRng:
    return BatchRng(0, number, range(count))
