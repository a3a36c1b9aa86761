"""Streams of small shards as a rank of a training reads them."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from data.stream import StreamDataModule


def module(where: object, rank: int = 0, ranks: int = 1, **settings: Any) -> StreamDataModule:
    """A data module as a trainer's rank sees it."""
    chosen = {
        "batch_size": 4,
        "val_fraction": 0.1,
        "seed": 3,
        "num_workers": 0,
        "shuffle": 12,
        "timeout": 0.3,
        **settings,
    }
    made = StreamDataModule(str(where), **chosen)
    made.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank, world_size=ranks, training=True, is_global_zero=rank == 0
    )
    made.setup("fit")
    return made


def stream(made: StreamDataModule) -> Iterator[dict[str, Any]]:
    """Batches, counted as a training counts them."""
    for batch in made.train_dataloader():
        yield made.on_after_batch_transfer(batch, 0)


def take(made: StreamDataModule, count: int) -> list[dict[str, Any]]:
    batches = stream(made)
    return [next(batches) for _ in range(count)]


def keys(batches: list[dict[str, Any]]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    return len(a) == len(b) and all(
        x["key"] == y["key"] and torch.equal(x["video"], y["video"]) and torch.equal(x["index"], y["index"])
        for x, y in zip(a, b, strict=True)
    )
