"""Tensor files read and written in blocks, so that memory does not grow with the checkpoint.

Reads safetensors, also compressed (.zst), and pickled state dicts (with `weights_only=True`, so that no code in them can
run). Writes safetensors with the tensors in any order.
"""

import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from magihuman.errors import UserError
from magihuman.io.export import read_header
from magihuman.io.released_files import read_state
from magihuman.io.weight_checks import check_checksums

BLOCK_BYTES = 16 << 20
"""Largest block that is kept in memory."""

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_RATIO = 100  # of a compressed file; random weights in fp32 that are bf16 in truth shrink about threefold

PICKLES = (".ckpt", ".pth", ".pt", ".bin")
WRAPPERS = ("ema_state_dict", "state_dict")
"""Keys under which training programs keep the weights (turbo_vae: SPEC 8.4), best first."""

# In the order in which safetensors sorts tensors, from the end of a file to its start.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {name: rank for rank, name in enumerate(DTYPES)}


@dataclass(frozen=True)
class Spec:
    """Shape of a tensor and its type under safetensors' name, such as "BF16"."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in a file."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def read_specs(path: Path) -> dict[str, Spec]:
    """Shapes and types of a file's tensors, from its header where it has one.

    Raises:
        UserError: unreadable, truncated, of another kind, or with tensors of an unknown type.
    """
    if path.suffix == ".zst":
        specs = {
            name: Spec(tuple(entry["shape"]), str(entry["dtype"]))
            for name, entry in _compressed_header(path)[0].items()
            if name != "__metadata__"
        }
    elif path.suffix in PICKLES:
        specs = {name: Spec(tuple(t.shape), _dtype_name(t, path)) for name, t in read_pickle(path).items()}
    else:
        specs = {name: Spec(shape, dtype) for name, (shape, dtype) in read_header(path).items()}
    for name, spec in specs.items():
        if spec.dtype not in DTYPES:
            raise UserError(f"{path}: {name} is of type {spec.dtype}, which is not read here")
    return specs


@contextmanager
def open_tensors(path: Path, scratch: Path) -> "Iterator[SafetensorsReader | PickleReader]":
    """Open a tensor file; the reader has `.specs` and `.blocks(name)`. A compressed file is unpacked to `scratch`.

    Raises:
        UserError: unreadable, truncated, changed since it was written, or of another kind.
    """
    if path.suffix in PICKLES:
        yield PickleReader(path)
        return
    check_checksums([path])
    unpacked = _unpack(path, scratch) if path.suffix == ".zst" else path
    try:
        with SafetensorsReader(unpacked, path) as reader:
            yield reader
    finally:
        if unpacked is not path:
            unpacked.unlink(missing_ok=True)


class SafetensorsReader:
    """Reader of a safetensors file without a memory map, whose pages would count as memory of the process.

    Args:
        label: name of the file in messages.
    """

    def __init__(self, path: Path, label: Path) -> None:
        self.label = label
        try:
            header = read_header(path)
        except UserError:
            if path == label:
                raise
            raise UserError(f"{label} is not a complete safetensors file when unpacked; fetch it again") from None
        self.specs = {name: Spec(shape, dtype) for name, (shape, dtype) in header.items()}
        self.file = path.open("rb")
        (length,) = struct.unpack("<Q", self.file.read(8))
        entries = json.loads(self.file.read(length))
        self.starts = {name: 8 + length + entries[name]["data_offsets"][0] for name in self.specs}

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor as flat blocks [n] of its own type, at most BLOCK_BYTES each."""
        dtype, left = DTYPES[self.specs[name].dtype], self.specs[name].nbytes
        self.file.seek(self.starts[name])
        while left:
            data = bytearray(self.file.read(min(left, BLOCK_BYTES)))
            if not data:
                raise UserError(f"{self.label} ends within {name}; fetch it again")
            left -= len(data)
            yield torch.frombuffer(data, dtype=dtype)


class PickleReader:
    """Tensors of a pickled state dict; mapped into memory where its format allows."""

    def __init__(self, path: Path) -> None:
        self.state = read_pickle(path)
        self.specs = {name: Spec(tuple(t.shape), _dtype_name(t, path)) for name, t in self.state.items()}

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor as flat blocks [n] of its own type, at most BLOCK_BYTES each."""
        flat = self.state[name].detach().reshape(-1)
        yield from flat.split(BLOCK_BYTES // max(1, flat.element_size())) if len(flat) else ()


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a pickle: the dictionary itself, or the one under one of WRAPPERS, without "module.".

    Raises:
        UserError: it holds anything that would have to be executed, or is damaged, or holds no tensors.
    """
    state = read_state(path, wrappers=WRAPPERS)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


class SafetensorsWriter:
    """Writer of a safetensors file in any order of tensors, with the bytes that `save_file` writes.

    Raises:
        OSError: for example a full disk; the caller removes the file.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.spans: dict[str, tuple[int, int]] = {}
        end = 0
        for name in sorted(specs, key=lambda n: (-_RANK[specs[n].dtype], n)):
            start, end = end, end + specs[name].nbytes
            header[name] = {"dtype": specs[name].dtype, "shape": list(specs[name].shape), "data_offsets": [start, end]}
            self.spans[name] = (start, end)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.specs = specs
        self.offset = 8 + len(text)
        self.waiting = set(specs)
        self.file: BinaryIO = path.open("wb")
        self.file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, blocks: Iterator[Tensor]) -> None:
        """Store a tensor given as flat blocks, converted to its type in the file."""
        start, end = self.spans[name]
        self.file.seek(self.offset + start)
        for block in blocks:
            data = block.to(DTYPES[self.specs[name].dtype]).contiguous().view(torch.uint8).numpy()
            self.file.write(data.data)
        if self.file.tell() != self.offset + end:
            raise RuntimeError(f"{name}: {self.file.tell() - self.offset - start} bytes, not {end - start}")
        self.waiting.discard(name)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Flush the file to the disk, unless there was an error."""
        try:
            if kind is None and self.waiting:
                raise RuntimeError(f"{len(self.waiting)} tensors were not written, for example {min(self.waiting)}")
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
        finally:
            # After a failed write closing fails too; the first error is the one to show.
            with suppress(OSError) if kind else nullcontext():
                self.file.close()


def _dtype_name(tensor: Tensor, path: Path) -> str:
    if tensor.dtype not in _NAMES:
        raise UserError(f"{path} holds tensors of type {tensor.dtype}, which safetensors has not")
    return _NAMES[tensor.dtype]


@contextmanager
def _decompressed(path: Path) -> Iterator[BinaryIO]:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path} is compressed, which needs a package more: pip install zstandard") from None
    try:
        with path.open("rb") as packed, zstandard.ZstdDecompressor().stream_reader(packed) as stream:
            yield stream
    except zstandard.ZstdError as error:
        raise UserError(f"{path} is damaged ({error}); fetch it again") from None


def _compressed_header(path: Path) -> tuple[dict[str, dict], int]:
    """The header of a compressed file, and the bytes of the whole file when unpacked.

    Raises:
        UserError: damaged, or packed more tightly than weights can be.
    """
    with _decompressed(path) as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        if length > MAX_HEADER_BYTES:
            raise UserError(f"{path} is not a safetensors file; fetch it again")
        try:
            header = json.loads(stream.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise UserError(f"{path} is not a safetensors file, or is truncated; fetch it again") from None
    total = 8 + length + max(ends, default=0)
    packed = path.stat().st_size
    if total > MAX_RATIO * packed + BLOCK_BYTES:
        raise UserError(
            f"{path} claims {total / 1e9:.1f} GB in {packed} bytes, which weights never are; fetch it again"
        )
    return header, total


def _unpack(path: Path, scratch: Path) -> Path:
    """Unpack a compressed file into `scratch`, as many bytes as its header states.

    Raises:
        UserError: damaged, holding more than that, or without room for it.
    """
    target, (_, left) = scratch / path.stem, _compressed_header(path)
    if left > (free := shutil.disk_usage(scratch).free):
        raise UserError(
            f"{path} needs {left / 1e9:.1f} GB in {scratch} to be unpacked, which has {free / 1e9:.1f}; make room"
        )
    with _decompressed(path) as stream, target.open("wb") as file:
        while block := stream.read(BLOCK_BYTES):
            left -= len(block)
            if left < 0:
                target.unlink()
                raise UserError(f"{path} holds more than its header states; fetch it again")
            file.write(block)
    return target
