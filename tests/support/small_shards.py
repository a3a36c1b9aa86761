"""Small shards of three buckets, whose values say which sample they are."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pooled_bundle import build as pooled_bundle

from data.module import LatentDataModule
from data.order import permutation
from data.shards import Index, ShardWriter

BUCKETS = {"25x64x64+a": 41, "25x64x64": 9, "13x64x128+a": 22}


def write_shards(folder: Path, per_shard: int = 20) -> Path:
    """Synthetic samples: the video's value is the sample's number."""
    folder.mkdir()
    names = [name for name, count in BUCKETS.items() for _ in range(count)]
    names = [names[i] for i in permutation(len(names), 7)]
    shards = []
    for first in range(0, len(names), per_shard):
        path = folder / f"shard-{first // per_shard:06d}.tar"
        with ShardWriter(path) as writer:
            for number in range(first, min(first + per_shard, len(names))):
                bucket = names[number]
                shape = (3, 7, 16, 16) if bucket.startswith("25") else (3, 4, 16, 32)
                tensors = {"video": torch.full(shape, float(number)), "text": torch.ones(1 + number % 4, 26)}
                if bucket.endswith("+a"):
                    tensors["audio"] = torch.full((int(bucket[:2]), 32), float(number))
                writer.add(
                    f"s{number // 2:03d}_{number % 2:04d}",
                    bucket,
                    tensors,
                    {"caption": f"no {number}", "bucket": bucket},
                )
        shards.append((path.name, writer.entries))
    Index("pooled", pooled_bundle("cpu").contract.to_dict(), shards).save(folder)
    return folder


def module(shards: Path, rank: int = 0, ranks: int = 1, **settings: Any) -> LatentDataModule:
    """A data module as a trainer's rank sees it."""
    made = LatentDataModule(str(shards), **{"batch_size": 6, "val_fraction": 0.1, "seed": 3, **settings})
    made.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, training=True)  # type: ignore[assignment]
    return made
