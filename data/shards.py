"""Shards on disk: webdataset tar files of latents, with an index that makes every sample reachable at random.

A sample is two members of a tar: `KEY.safetensors` (video fp16 [C,T,h,w]; audio fp16 [A,Ca], absent without
sound; text fp16 [S,Ct]; where they are prepared, video_sr, the same clip at the second stage's size, and frames
uint8 [3,F,H,W]; further tensors are allowed) and `KEY.json` (caption, source, fps, seconds, width, height, bucket,
has_audio, start). Any webdataset reader can read them; `index.json` only adds where each sample begins, its length
and checksum. A folder of tars without an index is scanned.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magihuman.errors import UserError

if TYPE_CHECKING:  # torch takes a second to import and the parent process of data.prepare does not need it
    import torch

    from magihuman.models.latent_contract import Contract

FORMAT = "magihuman-shards/1"
INDEX = "index.json"
NULL_TEXT = "null_text.safetensors"
LARGE = "video_sr"  # name of a clip's latents at the second stage's size


@dataclass(frozen=True)
class Entry:
    """Where a sample lies: `bytes` at `offset` of its shard (whole tar members), with their CRC-32."""

    key: str
    offset: int
    bytes: int
    bucket: str
    crc: int | None = None


@dataclass(frozen=True)
class Sample:
    """Tensors by name as stored (fp16), and the metadata."""

    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]


class SampleError(Exception):
    """A sample that cannot be read; the message says why."""


def write_atomically(path: Path, data: bytes) -> None:
    """`path` holds `data` or what it held before, whenever the process or the machine stops."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class ShardWriter:
    """A tar that appears under its name when it is complete, with bytes that depend on the samples alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._file = open(self._partial, "wb")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> ShardWriter:
        return self

    def add(
        self, key: str, bucket: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]
    ) -> None:
        """Append one sample; floating tensors are stored as fp16."""
        from safetensors.torch import save

        stored = {name: _half(value) for name, value in tensors.items()}
        text = json.dumps(dict(meta), sort_keys=True).encode()
        data = _member(f"{key}.safetensors", save(stored)) + _member(f"{key}.json", text)
        self.entries.append(Entry(key, self._file.tell(), len(data), bucket, zlib.crc32(data)))
        self._file.write(data)

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None and self.entries:
                self._file.write(bytes(2 * tarfile.BLOCKSIZE))  # end of archive
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None and self.entries:
                os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.half() if tensor.is_floating_point() else tensor).contiguous()


def _member(name: str, data: bytes) -> bytes:
    """A tar member without owner or time, so that equal samples give equal bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


# ----------------------------------------------------------------------------------------------------- index


@dataclass
class Index:
    """Contents of index.json.

    Attributes:
        world, contract: what the latents were made with (`Contract.to_dict`); None for tars without an index.
        shards: (file name, its samples) in order.
        fingerprint: of the files and settings the shards were made from.
    """

    world: str
    contract: dict[str, Any] | None
    shards: list[tuple[str, list[Entry]]]
    fingerprint: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        content = {
            "format": FORMAT,
            "world": self.world,
            "contract": self.contract,
            "null_text": NULL_TEXT,
            "fingerprint": self.fingerprint,
            "shards": [
                {"name": name, "samples": [asdict(entry) for entry in entries]}
                for name, entries in self.shards
            ],
        }
        write_atomically(folder / INDEX, json.dumps(content).encode())

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Read index.json, or scan the tars where there is none.

        Raises:
            UserError: no shards there, or an index that cannot be read.
        """
        path = folder / INDEX
        if not path.exists():
            return cls._scan(folder)
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT:
                raise UserError(
                    f"{path} has the format {content['format']!r}, not {FORMAT!r}; prepare the data again"
                )
            shards = [(s["name"], [Entry(**entry) for entry in s["samples"]]) for s in content["shards"]]
            return cls(content["world"], content["contract"], shards, content.get("fingerprint", ""))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read ({type(error).__name__}: {error}); copy it again, or delete it "
                "to have the shards scanned"
            ) from error

    @classmethod
    def _scan(cls, folder: Path) -> Index:
        tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
        if not tars:
            raise UserError(
                f"shards={folder} holds no {INDEX} and no .tar; make them with "
                f"`python -m data.prepare input=VIDEOS output={folder}`"
            )
        return cls("", None, [(tar.name, list(_scan_tar(tar))) for tar in tars])


def _scan_tar(path: Path) -> Iterator[Entry]:
    """Entries of a tar whose samples are neighbouring members with one stem."""
    try:
        with tarfile.open(path) as tar:
            groups: list[tuple[str, int, int, str]] = []
            for member in tar:
                key = member.name.split(".", 1)[0]
                end = member.offset_data + member.size + -member.size % tarfile.BLOCKSIZE
                start, bucket = member.offset, ""
                if groups and groups[-1][0] == key:
                    _, start, _, bucket = groups.pop()
                if member.name.endswith(".json"):
                    content = tar.extractfile(member)
                    bucket = json.load(content).get("bucket", "") if content else ""
                groups.append((key, start, end, bucket))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"shard {path} cannot be read ({error}); copy it again or remove it") from error
    for key, start, end, bucket in groups:
        yield Entry(key, start, end - start, bucket)


# --------------------------------------------------------------------------------------------------- reading


class Shards:
    """Random access to the samples of a folder of shards.

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
        """A descriptor of this process (forked workers must not share one's lifetime)."""
        key = (os.getpid(), shard)
        if key not in self._files:
            self._files[key] = os.open(self.folder / self.index.shards[shard][0], os.O_RDONLY)
        return self._files[key]

    def read(self, number: int) -> Sample:
        """Sample `number` in index order.

        Raises:
            SampleError: its bytes are not what was written.
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
    def contract(self) -> Contract | None:
        """Of the latents; None for tars without an index."""
        from magihuman.models.latent_contract import Contract

        return None if self.index.contract is None else Contract.from_dict(self.index.contract)

    def null_text(self) -> torch.Tensor | None:
        """[S,Ct] fp32 features of the empty prompt, None where the folder has none."""
        from safetensors.torch import load_file

        path = self.folder / NULL_TEXT
        return load_file(path)["text"].float() if path.exists() else None


def _members(data: bytes) -> dict[str, bytes]:
    """Extension -> contents of the members of one sample."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {m.name.split(".", 1)[1]: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
