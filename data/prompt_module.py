"""Data module of prompts without clips, for distillation from the model's own samples."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from magihuman.codecs.bundle import allow_codecs, load_bundle
from magihuman.errors import UserError
from magihuman.models.config import Contract


class PromptLoader:
    """Endless iterator over the batches of one rank; every epoch has its own random order.

    Args:
        position: number of the global batch that comes next.
    """

    def __init__(self, module: "PromptDataModule", rank: int, ranks: int, position: int) -> None:
        self._module, self._rank, self._ranks = module, rank, ranks
        self.position = position

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            batch = self._module.batch(self.position, self._rank, self._ranks)
            self.position += 1
            yield batch


class PromptDataModule(LightningDataModule):
    """Training batches of text features with zero latents of a clip's shape (`real` is false).

        data = PromptDataModule("prompts.txt", batch_size=16)

    Args:
        file: text file with one prompt per line.
        codecs: name of the codecs and the text encoder.
        frames, height, width: of a clip, in pixels.
        batch_size: samples per step over all ranks together.
        seed: of the order.

    Raises:
        UserError: no prompts, or a batch size below 1.
    """

    def __init__(
        self,
        file: str,
        codecs: str = "tiny",
        frames: int = 25,
        height: int = 64,
        width: int = 64,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.module.file={file} cannot be read: {error}") from error
        self.prompts = [line.strip() for line in lines if line.strip()]
        if not self.prompts or batch_size < 1:
            raise UserError(
                f"data.module.file={file} holds {len(self.prompts)} prompts and batch_size is {batch_size}; "
                "give at least one prompt, one per line, and one sample"
            )
        self.codecs, self.size = codecs, (frames, height, width)
        self.batch_size, self.seed = batch_size, seed
        allow_codecs(codecs)
        self._codecs = load_bundle(codecs)
        self.null_text = self._codecs.text_encoder.encode([""])[0]
        time, *space = self.contract.video_stride
        self._video = (self.contract.video_channels, (frames - 1) // time + 1, height // space[0], width // space[1])
        self._audio = (frames, self.contract.audio_channels)
        self._position = 0
        self._loader: PromptLoader | None = None

    @property
    def contract(self) -> Contract:
        """Latent contract of the codecs."""
        return self._codecs.contract

    def batch(self, number: int, rank: int, ranks: int) -> dict[str, Any]:
        """One rank's share of a global batch: a pure function of the seed and the number."""
        positions = range(number * self.batch_size + rank, (number + 1) * self.batch_size, ranks)
        captions = [self.prompts[self._prompt(position)] for position in positions]
        return {
            "text": self._codecs.text_encoder.encode(captions),
            "video": torch.zeros(len(captions), *self._video),
            "audio": torch.zeros(len(captions), *self._audio),
            "caption": captions,
            "index": torch.tensor(list(positions)),
            "real": False,
        }

    def _prompt(self, position: int) -> int:
        epoch, within = divmod(position, len(self.prompts))
        order = torch.randperm(
            len(self.prompts), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        )
        return int(order[within])

    def train_dataloader(self) -> PromptLoader:
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.batch_size % ranks:
            raise UserError(f"data.module.batch_size={self.batch_size} cannot be shared by {ranks} processes")
        self._loader = PromptLoader(self, rank, ranks, self._position)
        return self._loader

    def val_dataloader(self) -> list[Any]:
        return []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count the batches trained on, not those prepared ahead."""
        if self.trainer is not None and self.trainer.training:
            self._position = int(batch["index"][0]) // self.batch_size + 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._position = state_dict["position"]
        if self._loader is not None:
            self._loader.position = self._position
