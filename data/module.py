"""The LightningDataModule over shards, with a loader whose whole state is one global position.

Stock Lightning hands every rank the loader state of rank 0 and resumes its own distributed sampler wrongly
after the first epoch; a position that means the same on every rank, and no sampler, leave nothing to get
wrong.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from data.buckets import Bucket
from data.plan import source_of
from data.shards import LARGE, SampleError, Shards
from data.stream import Batches, FixedOrder, Order
from magihuman.errors import UserError
from magihuman.models.latent_contract import Contract


class Loader:
    """Batches of one rank from a position on, without end.

    Not a DataLoader, so that Lightning puts no sampler of its own into it; and without a length, so that
    Lightning sees a single epoch: it does not count on from a checkpoint of an epoch's last batch, which makes
    a second resume go wrong, and it cuts an accumulation short at every epoch's end.

    Args:
        position: number of the global batch that comes next, counted over all epochs.
    """

    def __init__(self, batches: Batches, workers: int, position: int = 0) -> None:
        self._batches, self._workers = batches, workers
        self.position = position

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._read(count(self.position))

    def _read(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        loader = DataLoader(
            self._batches,
            sampler=numbers,
            batch_size=None,
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            self.position += 1
            yield batch


class LatentDataModule(LightningDataModule):
    """Training and validation batches of latents (their contents: `data.stream.Batches`).

    Args:
        shards: folder made by `python -m data.prepare`. batch_size: samples per step over all ranks
        together; on another number of ranks the same samples meet. val_fraction: share of the source files
        held out, chosen by a hash of their name. seed: of the order. num_workers: processes per rank that
        read ahead; 0 reads in the training process, enough for small latents.

    Raises:
        UserError: shards that cannot be used, or settings out of range.
    """

    def __init__(
        self,
        shards: str,
        batch_size: int = 16,
        val_fraction: float = 0.02,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0 or not 0 <= val_fraction < 1:
            raise UserError(
                f"batch_size={batch_size} should be at least 1, num_workers={num_workers} at least 0 and "
                f"val_fraction={val_fraction} in [0, 1)"
            )
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.shards = shards
        self.reader = Shards(shards)
        self.skipped: set[str] = set()
        train, val = split(self.reader, val_fraction)
        self.order = Order(self._by_bucket(train), batch_size, seed)
        self.train_samples, self.val_samples = len(train), len(val)
        self._val = self._by_bucket(val)
        self._position = 0  # global batches that training has taken
        self._loader: Loader | None = None

    def _by_bucket(self, numbers: list[int]) -> dict[str, list[int]]:
        groups: dict[str, list[int]] = defaultdict(list)
        for number in numbers:
            groups[self.reader.entries[number].bucket].append(number)
        return dict(groups)

    @property
    def codecs(self) -> str:
        """Name of the codec bundle that the latents belong to."""
        return self.reader.index.codecs

    @property
    def contract(self) -> Contract:
        """The latents' contract.

        Raises:
            UserError: shards without an index do not say.
        """
        if self.reader.contract is None:
            raise UserError(
                f"the shards in {self.shards} have no index.json and so no latent contract; copy it from "
                "where they were made, or prepare them again"
            )
        return self.reader.contract

    @property
    def size(self) -> tuple[int, int, int]:
        """Pixel frames, height and width of most clips."""
        names = Counter(entry.bucket for entry in self.reader.entries)
        bucket = Bucket.parse(names.most_common(1)[0][0])
        return bucket.frames, bucket.height, bucket.width

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of all clips."""
        buckets = (Bucket.parse(name) for name in {entry.bucket for entry in self.reader.entries})
        return sorted({(bucket.height, bucket.width) for bucket in buckets})

    @property
    def sr_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels at which most clips are stored too (`data.prepare` with sr_sizes), or None."""
        usual = Counter(entry.bucket for entry in self.reader.entries).most_common(1)[0][0]
        for number, entry in enumerate(self.reader.entries):
            if entry.bucket != usual:
                continue
            try:
                large = self.reader.read(number).tensors.get(LARGE)
            except SampleError:  # training skips it, too
                continue
            if large is None:
                return None
            stride = self.contract.video_stride
            return large.shape[-2] * stride[1], large.shape[-1] * stride[2]
        return None

    @property
    def null_text(self) -> torch.Tensor | None:
        """[S,Ct] fp32 features of the empty prompt; None where the shards do not hold them."""
        return self.reader.null_text()

    def _ranks(self) -> tuple[int, int]:
        """(this rank, number of ranks) of the attached trainer."""
        if self.trainer is None:
            return 0, 1
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        if self.batch_size % ranks:
            raise UserError(
                f"batch_size={self.batch_size} is over all ranks and not divisible by {ranks}; "
                f"choose {-(-self.batch_size // ranks) * ranks}"
            )
        return rank, ranks

    def train_dataloader(self) -> Loader:
        batches = Batches(self.reader, self.order, *self._ranks())
        self._loader = Loader(batches, self.num_workers, self._position)
        return self._loader

    def val_dataloader(self) -> Loader | list[Any]:
        if not self.val_samples:
            return []
        rank, ranks = self._ranks()
        order = FixedOrder(self._val, self.batch_size, ranks)
        return _Repeated(Batches(self.reader, order, rank, ranks), self.num_workers, order.batches_per_epoch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count what training takes (not what was read ahead), and what had to be skipped."""
        self.skipped.update(batch["skipped"])
        if self.trainer is not None and self.trainer.training:
            self._position = int(batch["index"][0]) // self.batch_size + 1
        return batch

    def _identity(self) -> dict[str, Any]:
        keys = hashlib.sha256("\n".join(entry.key for entry in self.reader.entries).encode()).hexdigest()[:16]
        return {"seed": self.seed, "batch_size": self.batch_size, "samples": self.train_samples, "keys": keys}

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream of samples, and what it refers to."""
        return {"position": self._position * self.batch_size, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at a saved position, on any number of ranks.

        Raises:
            UserError: the position refers to other shards, another seed or batch size.
        """
        mine = self._identity()
        differing = [
            f"{key}: {state_dict.get(key)!r} then, {mine[key]!r} now"
            for key in mine
            if state_dict.get(key) != mine[key]
        ]
        if differing:
            raise UserError(
                f"cannot go on in the middle of other data ({'; '.join(differing)}); restore the data "
                "settings, or start a new run from the checkpoint's weights with init="
            )
        self._position = state_dict["position"] // self.batch_size
        if self._loader is not None:
            self._loader.position = self._position


class _Repeated(Loader):
    """The first `length` batches, from the first one each time."""

    def __init__(self, batches: Batches, workers: int, length: int) -> None:
        super().__init__(batches, workers)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._read(range(self._length))


def split(shards: Shards, val_fraction: float) -> tuple[list[int], list[int]]:
    """(training, validation) sample numbers; all clips of a source file fall on one side.

    The side depends on the file's key alone, so it stays when files are added. Of two files or more at
    least one is held out unless `val_fraction` is 0.

    Raises:
        UserError: nothing is left to train on.
    """
    hashes = {}
    for entry in shards.entries:
        source = source_of(entry.key)
        if source not in hashes:
            hashes[source] = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8]) / 2**64
    held = {source for source, value in hashes.items() if value < val_fraction}
    if val_fraction and not held and len(hashes) > 1:
        held = {min(hashes, key=hashes.__getitem__)}
    sides: tuple[list[int], list[int]] = ([], [])
    for number, entry in enumerate(shards.entries):
        sides[source_of(entry.key) in held].append(number)
    if not sides[0]:
        raise UserError(
            f"val_fraction={val_fraction} leaves none of {len(hashes)} files to train on; lower it"
        )
    return sides
