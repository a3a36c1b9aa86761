"""What the program hands to every recipe beside the recipe's own settings."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from magihuman.config import OptimSettings, StrategySettings, TrainerSettings
from magihuman.io.export import Size
from magihuman.models.config import DiTConfig, PackConfig
from magihuman.models.latent_contract import Contract


@dataclass(frozen=True)
class TrainingContext:
    """The network to train, the latents it works on, and how.

    Attributes:
        model, pack: shape of the transformer and of its tokens; None where the recipe trains another network.
        codecs: name of the codec bundle; contract: of the latents in the shards.
        size: of a usual clip, for exports and sample clips.
        sr_size: (height, width) in pixels at which the shards hold the clips too, or None.
        null_text: [S,Ct] features of the empty prompt, what a dropped text is replaced by.
        seed: of initial weights and of all draws.
        init: checkpoint (zoo name, export or run folder) that the weights start from, or None.
        provenance: stored in exports.
    """

    model: DiTConfig | None
    pack: PackConfig | None
    codecs: str
    contract: Contract
    size: Size
    null_text: Tensor
    optim: OptimSettings
    trainer: TrainerSettings
    strategy: StrategySettings
    seed: int = 0
    init: str | None = None
    sr_size: tuple[int, int] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def transformer(self) -> tuple[DiTConfig, PackConfig]:
        """`model` and `pack`, for recipes that train the transformer."""
        assert self.model is not None
        assert self.pack is not None
        return self.model, self.pack
