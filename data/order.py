"""The order of samples in training and validation.

It is a pure function of (seed, epoch, global index), independent of ranks, workers and what was read before, and a position
means the same on every rank. So a training may resume with another number of processes. Neither webdataset's shuffle buffer
(no state that could be saved) nor Lightning's sampler (it restores the state of rank 0 everywhere and resumes at a wrong
sample after the first epoch) is used.
"""

from collections.abc import Mapping, Sequence

import numpy as np

ORDER = 2
"""Version of the order of samples, stored in checkpoints; 1 filled the last batch of each bucket and epoch by repetition."""
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

    Each bucket is an endless sequence of passes over its samples, each pass shuffled anew, and is cut into batches; a batch
    may hold the end of one pass and the start of the next. Epoch e has those batches of every bucket that keep its share
    of the training at its share of the samples, shuffled: after any number of epochs a bucket has had its samples times
    epochs, to less than one batch. So no sample is lost, and none comes more often because its bucket is small.

    Args:
        buckets: bucket name -> numbers of its samples, in index order.
        batch_size: samples of a global batch, all ranks together.

    Attributes:
        batches_per_epoch: batches that hold as many samples as there are, rounded up.
    """

    def __init__(self, buckets: Mapping[str, Sequence[int] | np.ndarray], batch_size: int, seed: int) -> None:
        named = sorted((name, numbers) for name, numbers in buckets.items() if len(numbers))
        self._numbers = [np.asarray(numbers, np.int32) for _, numbers in named]
        self.sizes = {name: len(numbers) for name, numbers in named}
        self.batch_size, self.seed = batch_size, seed
        self._sizes = np.array([len(numbers) for numbers in self._numbers])  # [buckets]
        # Every bucket but the first starts part of a batch later or earlier, so that the batches of small buckets are
        # spread over the epochs. Whole numbers of samples: nothing is rounded, however long the training.
        self._phases = (batch_size - 1 + np.cumsum(self._sizes) - self._sizes) % batch_size
        self.batches_per_epoch = -(-int(self._sizes.sum()) // batch_size)
        self._epoch = 0
        self._slots = self._shuffled_epoch(0)
        self._passes: list[dict[int, np.ndarray]] = [{} for _ in self._numbers]  # the two latest of each bucket

    @property
    def samples(self) -> np.ndarray:
        """Numbers of all samples, ascending: int32."""
        return np.sort(np.concatenate(self._numbers))

    def _before(self, epoch: int) -> np.ndarray:
        """Batches of each bucket before an epoch: int64 [buckets]."""
        return (epoch * self._sizes + self._phases) // self.batch_size

    def _shuffled_epoch(self, epoch: int) -> np.ndarray:
        """Order of the batches of an epoch, which are numbered bucket by bucket."""
        count = int((self._before(epoch + 1) - self._before(epoch)).sum())
        return permutation(count, self.seed, epoch, 0)

    def _shuffled_pass(self, bucket: int, number: int) -> np.ndarray:
        """Sample numbers of a bucket in the order of pass `number`."""
        kept = self._passes[bucket]
        if number not in kept:
            if len(kept) > 1:
                del kept[next(iter(kept))]
            kept[number] = self._numbers[bucket][permutation(self._sizes[bucket], self.seed, number, bucket + 1)]
        return kept[number]

    def batch(self, number: int) -> np.ndarray:
        """Sample numbers of global batch `number`, counted over all epochs: int32 [batch_size]."""
        epoch = number * self.batch_size // int(self._sizes.sum())  # to a few epochs
        while self._before(epoch).sum() > number:
            epoch -= 1
        while self._before(epoch + 1).sum() <= number:
            epoch += 1
        if epoch != self._epoch:
            self._epoch, self._slots = epoch, self._shuffled_epoch(epoch)
        before = self._before(epoch)
        counts = self._before(epoch + 1) - before
        slot = int(self._slots[number - before.sum()])
        bucket = int(np.searchsorted(np.cumsum(counts), slot, side="right"))
        position = int(before[bucket] + slot - counts[:bucket].sum()) * self.batch_size
        parts, end = [], position + self.batch_size
        while position < end:
            turn, start = divmod(position, int(self._sizes[bucket]))
            parts.append(self._shuffled_pass(bucket, turn)[start : start + end - position])
            position += len(parts[-1])
        return np.concatenate(parts)


class FixedOrder:
    """Validation order: every sample once; batches of one bucket, the largest bucket first, the last ones smaller.

    Args:
        ranks: a smaller batch is filled up to a multiple of their number, so that each has a sample.
    """

    def __init__(self, buckets: Mapping[str, Sequence[int] | np.ndarray], batch_size: int, ranks: int) -> None:
        self.batch_size = batch_size
        self._batches = []
        # The usual clips first: validation during a training takes the first batch only.
        for _, numbers in sorted(buckets.items(), key=lambda item: (-len(item[1]), item[0])):
            for start in range(0, len(numbers), batch_size):
                batch = np.asarray(numbers[start : start + batch_size])
                self._batches.append(np.resize(batch, -(-len(batch) // ranks) * ranks))
        self.batches_per_epoch = len(self._batches)

    @property
    def samples(self) -> np.ndarray:
        """Numbers of all samples, ascending."""
        return np.unique(np.concatenate(self._batches))

    def batch(self, number: int) -> np.ndarray:
        return self._batches[number]
