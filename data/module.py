"""Data modules for training (latents of shards, or prompts alone), and a loader that resumes at any batch (`data.order`)."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from data.order import ORDER, FixedOrder, Order
from data.shards import LARGE, Bucket, Sample, SampleError, Shards
from magihuman.codecs.bundle import allow_codecs, load_bundle
from magihuman.errors import UserError
from magihuman.io.text import CAPTION_COLUMNS, MAX_CHARACTERS, prompt_rows
from magihuman.models.config import Contract

NAMED = 10
"""Damaged samples that are named one by one; the further ones are counted."""
TRIES = 100
"""Samples of the same bucket, and of the others, that are tried in place of a damaged one."""


class Batches(Dataset[dict[str, Any]]):
    """Dataset of global batches: item t is one rank's share of batch t, as tensors.

    A sample that cannot be read is replaced by the next readable one of the rank's share (else the share by one of the
    bucket, else of another bucket), in every run alike, and named in the batch's `skipped`.
    """

    def __init__(self, shards: Shards, order: Order | FixedOrder, rank: int = 0, ranks: int = 1) -> None:
        self._shards, self._order, self._rank, self._ranks = shards, order, rank, ranks

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Batch with video [B,C,T,h,w], audio [B,A,Ca] (A=0 without audio), text list of [S,Ct], all fp32;
        caption, key: lists of str; index [B] int64, the position in the order of samples; skipped: list of
        str; and [B,...] of every further tensor of the samples, as stored.
        """
        numbers = self._order.batch(number)
        each = len(numbers) // self._ranks
        mine = numbers[self._rank * each : (self._rank + 1) * each].tolist()
        return self._collect(mine, number * self._order.batch_size + self._rank * each)

    def _collect(self, mine: Sequence[Any], first: int) -> dict[str, Any]:
        """The batch of the samples `mine`, as `_read` takes them; `first` is the position of the first one."""
        samples: list[tuple[str, Sample] | None] = []
        skipped = []
        for sample in mine:
            try:
                samples.append(self._read(sample))
            except SampleError as error:
                samples.append(None)
                skipped.append(str(error))
        if None in samples:
            samples = self._replaced(samples, mine[0])
        silent = torch.zeros(0, self._shards.index.contract["audio_channels"])
        batch = collate([s for s in samples if s is not None], range(first, first + len(mine)), silent)
        return {**batch, "skipped": skipped}

    def _replaced(self, samples: list[Any], near: Any) -> list[Any]:
        """Replace each None by the next sample of the list, cyclically."""
        if all(sample is None for sample in samples):
            samples = [self._readable(near), *samples[1:]]
        good = [(i, sample) for i, sample in enumerate(samples) if sample is not None]
        return [next((sample for i, sample in good if i >= gap), good[0][1]) for gap in range(len(samples))]

    def _read(self, number: Any) -> tuple[str, Sample]:
        return self._shards.index[number].key, self._shards.read(number)

    def _readable(self, near: Any) -> tuple[str, Sample]:
        """The first readable sample of the bucket after sample `near`, cyclically, else one of another bucket."""
        index = self._shards.index
        samples = self._order.samples  # a training sample is not replaced by one of validation
        is_same = index.rows["bucket"][samples] == index.rows["bucket"][near]
        same, others = samples[is_same], samples[~is_same]
        after = np.roll(same, -np.searchsorted(same, near, side="right"))[:TRIES]
        for number in (*after, *others[:: len(others) // TRIES + 1]):  # neighbours share a damaged shard
            try:
                return self._read(int(number))
            except SampleError:
                continue
        raise UserError(
            f"no sample in {self._shards.name} could be read in place of {index[near].key}; copy the shards again"
        )


def collate(samples: Sequence[tuple[str, Sample]], index: range, silent: torch.Tensor) -> dict[str, Any]:
    """Stack the samples of one bucket (see `Batches`); `silent` [0,Ca] stands for missing audio."""
    tensors = [sample.tensors for _, sample in samples]

    def stacked(name: str, values: list[torch.Tensor]) -> torch.Tensor:
        for (key, _), value in zip(samples, values, strict=True):
            if value.shape != values[0].shape:
                raise UserError(
                    f"samples {samples[0][0]} and {key} of one bucket hold {name} of the shapes {list(values[0].shape)} "
                    f"and {list(value.shape)}; prepare the shards again"
                )
        return torch.stack(values)

    batch: dict[str, Any] = {
        "video": stacked("video", [t["video"].float() for t in tensors]),
        "audio": stacked("audio", [t.get("audio", silent).float() for t in tensors]),
        "text": [t["text"].float() for t in tensors],
        "caption": [str(sample.meta.get("caption", "")) for _, sample in samples],
        "key": [key for key, _ in samples],
        "index": torch.tensor(list(index)),
    }
    for name in sorted(set(tensors[0]) - {"video", "audio", "text"}):
        without = [key for key, sample in samples if name not in sample.tensors]
        if without:
            raise UserError(
                f"sample {without[0]} has no {name}, {samples[0][0]} has; prepare both with the same settings"
            )
        batch[name] = stacked(name, [t[name] for t in tensors])
    return batch


class Loader:
    """Endless iterator over the batches of one rank, from a position on.

    It is not a DataLoader, so that Lightning inserts no sampler; and it has no length, so that Lightning has a single
    epoch: a checkpoint of an epoch's last batch would resume wrongly the second time, and every epoch's end would cut a
    gradient accumulation short.

    Args:
        position: number of the global batch that comes next, counted over all epochs.
    """

    def __init__(
        self,
        batches: Dataset[dict[str, Any]],
        workers: int,
        position: int = 0,
        check: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._batches, self._workers, self._check = batches, workers, check
        self.position = position

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._read(count(self.position))

    def _read(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        loader = DataLoader(
            _Packed(self._batches) if self._workers else self._batches,
            sampler=numbers,
            batch_size=None,
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
        )
        try:
            batches = iter(loader)  # starts the workers
            while (batch := next(batches, None)) is not None:
                if isinstance(batch, UserError):
                    raise batch
                if self._workers:
                    batch["text"] = list(batch["text"].split(batch.pop("text_lengths")))
                if self._check is not None:
                    self._check(batch)
                self.position += 1
                yield batch
        except (RuntimeError, OSError) as error:
            if not self._workers or str(error).startswith("Caught "):  # by a worker, in the dataset's code
                raise
            raise UserError(
                f"a process of data.module.num_workers={self._workers} failed ({str(error).strip().splitlines()[0]}); "
                "lower num_workers or batch_size, or raise the limits of memory, /dev/shm and open files (ulimit -n)"
            ) from error


class _Packed(Dataset[Any]):
    """Batches on their way from a worker: an error travels as a value, because the DataLoader would turn it into a
    traceback, and the texts as one tensor, because every tensor takes an open file."""

    def __init__(self, batches: Dataset[dict[str, Any]]) -> None:
        self._batches = batches

    def __getitem__(self, number: int) -> dict[str, Any] | UserError:
        try:
            batch = self._batches[number]
        except UserError as error:
            return error
        return {**batch, "text": torch.cat(batch["text"]), "text_lengths": [len(text) for text in batch["text"]]}


class _Resumable(LightningDataModule):
    """Base of the data modules: the position in an endless stream of global batches, kept over a resume."""

    num_workers = 0
    context_parallel = 1
    """Processes that train on the same samples; `magihuman.train` sets it to strategy.context_parallel."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self._position = 0  # global batches trained on
        self._loader: Loader | None = None

    def _batches(self, rank: int, ranks: int) -> Dataset[dict[str, Any]]:
        """One rank's share of every global batch."""
        raise NotImplementedError

    def _ranks(self) -> tuple[int, int]:
        """(this rank, number of ranks) by which samples are divided; processes of a context group have the same rank."""
        if self.trainer is None:
            return 0, 1
        rank, ranks = (n // self.context_parallel for n in (self.trainer.global_rank, self.trainer.world_size))
        if self.batch_size % ranks:
            raise UserError(
                f"batch_size={self.batch_size} is over all ranks and not divisible by {ranks}; "
                f"choose {-(-self.batch_size // ranks) * ranks}"
            )
        return rank, ranks

    def train_dataloader(self) -> Loader:
        self._loader = Loader(self._batches(*self._ranks()), self.num_workers, self._position, self._check)
        return self._loader

    def _check(self, batch: dict[str, Any]) -> None:
        """Look at a batch that was read."""

    def val_dataloader(self) -> Any:
        return []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count the batches trained on, not those read ahead."""
        if self.trainer is not None and self.trainer.training:
            self._position = int(batch["index"][0]) // self.batch_size + 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._position = state_dict["position"]
        if self._loader is not None:
            self._loader.position = self._position


class LatentDataModule(_Resumable):
    """Training and validation batches of latents (their contents: `Batches`).

        data = LatentDataModule("shards", batch_size=16)
        batch = next(iter(data.train_dataloader()))  # batch["video"]: [16,C,T,h,w]

    Args:
        shards: folder made by `python -m data.prepare`.
        batch_size: samples per step over all ranks together; the same samples on any number of ranks.
        val_fraction: share of the source files kept for validation, chosen by a hash of their name.
        seed: of the order.
        num_workers: processes per rank that read ahead; 0 reads in the training process, enough for small latents.
        codecs: own codec bundle (package.module:function) that the shards were made with; allows to import it.
        max_damaged_share: damaged samples are replaced and named; the training ends when they are more than this share of
            the samples that were read (of at least 100, so that one damaged sample ends no training).

    Attributes:
        skipped: the damaged samples that were found, and why.

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
        codecs: str | None = None,
        max_damaged_share: float = 0.01,
    ) -> None:
        super().__init__(batch_size)
        if batch_size < 1 or num_workers < 0 or not 0 <= val_fraction < 1 or not 0 <= max_damaged_share <= 1:
            raise UserError(
                f"batch_size={batch_size} should be at least 1, num_workers={num_workers} at least 0, "
                f"val_fraction={val_fraction} in [0, 1) and max_damaged_share={max_damaged_share} in [0, 1]"
            )
        self.num_workers, self.seed, self.max_damaged_share = num_workers, seed, max_damaged_share
        self.shards = shards
        self.reader = self._open(shards)
        if codecs not in (None, self.codecs):
            raise UserError(f"data.module.codecs={codecs}, but the shards were made with {self.codecs!r}")
        allow_codecs(codecs)
        self.skipped: set[str] = set()
        self._read = 0
        train, val = self._split(val_fraction)
        self.order = Order(self._by_bucket(train), batch_size, seed)
        self.train_samples, self.val_samples = len(train), len(val)
        self._val = self._by_bucket(val)

    def _open(self, shards: str) -> Shards:
        return Shards(shards)

    def _split(self, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
        return split(self.reader, val_fraction)

    def _by_bucket(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        index = self.reader.index
        buckets = index.rows["bucket"][numbers]
        return {index.buckets[bucket]: numbers[buckets == bucket] for bucket in np.unique(buckets)}

    def setup(self, stage: str) -> None:
        """Say what training cannot give its even share in every epoch."""
        small = {name: size for name, size in self.order.sizes.items() if size < self.batch_size}
        if small and (self.trainer is None or self.trainer.is_global_zero):
            named = [
                f"{name} ({size} clip{'s' * (size > 1)}, {size / self.train_samples:.2g} of the training, one batch in about "
                f"{-(-self.train_samples // size)})"
                for name, size in sorted(small.items(), key=lambda item: item[1])[:5]
            ]
            more = f" and {len(small) - 5} more" if len(small) > 5 else ""
            print(
                f"   note: {len(small)} of {len(self.order.sizes)} buckets hold fewer clips than "
                f"data.module.batch_size={self.batch_size}; their batches repeat clips and come as seldom as their share "
                f"of the samples asks: {', '.join(named)}{more}",
                flush=True,
            )

    def teardown(self, stage: str) -> None:
        """Say how many samples were lost."""
        if self.skipped:
            print(f"   note: {len(self.skipped)} damaged samples were replaced by others", flush=True)

    @property
    def codecs(self) -> str:
        """Name of the codecs that made the latents."""
        return self.reader.index.codecs

    @property
    def contract(self) -> Contract:
        """Contract of the latents."""
        return self.reader.contract

    @property
    def size(self) -> tuple[int, int, int]:
        """Pixel frames, height and width of most clips."""
        bucket = Bucket.parse(self.reader.index.buckets[self._usual_bucket])
        return bucket.frames, bucket.height, bucket.width

    @property
    def _usual_bucket(self) -> int:
        return int(np.bincount(self.reader.index.rows["bucket"][self.order.samples]).argmax())

    @property
    def _usual_samples(self) -> list[int]:
        """Training samples of the usual bucket."""
        samples = self.order.samples
        return samples[self.reader.index.rows["bucket"][samples] == self._usual_bucket].tolist()

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of all clips."""
        buckets = map(Bucket.parse, self.reader.index.buckets)
        return sorted({(bucket.height, bucket.width) for bucket in buckets})

    @property
    def sr_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels at which most clips are stored too (`data.prepare` with sr_sizes), or None."""
        for number in self._usual_samples:
            try:
                large = self.reader.read(number).tensors.get(LARGE)
            except SampleError:  # training skips it too
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

    def _batches(self, rank: int, ranks: int) -> Batches:
        return Batches(self.reader, self.order, rank, ranks)

    def val_dataloader(self) -> Loader | list[Any]:
        if not self.val_samples:
            return []
        rank, ranks = self._ranks()
        order = FixedOrder(self._val, self.batch_size, ranks)
        return _Repeated(
            Batches(self.reader, order, rank, ranks), self.num_workers, order.batches_per_epoch, self._check
        )

    def _check(self, batch: dict[str, Any]) -> None:
        """Name the damaged samples of a batch; raises UserError when they are too many."""
        self._read += len(batch["key"])
        new = [reason for reason in dict.fromkeys(batch["skipped"]) if reason not in self.skipped]
        for number, reason in enumerate(new, len(self.skipped)):
            if number < NAMED:
                print(f"   note: a damaged sample is replaced by another: {reason}", flush=True)
            elif number == NAMED:
                print("   note: further damaged samples are only counted", flush=True)
        self.skipped.update(new)
        read = min(self._read, self.train_samples)
        if len(self.skipped) > self._allowed_losses(read):
            some = "; ".join(sorted(self.skipped)[:3])
            raise UserError(
                f"{len(self.skipped)} of {read} samples are damaged, more than data.module.max_damaged_share="
                f"{self.max_damaged_share:g} allows ({some}); copy the shards again or prepare them anew"
            )

    def _allowed_losses(self, read: int) -> float:
        """Damaged samples that are tolerated among `read` samples."""
        return self.max_damaged_share * max(100, read)

    def _identity(self) -> dict[str, Any]:
        keys = hashlib.sha256(self.reader.index.keys[:-1].data).hexdigest()[:16]
        return {"seed": self.seed, "batch_size": self.batch_size, "samples": self.train_samples, "keys": keys}

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream of samples, and what it refers to."""
        return {"position": self._position * self.batch_size, "order": ORDER, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at a saved position, on any number of ranks.

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
                f"cannot resume in the middle of other data ({'; '.join(differing)}); restore the data "
                "settings, or start a new run from the checkpoint's weights with init="
            )
        if state_dict.get("order") != ORDER and any(size % self.batch_size for size in self.order.sizes.values()):
            print("   note: the checkpoint is of an earlier version; its epoch continues in the new order", flush=True)
        super().load_state_dict({"position": state_dict["position"] // self.batch_size})


class _Repeated(Loader):
    """The first `length` batches, the same ones in every pass."""

    def __init__(self, batches: Batches, workers: int, length: int, check: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(batches, workers, check=check)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._read(range(self._length))


def split(shards: Shards, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) sample numbers, int64 each; all clips of a source file fall on one side.

    The side depends on the file's key alone, so it stays when files are added. Of two files or more at least one is
    for validation unless `val_fraction` is 0.

    Raises:
        UserError: nothing is left to train on.
    """
    sources = shards.index.rows["source"]  # hashes of the source files' keys: even numbers from 0 to 2^64
    validation = sources.astype(np.float64) / 2**64 < val_fraction
    if val_fraction and not validation.any() and (sources != sources[0]).any():
        validation = sources == sources.min()
    if validation.all():
        files = len(np.unique(sources))
        raise UserError(f"val_fraction={val_fraction} leaves none of {files} files to train on; lower it")
    return np.flatnonzero(~validation), np.flatnonzero(validation)


class PromptDataModule(_Resumable):
    """Training batches of text features with zero latents of a clip's shape (`real` is false).

        data = PromptDataModule("prompts.txt", batch_size=16)

    Args:
        file: text file with one prompt per line, or a table as `infer prompts=` takes.
        codecs: name of the codecs and the text encoder.
        frames, height, width: of a clip, in pixels.
        batch_size: samples per step over all ranks together.
        seed: of the order.

    Attributes:
        has_clips: false: recipes that train on clips refuse it (`magihuman.config`).

    Raises:
        UserError: no prompts, one longer than `MAX_CHARACTERS`, or a batch size below 1.
    """

    has_clips = False

    def __init__(
        self,
        file: str,
        codecs: str = "scene",
        frames: int = 37,
        height: int = 64,
        width: int = 64,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size)
        self.prompts = []
        for row in prompt_rows(file, f"data.module.file={file}"):
            try:
                prompt = row.text(("prompt", *CAPTION_COLUMNS))
            except ValueError as error:
                raise UserError(f"data.module.file={file} {row.where} {error}") from None
            if row.problem or not prompt:
                raise UserError(f"data.module.file={file} {row.where} {row.problem or 'has no prompt'}")
            if len(prompt) > MAX_CHARACTERS:
                raise UserError(
                    f"data.module.file={file} {row.where}: the prompt has {len(prompt)} characters, and "
                    f"{MAX_CHARACTERS} is the most; shorten it"
                )
            self.prompts.append(prompt)
        if not self.prompts or batch_size < 1:
            raise UserError(
                f"data.module.file={file} holds {len(self.prompts)} prompts and batch_size is {batch_size}; "
                "give at least one prompt, one per line, and one sample"
            )
        self.codecs, self.size = codecs, (frames, height, width)
        self.seed = seed
        allow_codecs(codecs)
        self.bundle = load_bundle(codecs)
        self.null_text = self.bundle.text_encoder.encode([""])[0]
        time, *space = self.contract.video_stride
        self.video_shape = (
            self.contract.video_channels,
            (frames - 1) // time + 1,
            height // space[0],
            width // space[1],
        )
        self.audio_shape = (frames, self.contract.audio_channels)

    @property
    def contract(self) -> Contract:
        """Latent contract of the codecs."""
        return self.bundle.contract

    def _batches(self, rank: int, ranks: int) -> "_PromptBatches":
        return _PromptBatches(self, rank, ranks)


class _PromptBatches(Dataset[dict[str, Any]]):
    def __init__(self, module: PromptDataModule, rank: int, ranks: int) -> None:
        self._module, self._rank, self._ranks = module, rank, ranks
        self._order: tuple[int, torch.Tensor] | None = None  # epoch and its order

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Batch `number`: a pure function of the seed; every epoch has its own random order."""
        module = self._module
        size = module.batch_size
        positions = range(number * size + self._rank, (number + 1) * size, self._ranks)
        captions = [module.prompts[self._prompt(position)] for position in positions]
        return {
            "text": module.bundle.text_encoder.encode(captions),
            "video": torch.zeros(len(captions), *module.video_shape),
            "audio": torch.zeros(len(captions), *module.audio_shape),
            "caption": captions,
            "index": torch.tensor(list(positions)),
            "real": False,
        }

    def _prompt(self, position: int) -> int:
        epoch, within = divmod(position, len(self._module.prompts))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._module.seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self._module.prompts), generator=generator)
        return int(self._order[1][within])
