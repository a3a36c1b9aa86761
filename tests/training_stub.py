"""A data module of synthetic latents for tests of the engine: batches are a pure function of their position."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch

from magihuman.models.codecs import Contract

CONTRACT = Contract(
    video_codec="stub", audio_codec="stub", text_encoder="stub", video_channels=3, audio_channels=4,
    text_channels=5, video_stride=(4, 4, 4), fps=25.0, audio_rate=16000, waveform_channels=1,
)  # fmt: skip


def make_batch(position: int, size: int, sound: bool = True, frames: int = 3) -> dict[str, Any]:
    """Samples position .. position + size - 1: clips whose moving part follows their sound."""
    video, audio, text = [], [], []
    for number in range(position, position + size):
        draw = torch.Generator().manual_seed(number)
        loud = torch.rand(frames, generator=draw)
        clip = torch.full((3, frames, 4, 4), 0.5)
        clip[:, :, 2:, 1:3] = 2 * loud[None, :, None, None]
        video.append(clip)
        audio.append(loud.repeat_interleave(4)[: 4 * (frames - 1) + 1, None].expand(-1, 4).clone())
        text.append(torch.randn(1 + number % 3, 5, generator=draw))
    return {
        "video": torch.stack(video),
        "audio": torch.stack(audio) if sound else torch.zeros(size, 0, 4),
        "text": text,
        "caption": [""] * size,
        "key": [str(position + i) for i in range(size)],
        "index": torch.arange(position, position + size),
    }


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, module: "StubData") -> None:
        self.module = module

    def __iter__(self) -> Iterator[dict[str, Any]]:
        trainer = self.module.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        position = self.module.position
        while True:
            yield make_batch(position + rank * self.module.batch_size, self.module.batch_size, self.module.sound)
            position += world * self.module.batch_size


class StubData(L.LightningDataModule):
    """See the module's docstring; `position` counts samples over all processes."""

    world = "stub"
    contract = CONTRACT
    size = (9, 16, 16)
    null_text = torch.zeros(1, 5)

    def __init__(self, shards: str = "stub", batch_size: int = 2, sound: bool = True) -> None:
        super().__init__()
        self.shards, self.batch_size, self.sound, self.position = shards, batch_size, sound, 0

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(Stream(self), batch_size=None)

    def val_dataloader(self) -> Any:
        return [make_batch(10_000, 4, self.sound)]

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"position": self.trainer.lightning_module.batches * self.trainer.world_size * self.batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
