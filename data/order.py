"""Random order of the samples, cut into batches of one bucket.

The order is a pure function of (seed, epoch, global index), independent of ranks, workers and what was read before.
So the state of a loader is one number, and a run may resume with another number of processes. That is why the order
is our own: webdataset's shuffle buffer has no state that could be saved.
"""

from collections.abc import Mapping, Sequence

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, splitmix64's increment


def mix(*numbers: int, count: int) -> np.ndarray:
    """`count` pseudo-random uint64 seeded by integers; own code, so that no library's version can change an order."""
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
    """A random permutation of range(count), seeded by `numbers`."""
    return np.argsort(mix(*numbers, count=count), kind="stable")


class Order:
    """Training order: global batches of sample numbers, one bucket each.

        order = Order({"25x64x64": range(100)}, batch_size=16, seed=0)
        numbers = order.batch(7)  # the eighth batch of the run

    In every epoch each bucket is shuffled and cut into batches, and the batches of all buckets are shuffled. The last
    batch of a bucket is filled up from its first, so each sample comes at least once per epoch and every batch has
    `batch_size` samples.

    Args:
        buckets: bucket name -> numbers of its samples, in index order.
        batch_size: samples of a global batch, all ranks together.
    """

    def __init__(self, buckets: Mapping[str, Sequence[int]], batch_size: int, seed: int) -> None:
        named = sorted(buckets.items())
        self._buckets = {name: np.asarray(numbers) for name, numbers in named if len(numbers)}
        self.batch_size, self.seed = batch_size, seed
        self.batches_per_epoch = sum(-(-len(numbers) // batch_size) for numbers in self._buckets.values())
        self._epoch: tuple[int, np.ndarray] | None = None  # cache of the last one

    def epoch(self, epoch: int) -> np.ndarray:
        """Sample numbers of an epoch: int64 [batches, batch_size]."""
        if self._epoch is None or self._epoch[0] != epoch:
            batches = []
            for position, numbers in enumerate(self._buckets.values()):
                shuffled = numbers[permutation(len(numbers), self.seed, epoch, position + 1)]
                whole = -(-len(shuffled) // self.batch_size) * self.batch_size
                batches.append(np.resize(shuffled, whole).reshape(-1, self.batch_size))
            stacked = np.concatenate(batches)
            self._epoch = epoch, stacked[permutation(len(stacked), self.seed, epoch, 0)]
        return self._epoch[1]

    def batch(self, number: int) -> np.ndarray:
        """Sample numbers of global batch `number`, counted over all epochs: int64 [batch_size]."""
        epoch, position = divmod(number, self.batches_per_epoch)
        return self.epoch(epoch)[position]


class FixedOrder:
    """Validation order: every sample once, in index order; batches of one bucket, the last ones smaller.

    Args:
        ranks: a smaller batch is filled up to a multiple of their number, so that each has a sample.
    """

    def __init__(self, buckets: Mapping[str, Sequence[int]], batch_size: int, ranks: int) -> None:
        self.batch_size = batch_size
        self._batches = []
        for _, numbers in sorted(buckets.items()):
            for start in range(0, len(numbers), batch_size):
                batch = np.asarray(numbers[start : start + batch_size])
                self._batches.append(np.resize(batch, -(-len(batch) // ranks) * ranks))
        self.batches_per_epoch = len(self._batches)

    def batch(self, number: int) -> np.ndarray:
        return self._batches[number]
