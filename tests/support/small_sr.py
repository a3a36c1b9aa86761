"""A small super-resolution recipe and its batches."""

from typing import Any

import torch
import training_stub

from magihuman.flow.sigmas import SigmaPrior
from magihuman.flow.super_resolution import NOISE_INDEX
from magihuman.io.export import Size
from magihuman.models.config import DiTConfig, PackConfig
from magihuman.training.context import TrainingContext
from magihuman.training.first_stage import FirstStageSettings
from magihuman.training.rng import BatchRng
from recipes.sr import SuperResolution

SMALL = DiTConfig(
    num_layers=2, hidden_size=16, head_dim=8, num_query_groups=1, video_in_channels=12, audio_in_channels=4,
    text_in_channels=5, mm_layers=(0,), gelu7_layers=(0,),
)  # fmt: skip
RELEASED: dict[str, Any] = {"noise_index": (NOISE_INDEX, NOISE_INDEX), "audio_noise": (0.7, 0.7)}


def recipe(**settings: Any) -> SuperResolution:
    config = training_stub.compose([*training_stub.SMALL, "+recipe=sr", "data.module.shards=x"])
    from magihuman.composition import plain
    from magihuman.config import OptimSettings, StrategySettings, TrainerSettings, build

    node = plain(config)
    context = TrainingContext(
        model=SMALL, pack=PackConfig(patch_size=2, coords_style="v1"), codecs="tiny",
        contract=training_stub.CONTRACT, size=Size(9, 16, 16), null_text=torch.zeros(1, 5),
        optim=build(OptimSettings, node["optim"]), trainer=build(TrainerSettings, node["trainer"]),
        strategy=StrategySettings(), sr_size=(32, 32),
    )  # fmt: skip
    usual: dict[str, Any] = {"sigma": SigmaPrior("shifted", shift=5.0), "first_stage": FirstStageSettings()}
    made = SuperResolution(context, **{**usual, **settings})
    made.configure_model()
    return made


def clips(count: int = 4) -> dict[str, Any]:
    batch = training_stub.batch(range(count))
    batch["video_sr"] = batch["video"].repeat_interleave(2, -2).repeat_interleave(2, -1).half()
    return batch


class Fixed(BatchRng):
    """A BatchRng with stored noise."""

    def __init__(self, stored: list[torch.Tensor]) -> None:
        super().__init__(0, 0, range(len(stored[0])))
        self.stored = list(stored)

    def normal(self, shape: Any) -> torch.Tensor:
        assert self.stored[0].shape[1:] == tuple(shape)
        return self.stored.pop(0)
