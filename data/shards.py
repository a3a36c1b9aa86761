"""Shards of latents: webdataset tar files with an index for random access to every sample.

A sample is two members of a tar: `KEY.safetensors` (video fp16 [C,T,h,w]; audio fp16 [A,Ca], absent without audio; text
fp16 [S,Ct]; optionally video_sr, the same clip at the second stage's size, and frames uint8 [3,F,H,W]; further tensors
are allowed) and `KEY.json` (caption, source, fps, seconds, width, height, bucket, has_audio, start). Any webdataset
reader can read them; `index.json` adds the offset, length and checksum of each sample, and the latents' contract.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magihuman.errors import UserError
from magihuman.io.files import atomic_path, write_atomically

if TYPE_CHECKING:  # torch takes a second to import and the parent process of data.prepare does not need it
    import torch

    from magihuman.models.config import Contract

FORMAT = "magihuman-shards/1"
INDEX = "index.json"
NULL_TEXT = "null_text.safetensors"
LARGE = "video_sr"  # latents at the second stage's size


@dataclass(frozen=True, order=True)
class Bucket:
    """Clips of one length in frames, size in pixels, with or without audio: a batch of them is one dense tensor.

    str(Bucket(25, 64, 64, True)) == "25x64x64+a"
    """

    frames: int
    height: int
    width: int
    audio: bool

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}{'+a' if self.audio else ''}"

    @classmethod
    def parse(cls, name: str) -> Bucket:
        frames, height, width = name.removesuffix("+a").split("x")
        return cls(int(frames), int(height), int(width), name.endswith("+a"))


@dataclass(frozen=True)
class Entry:
    """Location of a sample: `bytes` at `offset` of its shard (whole tar members), with their CRC-32."""

    key: str
    offset: int
    bytes: int
    bucket: str
    crc: int | None = None


@dataclass(frozen=True)
class Sample:
    """Tensors by name as stored (fp16 or integers), and metadata."""

    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]


class SampleError(Exception):
    """A sample that cannot be read; the message is the reason."""


def source_of(key: str) -> str:
    """The part of a key that all clips of one file share."""
    return key.rpartition("_")[0] or key


class ShardWriter:
    """Writer of one shard through webdataset's TarWriter, with fixed times and owners for reproducible bytes.

        with ShardWriter(folder / "shard-000000.tar") as writer:
            writer.add("clip-0000", "25x64x64+a", {"video": video, "text": text}, {"caption": "a face"})

    The file appears under its name at the end of the block, if it has a sample. `entries` is complete after the block.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self._stack = ExitStack()

    def __enter__(self) -> ShardWriter:
        return self

    def add(self, key: str, bucket: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Append one sample; floating tensors are stored as fp16."""
        from safetensors.torch import save
        from webdataset.writer import TarWriter

        if not self.entries:
            partial = self._stack.enter_context(atomic_path(self.path, sync=True))
            self._file = self._stack.enter_context(partial.open("w+b"))
            writer = TarWriter(self._file, user="", group="", mode=0o644, mtime=0, encoder=False)
            self._tar = self._stack.enter_context(writer)
        stored = {name: _half(value) for name, value in tensors.items()}
        start = self._tar.tarstream.offset
        # Two calls, because one would sort the members: shards have the tensors first.
        self._tar.write({"__key__": key, "safetensors": save(stored)})
        self._tar.write({"__key__": key, "json": json.dumps(dict(meta), sort_keys=True).encode()})
        self.entries.append(Entry(key, start, self._tar.tarstream.offset - start, bucket))

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and self.entries:
            self._tar.close()
            self.entries = [replace(entry, crc=self._checksum(entry)) for entry in self.entries]
            end = self.entries[-1].offset + self.entries[-1].bytes
            self._file.truncate(end + 2 * tarfile.BLOCKSIZE)  # without tarfile's padding to 10 KiB
        self._stack.__exit__(*error)

    def _checksum(self, entry: Entry) -> int:
        self._file.seek(entry.offset)
        return zlib.crc32(self._file.read(entry.bytes))


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.half() if tensor.is_floating_point() else tensor).contiguous()


# ----------------------------------------------------------------------------------------------------- index


@dataclass
class Index:
    """Content of index.json.

    Attributes:
        codecs, contract: name of the codecs and their latent contract (`Contract.to_dict`).
        shards: (file name, samples) in order.
        fingerprint: of the source files and settings.
    """

    codecs: str
    contract: dict[str, Any]
    shards: list[tuple[str, list[Entry]]]
    fingerprint: str = ""

    def save(self, folder: Path) -> None:
        content = {
            "format": FORMAT,
            "world": self.codecs,
            "contract": self.contract,
            "null_text": NULL_TEXT,
            "fingerprint": self.fingerprint,
            "shards": [
                {"name": name, "samples": [asdict(entry) for entry in entries]} for name, entries in self.shards
            ],
        }
        write_atomically(folder / INDEX, json.dumps(content), sync=True)

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Read index.json.

        Raises:
            UserError: it is missing or cannot be read.
        """
        path = folder / INDEX
        if not path.exists():
            remedy = f"make shards with `python -m data.prepare input=VIDEOS output={folder}`"
            if any(folder.glob("*.tar")):
                remedy = "copy it from where the tars were made, or prepare them again"
            raise UserError(f"shards={folder} holds no {INDEX}; {remedy}")
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT:
                raise UserError(f"{path} has the format {content['format']!r}, not {FORMAT!r}; prepare the data again")
            shards = [(s["name"], [Entry(**entry) for entry in s["samples"]]) for s in content["shards"]]
            return cls(content["world"], content["contract"], shards, content.get("fingerprint", ""))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read ({type(error).__name__}: {error}); copy it again, or prepare the shards again"
            ) from error


# --------------------------------------------------------------------------------------------------- reading


class Shards:
    """Random access to the samples of a folder of shards.

        sample = Shards("shards").read(0)  # sample.tensors["video"], sample.meta["caption"]

    Raises:
        UserError: no shards, or a shard that is missing, cut off or unreadable.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = Index.load(self.folder)
        self.entries: list[Entry] = []
        self._shard_of: list[int] = []
        for number, (name, entries) in enumerate(self.index.shards):
            self._check(self.folder / name, entries)
            self.entries += entries
            self._shard_of += [number] * len(entries)
        if not self.entries:
            raise UserError(f"the shards in {self.folder} hold no sample; see report.md there")
        self._files: dict[tuple[int, int], int] = {}

    @staticmethod
    def _check(path: Path, entries: list[Entry]) -> None:
        remedy = "copy it again, or run data.prepare with the same settings into an empty folder"
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"shard {path} is missing or unreadable ({error.strerror}); {remedy}") from error
        if not os.access(path, os.R_OK):
            raise UserError(f"shard {path} is not readable for you; change its permissions")
        needed = max((entry.offset + entry.bytes for entry in entries), default=0)
        if size < needed:
            raise UserError(f"shard {path} is cut off ({size} of {needed} bytes); {remedy}")

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def _file(self, shard: int) -> int:
        """File descriptor of this process; forked workers open their own."""
        key = (os.getpid(), shard)
        if key not in self._files:
            self._files[key] = os.open(self.folder / self.index.shards[shard][0], os.O_RDONLY)
        return self._files[key]

    def read(self, number: int) -> Sample:
        """Sample `number` in index order.

        Raises:
            SampleError: its bytes are damaged.
        """
        from safetensors.torch import load

        entry = self.entries[number]
        try:
            data = os.pread(self._file(self._shard_of[number]), entry.bytes, entry.offset)
            if entry.crc is not None and zlib.crc32(data) != entry.crc:
                raise SampleError(f"{entry.key}: checksum differs")
            members = _members(data)
            meta = json.loads(members["json"])
            tensors = load(members["safetensors"])
        except SampleError:
            raise
        except Exception as error:
            raise SampleError(f"{entry.key}: {type(error).__name__}: {error}") from error
        if "video" not in tensors or "text" not in tensors:
            raise SampleError(f"{entry.key}: holds {sorted(tensors)}, not video and text")
        return Sample(tensors, meta)

    @property
    def contract(self) -> Contract:
        """Contract of the latents."""
        from magihuman.models.config import Contract

        return Contract.from_dict(self.index.contract)

    def null_text(self) -> torch.Tensor | None:
        """[S,Ct] fp32 features of the empty prompt, None where the folder has none."""
        from safetensors.torch import load_file

        path = self.folder / NULL_TEXT
        return load_file(path)["text"].float() if path.exists() else None


def _members(data: bytes) -> dict[str, bytes]:
    """Extension -> content of the members of one sample."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {m.name.split(".", 1)[1]: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
