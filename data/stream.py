"""The order of samples, and batches of one bucket cut from it.

The order is a pure function of (seed, epoch, global index): nothing about it depends on ranks, workers or
on what was read before. So the state of a loader is one number, and a run may go on with another number of
processes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from data.shards import Sample, SampleError, Shards
from magihuman.errors import UserError

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, splitmix64's increment


def mix(*numbers: int, count: int) -> np.ndarray:
    """`count` pseudo-random uint64 from integers; ours, so that no library's version can change an order."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = _scramble(state + np.uint64((number + 1) * GOLDEN % 2**64))
    return _scramble(state + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN))


def _scramble(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(count: int, *numbers: int) -> np.ndarray:
    """A shuffle of range(count) that depends on `numbers` alone."""
    return np.argsort(mix(*numbers, count=count), kind="stable")


class Order:
    """Global batches of sample numbers, one bucket each.

    In every epoch each bucket is shuffled and cut into batches, and the batches of all buckets are
    shuffled. A bucket's last batch is filled up from its first one, so each sample comes at least once per
    epoch and every batch has `batch_size` samples.

    Args:
        buckets: bucket name -> numbers of its samples, in index order.
        batch_size: samples of a global batch, all ranks together.
    """

    def __init__(self, buckets: Mapping[str, Sequence[int]], batch_size: int, seed: int) -> None:
        named = sorted(buckets.items())
        self._buckets = {name: np.asarray(numbers) for name, numbers in named if len(numbers)}
        self.batch_size, self.seed = batch_size, seed
        self.batches_per_epoch = sum(-(-len(numbers) // batch_size) for numbers in self._buckets.values())
        self._epoch: tuple[int, np.ndarray] | None = None  # the last one made

    def epoch(self, epoch: int) -> np.ndarray:
        """Sample numbers of an epoch: int64 [batches, batch_size]."""
        if self._epoch is None or self._epoch[0] != epoch:
            batches = []
            for place, numbers in enumerate(self._buckets.values()):
                shuffled = numbers[permutation(len(numbers), self.seed, epoch, place + 1)]
                whole = -(-len(shuffled) // self.batch_size) * self.batch_size
                batches.append(np.resize(shuffled, whole).reshape(-1, self.batch_size))
            stacked = np.concatenate(batches)
            self._epoch = epoch, stacked[permutation(len(stacked), self.seed, epoch, 0)]
        return self._epoch[1]

    def batch(self, number: int) -> np.ndarray:
        """Sample numbers of global batch `number`, counted over all epochs: int64 [batch_size]."""
        epoch, place = divmod(number, self.batches_per_epoch)
        return self.epoch(epoch)[place]


class FixedOrder:
    """Every sample once, in index order, for validation; batches of one bucket, the last ones smaller.

    Args:
        share: ranks; a smaller batch is filled up to a multiple of it, so that no rank is left without.
    """

    def __init__(self, buckets: Mapping[str, Sequence[int]], batch_size: int, share: int) -> None:
        self.batch_size = batch_size
        self._batches = []
        for _, numbers in sorted(buckets.items()):
            for start in range(0, len(numbers), batch_size):
                part = np.asarray(numbers[start : start + batch_size])
                self._batches.append(np.resize(part, -(-len(part) // share) * share))
        self.batches_per_epoch = len(self._batches)

    def batch(self, number: int) -> np.ndarray:
        return self._batches[number]


class Batches(Dataset[dict[str, Any]]):
    """Global batch t -> the part of it that belongs to one rank, as tensors.

    A sample that cannot be read is replaced by the next readable one of the same rank's part (else of the
    bucket), which every run does alike, and named in the batch's `skipped`.
    """

    def __init__(self, shards: Shards, order: Order | FixedOrder, rank: int = 0, ranks: int = 1) -> None:
        self._shards, self._order, self._rank, self._ranks = shards, order, rank, ranks

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Batch with video [B,C,T,h,w], audio [B,A,Ca] (A=0 without sound), text list of [S,Ct], all fp32;
        caption, key: lists of str; index [B] int64, the position in the stream of samples; skipped: list of
        str; and [B,...] of every further tensor of the samples, as stored.
        """
        everyone = self._order.batch(number)
        each = len(everyone) // self._ranks
        mine = everyone[self._rank * each : (self._rank + 1) * each]
        samples: list[tuple[str, Sample] | None] = []
        skipped = []
        for sample in mine:
            try:
                samples.append((self._shards.entries[sample].key, self._shards.read(int(sample))))
            except SampleError as error:
                samples.append(None)
                skipped.append(str(error))
        if None in samples:
            samples = self._replaced(samples, int(mine[0]))
        first = number * self._order.batch_size + self._rank * each
        contract = self._shards.index.contract
        silent = torch.zeros(0, contract["audio_channels"] if contract else 0)
        batch = collate([s for s in samples if s is not None], range(first, first + each), silent)
        return {**batch, "skipped": skipped}

    def _replaced(self, samples: list[Any], near: int) -> list[Any]:
        """Fill each gap with the next sample of the list, cyclically."""
        if all(sample is None for sample in samples):
            samples = [self._readable(near), *samples[1:]]
        good = [(i, sample) for i, sample in enumerate(samples) if sample is not None]
        return [next((sample for i, sample in good if i >= gap), good[0][1]) for gap in range(len(samples))]

    def _readable(self, near: int) -> tuple[str, Sample]:
        """Some sample of the bucket of sample `near`."""
        bucket = self._shards.entries[near].bucket
        count = len(self._shards)
        for number in (*range(near + 1, count), *range(near)):
            if self._shards.entries[number].bucket == bucket:
                try:
                    return self._shards.entries[number].key, self._shards.read(number)
                except SampleError:
                    continue
        raise UserError(f"no sample of bucket {bucket} in {self._shards.folder} can be read; copy it again")


def collate(samples: Sequence[tuple[str, Sample]], index: range, silent: torch.Tensor) -> dict[str, Any]:
    """Samples of one bucket to a batch (see `Batches`); `silent` [0,Ca] stands for a missing sound."""
    tensors = [sample.tensors for _, sample in samples]
    batch: dict[str, Any] = {
        "video": torch.stack([t["video"].float() for t in tensors]),
        "audio": torch.stack([t.get("audio", silent).float() for t in tensors]),
        "text": [t["text"].float() for t in tensors],
        "caption": [str(sample.meta.get("caption", "")) for _, sample in samples],
        "key": [key for key, _ in samples],
        "index": torch.tensor(list(index)),
    }
    for name in sorted(set(tensors[0]) - {"video", "audio", "text"}):
        bare = [key for key, sample in samples if name not in sample.tensors]
        if bare:
            raise UserError(f"sample {bare[0]} holds no {name}, {samples[0][0]} does; prepare both alike")
        batch[name] = torch.stack([t[name] for t in tensors])
    return batch
