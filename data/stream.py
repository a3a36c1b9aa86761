"""Training from shards that lie elsewhere: `data=stream data.module.shards=URL`.

Shards are read from beginning to end, each by one worker process in an epoch, through a pipeline of webdataset: shards in
random order, their samples, a shuffle buffer, batches of one bucket. This pipeline passes sample numbers, since the index
knows the samples; the bytes are read behind it, when a batch needs them. So the order is a pure function of the seed and
of the numbers of ranks and workers, and a resumed training repeats it without reading, up to the batch where it stopped:
it continues with the next sample, and reads again only what was in the buffers.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import numpy as np

from data.module import TRIES, Batches, LatentDataModule
from data.order import mix, permutation
from data.remote import RemoteShards, Retries
from data.shards import Sample, SampleError
from magihuman.errors import UserError

Place = tuple[int, int]
"""Epoch and number of a sample: where it stands in the order."""


@dataclass
class Segment:
    """A part of a training with one order: it begins at global batch `first` with epoch `epoch`.

    Another number of ranks, of workers or a buffer of another size is another order, and begins a new segment.
    """

    first: int = 0
    epoch: int = 0
    ranks: int = 1
    workers: int = 1
    shuffle: int = 0
    webdataset: str = ""


class WorkerStream:
    """The batches of one worker, and their samples.

        stream = WorkerStream(reader, shards, segment, seed=0, part=0, batch_size=8)
        samples = [stream.take(place) for place in stream.next_batch()]

    Args:
        reader: of the samples.
        shards: [shards] arrays of the numbers of their training samples, in the order of the file; at least one a worker.
        part: number of the worker, in [0, segment.ranks * segment.workers).
        batch_size: of one rank.

    Attributes:
        given: number of batches given so far.
        unread: places of the samples that have entered the buffer and were not read, in reading order.
    """

    def __init__(
        self,
        reader: RemoteShards,
        shards: Sequence[np.ndarray],
        segment: Segment,
        seed: int,
        part: int,
        batch_size: int,
    ) -> None:
        self._reader, self._shards, self._segment = reader, shards, segment
        self._seed, self._part, self._batch_size = seed, part, batch_size
        self.given = 0
        self.unread: dict[Place, None] = {}
        self._waiting: dict[Place, tuple[str, Sample] | SampleError] = {}  # read, and not in a batch yet
        self._last: dict[int, tuple[str, Sample]] = {}  # bucket -> its newest sample
        self._shard = (-1, -1)  # epoch and number of the one that is read
        self._plan = self._batches()

    def _batches(self) -> Iterator[list[Place]]:
        buckets = self._reader.index.rows["bucket"]
        open_batches: dict[int, list[Place]] = {}
        for epoch in count(self._segment.epoch):
            for place in self._epoch(epoch):
                bucket = int(buckets[place[1]])
                batch = open_batches.setdefault(bucket, [])
                batch.append(place)
                if len(batch) == self._batch_size:
                    del open_batches[bucket]
                    yield batch

    def _epoch(self, epoch: int) -> Iterator[Place]:
        """The worker's samples of an epoch, each once, shuffled."""
        from webdataset import DataPipeline
        from webdataset.filters import shuffle

        parts = self._segment.ranks * self._segment.workers
        # As webdataset's split_by_node and split_by_worker, by the data-parallel rank.
        chosen = permutation(len(self._shards), self._seed, epoch, 0)[self._part :: parts]

        def samples() -> Iterator[Place]:
            for shard in chosen:
                for number in self._shards[shard].tolist():
                    self.unread[epoch, number] = None
                    yield epoch, number

        draw = random.Random(int(mix(self._seed, epoch, self._part, count=1)[0]))
        size = self._segment.shuffle
        return iter(DataPipeline(samples, shuffle(size, initial=size // 2, rng=draw) if size > 1 else None))

    def next_batch(self) -> list[Place]:
        """The places of the next batch."""
        self.given += 1
        return next(self._plan)

    def skip_to(self, batch: int) -> None:
        """Leave out the batches before number `batch`, without reading them."""
        while self.given < batch:
            for place in self.next_batch():
                if self._waiting.pop(place, None) is None:
                    del self.unread[place]

    def take(self, place: Place) -> tuple[str, Sample]:
        """Key and sample of a place, each place once.

        Raises:
            SampleError: it cannot be read.
        """
        while place not in self._waiting:
            self._read_next()
        found = self._waiting.pop(place)
        if isinstance(found, SampleError):
            raise found
        self._last[int(self._reader.index.rows["bucket"][place[1]])] = found
        return found

    def _read_next(self) -> None:
        place = next(iter(self.unread))
        del self.unread[place]
        shard = place[0], int(self._reader.index.rows["shard"][place[1]])
        if shard != self._shard:  # one that was lost in the last epoch is tried again
            self._shard, self._reader.lost = shard, None
        try:
            self._waiting[place] = self._reader.index[place[1]].key, self._reader.read(place[1])
        except SampleError as error:
            self._waiting[place] = error

    def substitute(self, place: Place) -> tuple[str, Sample]:
        """A sample that was read, of the bucket of `place` where there is one.

        Raises:
            UserError: none could be read so far, nor of the next `TRIES`.
        """
        for _ in range(TRIES):
            buckets = self._reader.index.rows["bucket"]
            read = [(buckets[p[1]] == buckets[place[1]], s) for p, s in self._waiting.items()]
            good = [(same, sample) for same, sample in read if not isinstance(sample, SampleError)]
            good += [(bucket == buckets[place[1]], sample) for bucket, sample in self._last.items()]
            if good:
                return max(good, key=lambda each: each[0])[1]
            if not self.unread:
                break
            self._read_next()
        raise UserError(
            f"no sample in {self._reader.name} could be read in place of {self._reader.index[place[1]].key}; see the lines "
            "above"
        )


class StreamBatches(Batches):
    """Dataset of one rank's batches; they are to be asked for in order, by each worker every `segment.workers`-th of them.

    Args:
        shards: numbers of the training samples of each shard.
        batch_size: over all ranks.
    """

    def __init__(
        self,
        reader: RemoteShards,
        shards: Sequence[np.ndarray],
        segment: Segment,
        seed: int,
        batch_size: int,
        rank: int,
    ) -> None:
        self._shards: RemoteShards = reader
        self._numbers, self._segment, self._seed, self._batch_size, self._rank = shards, segment, seed, batch_size, rank
        self._streams: dict[int, WorkerStream] = {}
        self._stream: WorkerStream
        self._told = reader.retries.lost

    def __getitem__(self, number: int) -> dict[str, Any]:
        """As of `Batches`, and `lost_connections`, their number since the last batch of the worker."""
        segment, each = self._segment, self._batch_size // self._segment.ranks
        own, worker = divmod(number - segment.first, segment.workers)
        stream = self._streams.get(worker)
        if stream is None or stream.given > own:
            stream = WorkerStream(
                self._shards, self._numbers, segment, self._seed, self._rank * segment.workers + worker, each
            )
            self._streams[worker] = stream
        stream.skip_to(own)
        self._stream = stream
        batch = self._collect(stream.next_batch(), number * self._batch_size + self._rank * each)
        lost = self._shards.retries.lost
        batch["lost_connections"], self._told = lost - self._told, lost
        return batch

    def _read(self, place: Any) -> tuple[str, Sample]:
        return self._stream.take(place)

    def _readable(self, near: Any) -> tuple[str, Sample]:
        return self._stream.substitute(near)


class StreamDataModule(LatentDataModule):
    """Training and validation batches of latents whose shards lie elsewhere (their contents: `data.module.Batches`).

        data = StreamDataModule("https://host/shards", batch_size=16)
        batch = next(iter(data.train_dataloader()))  # batch["video"]: [16,C,T,h,w]

    Each rank fills its own batches, so at one step ranks may have different buckets. Samples that do not fill a batch at
    the end of an epoch wait for the next one: fewer than batch_size / ranks for each bucket and worker.

    Args:
        shards: a folder of shards, its index.json, or a brace pattern of its tars: as a URL (http, https), a path, or
            `pipe:` and a shell command that prints that file.
        batch_size: samples per step over all ranks together.
        val_fraction: share of the source files kept for validation, as of `LatentDataModule`.
        seed: of the order.
        num_workers: processes per rank that read; the order depends on their number.
        codecs: own codec bundle (package.module:function) that the shards were made with; allows to import it.
        max_damaged_share: damaged and lost samples are replaced and named; the training ends when they are more than this
            share of the samples read, and more than one shard.
        shuffle: samples of a worker's shuffle buffer, in memory.
        cache_dir: keep copies of the shards there; cache_gb: gigabytes (10^9 bytes) of it at most.
        tries: in a row without a byte, after which the rest of a shard is lost for this epoch.
        timeout: seconds without a byte after which a connection is lost.

    Attributes:
        lost_connections: how often reading had to be tried again, as far as batches have arrived.

    Raises:
        UserError: an index that cannot be fetched or used, or settings out of range.
    """

    reader: RemoteShards

    def __init__(
        self,
        shards: str,
        batch_size: int = 16,
        val_fraction: float = 0.02,
        seed: int = 0,
        num_workers: int = 2,
        codecs: str | None = None,
        max_damaged_share: float = 0.01,
        shuffle: int = 100,
        cache_dir: str | None = None,
        cache_gb: float = 100.0,
        tries: int = 10,
        timeout: float = 60.0,
    ) -> None:
        if shuffle < 0 or cache_gb <= 0 or tries < 1 or timeout <= 0:
            raise UserError(
                f"data.module.shuffle={shuffle} should be at least 0, cache_gb={cache_gb:g} above 0, tries={tries} at least 1 "
                f"and timeout={timeout:g} above 0"
            )
        self._remote = (Retries(tries, timeout), cache_dir, cache_gb)
        super().__init__(shards, batch_size, val_fraction, seed, num_workers, codecs, max_damaged_share)
        self.shuffle, self.lost_connections = shuffle, 0
        self._segment: Segment | None = None
        self._per_shard = self._numbers()

    def _open(self, shards: str) -> RemoteShards:
        return RemoteShards(shards, *self._remote)

    def _split(self, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
        train, val = super()._split(val_fraction)
        chosen = self.reader.chosen[self.reader.index.rows["shard"]]
        if not chosen[train].any():
            raise UserError(f"data.module.shards={self.reader.name} chooses shards without a sample to train on")
        return train[chosen[train]], val[chosen[val]]

    def _numbers(self) -> list[np.ndarray]:
        """The numbers of the training samples of each shard that has some, in the order of the file."""
        rows, numbers = self.reader.index.rows, self.order.samples
        numbers = numbers[np.lexsort((rows["offset"][numbers], rows["shard"][numbers]))]
        ends = np.flatnonzero(np.diff(rows["shard"][numbers])) + 1
        return np.split(numbers, ends)

    def setup(self, stage: str) -> None:
        """Check that every worker has a shard; say which clips wait for long.

        Raises:
            UserError: there are too few shards.
        """
        _, ranks = self._ranks()
        parts = ranks * max(1, self.num_workers)
        if len(self._per_shard) < parts:
            raise UserError(
                f"{len(self._per_shard)} shards with training samples are too few for {ranks} ranks x "
                f"{max(1, self.num_workers)} workers, which read one each; lower data.module.num_workers, or prepare with a "
                "smaller shard_clips"
            )
        rare = {
            name: size for name, size in self.order.sizes.items() if size < self.batch_size * max(1, self.num_workers)
        }
        if rare and (self.trainer is None or self.trainer.is_global_zero):
            named = ", ".join(f"{name} ({size})" for name, size in sorted(rare.items(), key=lambda item: item[1])[:5])
            more = f" and {len(rare) - 5} more" if len(rare) > 5 else ""
            print(
                f"   note: {len(rare)} of {len(self.order.sizes)} buckets hold fewer clips than the {parts} workers need for a "
                f"batch each; these clips wait over several epochs: {named}{more}",
                flush=True,
            )

    @property
    def parent(self) -> dict[str, Any]:
        """Role, name and hash of the shards' index, for run.json."""
        return self.reader.parent

    @property
    def sr_size(self) -> tuple[int, int] | None:
        """As of `LatentDataModule`; one sample is read for it.

        Raises:
            UserError: it cannot be read.
        """
        try:
            self.reader.read(self._usual_samples[0])
        except SampleError as error:
            print(f"   note: the first sample cannot be read: {error}", flush=True)
            if self.reader.lost is not None:
                raise UserError(f"data.module.shards={self.reader.name}: {error}; copy the shards there") from error
        return super().sr_size

    def _current_segment(self, ranks: int) -> Segment:
        from webdataset import __version__

        return Segment(ranks=ranks, workers=max(1, self.num_workers), shuffle=self.shuffle, webdataset=str(__version__))

    def _batches(self, rank: int, ranks: int) -> StreamBatches:
        self._segment = self._segment or self._current_segment(ranks)
        return StreamBatches(self.reader, self._per_shard, self._segment, self.seed, self.batch_size, rank)

    def _check(self, batch: dict[str, Any]) -> None:
        self.lost_connections += batch.pop("lost_connections", 0)
        super()._check(batch)

    def _allowed_losses(self, read: int) -> float:
        return max(super()._allowed_losses(read), *map(len, self._per_shard))

    def teardown(self, stage: str) -> None:
        """Say what was lost."""
        super().teardown(stage)
        if self.lost_connections:
            print(f"   note: {self.lost_connections} lost connections were opened again", flush=True)

    def state_dict(self) -> dict[str, Any]:
        """The position, and the order that it refers to; the same on every rank."""
        return {**super().state_dict(), "segment": asdict(self._segment or self._current_segment(self._ranks()[1]))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume: exactly where ranks, workers and buffer are as they were, else with a new epoch, which is said.

        Raises:
            UserError: the position refers to other shards, another seed or batch size.
        """
        super().load_state_dict(state_dict)
        now = self._current_segment(self._ranks()[1])
        then = Segment(**state_dict["segment"])
        changed = ", ".join(
            f"{name} {old} then, {new} now"
            for (name, old), new in zip(asdict(then).items(), asdict(now).values(), strict=True)
            if name not in ("first", "epoch") and old != new
        )
        now.first, now.epoch = then.first, then.epoch
        is_first = self.trainer is None or self.trainer.is_global_zero
        if not changed and is_first:
            print(
                f"   the stream continues in the same order behind {self._position * self.batch_size} samples; what was in the "
                "shuffle buffers is read again",
                flush=True,
            )
        if changed:
            epochs, begun = divmod((self._position - then.first) * self.batch_size, self.train_samples)
            now.first, now.epoch = self._position, then.epoch + epochs + 1
            if is_first:
                print(
                    f"   note: the order of a stream depends on what has changed ({changed}): a new epoch begins here; about "
                    f"{begun} of {self.train_samples} samples were trained on in the one before, and the others were not",
                    flush=True,
                )
        if self._segment is None:
            self._segment = now
        else:  # the loader is made already
            self._segment.__dict__.update(asdict(now))
