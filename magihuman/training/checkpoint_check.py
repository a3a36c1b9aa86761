"""Checks of a checkpoint before it is read: damage is found, and nothing in it is executed.

| layout | files | read by |
|---|---|---|
| file | one archive of `torch.save` | Lightning, with `weights_only=True` |
| sharded folder (fsdp2) | `.metadata` (a pickle), `*.distcp` (an archive per entry), `meta.pt` | torch.distributed.checkpoint |
| DeepSpeed folder (zero2, zero3) | `latest` (name of a folder), in it an archive per process and network | DeepSpeed |

The libraries that read the folders unpickle without limits, so every pickle is first compared with the classes that
these checkpoints consist of. Archives are zip files with a CRC-32 of every tensor, which torch writes and does not
compare when it reads; `check_data` does. It reads every byte once, and the processes share the work. Bytes
between the tensors (zip headers, padding) carry no data and are not compared.
"""

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from magihuman.errors import UserError
from magihuman.io.files import write_atomically

METADATA = ".metadata"
METADATA_CRC = ".metadata.crc32"
"""CRC-32 of `.metadata` in hexadecimal, written by `write_metadata_checksum`; checkpoints of earlier versions have none."""
LATEST = "latest"
OPTIMIZER_FILES = "*zero_pp_rank_*_mp_rank_00_optim_states.pt"
"""DeepSpeed's file of every process."""

PLAIN = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}  # fmt: skip
"""Classes in `.metadata`, in addition to torch's dtypes."""

DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
"""Classes in DeepSpeed's archives, in addition to those that torch accepts with `weights_only=True`."""

ADAM8BIT = "torchao.optim.subclass_8bit.OptimState8bit"
"""Class of a moment of `optim=adamw8bit`, which torch accepts once torchao is imported."""

_BROKEN = (
    zipfile.BadZipFile, pickle.UnpicklingError, zlib.error, struct.error, EOFError, RuntimeError, NotImplementedError,
    ValueError, LookupError, TypeError, AttributeError, OverflowError,
)  # fmt: skip


class DamagedError(Exception):
    """A checkpoint that is incomplete or whose bytes have changed; the text says which file, and how."""


def write_metadata_checksum(folder: Path) -> None:
    """Write the checksum of a sharded checkpoint's `.metadata`, the one file of a checkpoint without any."""
    if (folder / METADATA).is_file():
        write_atomically(folder / METADATA_CRC, f"{zlib.crc32((folder / METADATA).read_bytes()):08x}\n")


def check(checkpoint: Path) -> None:
    """Check that a checkpoint is complete, and that its pickles hold data only; of one file also as `check_data` does.

    Raises:
        DamagedError: it is incomplete or damaged.
        UserError: it holds something that would be executed.
    """
    archives = list(_archives(checkpoint))
    if checkpoint.is_file():
        check_data(checkpoint)
    also = {ADAM8BIT, *(DEEPSPEED if (checkpoint / LATEST).is_file() else ())}
    for archive in archives:
        if not archive.is_tensor:
            archive.check_pickle(also)


def check_data(checkpoint: Path, rank: int = 0, processes: int = 1) -> None:
    """Compare the checksums of a checkpoint's tensors.

    Args:
        rank, processes: this process checks every `processes`-th archive from the `rank`-th on.

    Raises:
        DamagedError: a checksum differs, or `check` would raise it.
    """
    for archive in list(_archives(checkpoint))[rank::processes]:
        archive.check_data()


def zero_processes(checkpoint: Path) -> int | None:
    """Number of processes that wrote a DeepSpeed checkpoint; None for other checkpoints."""
    return len(list(_tag(checkpoint).glob(OPTIMIZER_FILES))) if (checkpoint / LATEST).is_file() else None


@dataclass(frozen=True)
class _Archive:
    """What one call of `torch.save` wrote: a file, or `length` bytes of it from `offset` on."""

    name: str
    file: Path
    offset: int = 0
    length: int | None = None
    is_tensor: bool = False

    @contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], zipfile.ZipFile]]:
        """The bytes and the zip file in them.

        Raises:
            DamagedError: here, or in the block for an error of a damaged file.
            UserError: the machine cannot read it, for another reason than damage.
        """
        try:
            with self.file.open("rb") as stream:
                if not self.file.stat().st_size:
                    raise DamagedError(f"{self.file.name} is empty")
                part: IO[bytes] = stream
                if self.length is not None:
                    stream.seek(self.offset)
                    part = io.BytesIO(stream.read(self.length))
                opened = zipfile.ZipFile(part)
                # As torch writes it, so that nothing is larger than its file.
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in opened.infolist()):
                    raise DamagedError(f"{self.name} is damaged: an entry is compressed")
                yield part, opened
        except FileNotFoundError as error:
            raise DamagedError(f"{self.name} is missing") from error
        except OSError as error:
            raise _unreadable(self.file, error) from error
        except _BROKEN as error:
            raise DamagedError(f"{self.name}: {_reason(error)}") from error

    def check_data(self) -> None:
        with self._open() as (_, opened):
            if wrong := opened.testzip():
                raise DamagedError(f"{self.name} is damaged: the checksum of {wrong} differs")

    def check_pickle(self, also: Collection[str]) -> None:
        with self._open() as (stream, opened):
            for entry in opened.namelist():
                if entry.endswith("/data.pkl"):
                    opened.read(entry)  # compares its checksum
            stream.seek(0)
            try:
                unknown = set(torch.serialization.get_unsafe_globals_in_checkpoint(stream)) - set(also)
            except pickle.UnpicklingError as error:
                raise _executes(f"an instruction that no checkpoint has ({error})") from error
        if unknown:
            raise _executes(min(unknown))


def _archives(checkpoint: Path) -> Iterator[_Archive]:
    """The archives of a checkpoint, after checking that all are there."""
    if not checkpoint.is_dir():
        yield _Archive(checkpoint.name, checkpoint)
    elif (checkpoint / METADATA).is_file():
        metadata = _read_metadata(checkpoint)
        for index, place in sorted(metadata.storage_data.items(), key=lambda i: (i[1].relative_path, i[1].offset)):
            file = checkpoint / place.relative_path
            if not file.is_file():
                raise DamagedError(f"{file.name} is missing")
            if file.stat().st_size < place.offset + place.length:
                raise DamagedError(f"{file.name} is cut short")
            kind = metadata.state_dict_metadata.get(index.fqn)
            is_tensor = type(kind).__name__ == "TensorStorageMetadata"
            yield _Archive(f"{file.name} ({index.fqn})", file, place.offset, place.length, is_tensor)
        yield _Archive("meta.pt", checkpoint / "meta.pt")
    elif (checkpoint / LATEST).is_file():
        folder = _tag(checkpoint)
        files = sorted(folder.rglob("*.pt"))
        ranks = sorted(
            int(f.name.partition("zero_pp_rank_")[2].partition("_")[0]) for f in folder.glob(OPTIMIZER_FILES)
        )
        if not ranks or ranks != list(range(len(ranks))) or len(files) == len(ranks):
            raise DamagedError(f"{folder.name} is incomplete: it has files of the processes {ranks}")
        yield from (_Archive(file.name, file) for file in files)
    else:
        raise DamagedError(f"it has neither {METADATA} nor {LATEST}")


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file} cannot be read ({error.strerror or error}); nothing is changed, give the command again")


def _executes(what: str) -> UserError:
    return UserError(
        f"the checkpoint holds {what}, which is not data of a training: reading it could run code, and nothing of it "
        "was run; take a checkpoint from a source that you trust"
    )


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PLAIN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise _executes(f"{module}.{name}")


def _read_metadata(checkpoint: Path) -> Any:
    """`.metadata` of a sharded checkpoint: entries and where they stand."""
    seal_file = checkpoint / METADATA_CRC
    try:
        data = (checkpoint / METADATA).read_bytes()
    except OSError as error:
        raise _unreadable(checkpoint / METADATA, error) from error
    if seal_file.is_file() and seal_file.read_bytes().strip() != f"{zlib.crc32(data):08x}".encode():
        raise DamagedError(f"the checksum of {METADATA} differs")
    try:
        metadata = _Unpickler(io.BytesIO(data)).load()
        for index, place in metadata.storage_data.items():
            if Path(place.relative_path).name != place.relative_path or min(place.offset, place.length) < 0:
                raise UserError(f"{METADATA} names a file outside of the checkpoint: {place.relative_path!r}")
            if not isinstance(index.fqn, str):
                raise TypeError("an entry without a name")
    except _BROKEN as error:
        raise DamagedError(f"{METADATA} is damaged ({_reason(error)})") from error
    return metadata


def _tag(checkpoint: Path) -> Path:
    """The folder that `latest` names."""
    try:
        name = (checkpoint / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise _unreadable(checkpoint / LATEST, error) from error
    if Path(name).name != name or not (checkpoint / name).is_dir():
        raise DamagedError(f"{LATEST} names the folder {name[:80]!r}, which is not in the checkpoint")
    return checkpoint / name


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
