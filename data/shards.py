"""Shards of latents: webdataset tar files with an index for random access to every sample.

A sample is two members of a tar: `KEY.safetensors` (video fp16 [C,T,h,w]; audio fp16 [A,Ca], absent without audio; text
fp16 [S,Ct]; optionally video_sr, the same clip at the second stage's size, and frames uint8 [3,F,H,W]; further tensors
are allowed) and `KEY.json` (caption, source, fps, seconds, width, height, bucket, has_audio, start). Any webdataset
reader can read them; `index.json` adds the offset, length and checksum of each sample, and the latents' contract.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
import tarfile
import time
import zlib
from array import array
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from magihuman.errors import UserError
from magihuman.io.files import atomic_path, write_atomically

if TYPE_CHECKING:  # torch takes a second to import and the parent process of data.prepare does not need it
    import numpy as np
    import torch

    from magihuman.models.config import Contract

FORMAT = "magihuman-shards/1"
INDEX = "index.json"
NULL_TEXT = "null_text.safetensors"
LARGE = "video_sr"  # latents at the second stage's size

AXES = {"video": 4, "audio": 2, "text": 2, LARGE: 4}  # numbers of axes of the tensors
MAX_INDEX_BYTES = 8 << 30  # of index.json: about 50 million samples
MAX_META_BYTES = 1 << 20  # of a sample's JSON
CACHED_FROM = 100_000  # samples from which the compact index is kept as a file
RETRY_DELAYS = (0.1, 1.0, 5.0)  # seconds before reading again after an error that may pass
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)  # of network file systems
REMEDIES = {
    errno.EMFILE: "raise the limit of open files (ulimit -n) or lower data.module.num_workers",
    errno.ENFILE: "the machine has too many open files; close some, or lower data.module.num_workers",
    errno.ENOMEM: "free some memory, or lower data.module.num_workers or data.module.batch_size",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.ENOENT: "it was there at the start: copy it again",
    errno.ESTALE: "it was replaced, or its server restarted: give the same command again",
}


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

        stored = save({name: _half(value) for name, value in tensors.items()})
        self._append(key, bucket, stored, json.dumps(dict(meta), sort_keys=True).encode())

    def copy(self, shard: Path, entry: Entry) -> bool:
        """Append a sample of another shard as it is; False where its bytes there are damaged.

        Raises:
            UserError: the machine cannot read them.
        """
        data = _read_bytes(shard, entry.offset, entry.bytes)
        if zlib.crc32(data) != entry.crc:
            return False
        members = _members(data, entry.key)
        self._append(entry.key, entry.bucket, members["safetensors"], members["json"])
        return True

    def _append(self, key: str, bucket: str, tensors: bytes, meta: bytes) -> None:
        from webdataset.writer import TarWriter

        if not self.entries:
            partial = self._stack.enter_context(atomic_path(self.path, sync=True))
            self._file = self._stack.enter_context(partial.open("w+b"))
            writer = TarWriter(self._file, user="", group="", mode=0o644, mtime=0, encoder=False)
            self._tar = self._stack.enter_context(writer)
        start = self._tar.tarstream.offset
        # Two calls, because one would sort the members: shards have the tensors first.
        self._tar.write({"__key__": key, "safetensors": tensors})
        self._tar.write({"__key__": key, "json": meta})
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
    """Content of index.json, to be written; `SampleIndex` reads it.

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


class SampleIndex(Sequence[Entry]):
    """index.json in memory, as arrays: 48 bytes and the key for each sample instead of 600.

        index = SampleIndex.load(Path("shards"))
        index[0].key, index.shards[index.rows["shard"][0]]

    Large indexes are kept as a file in the folder of the shards, named by the hash of index.json, and mapped into memory:
    all processes of a machine share it.

    Attributes:
        codecs, contract, fingerprint: as in `Index`.
        shards: file names; buckets: their names.
        rows: structured array [samples]: offset, bytes, crc (-1: none), key_end, source (64 bits of the hash of the source
            file's key), and the numbers of shard and bucket.
        keys: uint8, the keys in UTF-8, each with a line feed, which that of sample i has before key_end[i].
    """

    def __init__(self, head: Mapping[str, Any], rows: np.ndarray, keys: np.ndarray) -> None:
        self.codecs: str = head["codecs"]
        self.contract: dict[str, Any] = head["contract"]
        self.fingerprint: str = head["fingerprint"]
        self.shards: list[str] = head["shards"]
        self.buckets: list[str] = head["buckets"]
        self.rows, self.keys = rows, keys

    @classmethod
    def load(cls, folder: Path) -> SampleIndex:
        """Read index.json, or what was kept of it.

        Raises:
            UserError: it is missing, too large or cannot be read, or it names files outside of the folder.
        """
        path = folder / INDEX
        if not path.exists():
            remedy = f"make shards with `python -m data.prepare input=VIDEOS output={folder}`"
            if any(folder.glob("*.tar")):
                remedy = "copy it from where the tars were made, or prepare them again"
            raise UserError(f"shards={folder} holds no {INDEX}; {remedy}")
        try:
            if (size := path.stat().st_size) > MAX_INDEX_BYTES:
                raise UserError(
                    f"{path} has {size} bytes, {MAX_INDEX_BYTES} at most; prepare the data in several folders"
                )
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
            kept = folder / f".index-{digest}.safetensors"
            if (found := _read_cached(kept)) is not None:
                return found
            head, rows, keys = _parse(path)
            if len(rows) >= CACHED_FROM and _write_cache(kept, head, rows, keys):
                return _read_cached(kept) or cls(head, rows, keys)
            return cls(head, rows, keys)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{path} cannot be read ({type(error).__name__}: {error}); copy it again, or prepare the shards again"
            ) from error

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, number: int) -> Entry: ...
    @overload
    def __getitem__(self, number: slice) -> list[Entry]: ...
    def __getitem__(self, number: int | slice) -> Entry | list[Entry]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        row = self.rows[number]
        start = int(self.rows[number - 1]["key_end"]) if number % len(self) else 0
        key = bytes(self.keys[start : int(row["key_end"]) - 1]).decode()
        crc = int(row["crc"])
        bucket = self.buckets[row["bucket"]]
        return Entry(key, int(row["offset"]), int(row["bytes"]), bucket, None if crc < 0 else crc)


def _row_type() -> np.dtype:
    import numpy as np

    eight = [("offset", "<i8"), ("bytes", "<i8"), ("crc", "<i8"), ("key_end", "<i8"), ("source", "<u8")]
    return np.dtype([*eight, ("shard", "<u4"), ("bucket", "<u4")])


def _parse(path: Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Head, rows and keys of index.json. Each sample becomes a row as soon as it is parsed, so few objects exist at once."""
    import numpy as np

    from magihuman.models.config import Contract

    columns = {name: array("q") for name in ("offset", "bytes", "crc", "key_end", "bucket")}
    sources, keys, buckets = array("Q"), bytearray(), dict[str, int]()
    last = ("", 0)

    def take(found: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal last
        if "offset" not in found:
            return found
        keys.extend(found["key"].encode() + b"\n")
        if (source := source_of(found["key"])) != last[0]:
            last = source, int.from_bytes(hashlib.sha256(source.encode()).digest()[:8])
        crc = found.get("crc")
        values = (found["offset"], found["bytes"], -1 if crc is None else crc, len(keys))
        for column, value in zip(
            columns.values(), (*values, buckets.setdefault(found["bucket"], len(buckets))), strict=True
        ):
            column.append(value)
        sources.append(last[1])
        return None

    content = json.loads(path.read_bytes(), object_hook=take)
    if content["format"] != FORMAT:
        raise UserError(f"{path} has the format {content['format']!r}, not {FORMAT!r}; prepare the data again")
    counts = [len(shard["samples"]) for shard in content["shards"]]
    if sum(counts) != len(sources) or any(any(shard["samples"]) for shard in content["shards"]):
        raise ValueError("a sample without its offset, or outside of `samples`")
    for name in buckets:
        Bucket.parse(name)
    try:
        Contract.from_dict(content["contract"])
    except UserError as error:
        raise ValueError(error) from None
    rows = np.zeros(len(sources), _row_type())
    for name, column in columns.items():
        rows[name] = column
    rows["source"] = sources
    rows["shard"] = np.repeat(np.arange(len(counts)), counts)
    head = {
        "codecs": content["world"],
        "contract": content["contract"],
        "fingerprint": content.get("fingerprint", ""),
        "shards": [_plain_name(path, shard["name"]) for shard in content["shards"]],
        "buckets": list(buckets),
    }
    return head, rows, np.frombuffer(bytes(keys), np.uint8)


def _plain_name(path: Path, name: str) -> str:
    """`name`, a file name without a folder; raises UserError for any other."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\\" in name:
        raise UserError(f"{path} names the shard {name!r}, which is not a file of its folder; prepare the shards again")
    return name


def _write_cache(path: Path, head: Mapping[str, Any], rows: np.ndarray, keys: np.ndarray) -> bool:
    """Write the compact index for the next processes, in place of older ones; False where the folder is read-only."""
    import numpy as np
    from safetensors.numpy import save_file

    try:
        with atomic_path(path, sync=True) as partial:
            save_file({"rows": rows.view(np.uint64), "keys": keys}, partial, {"head": json.dumps(head)})
        for old in path.parent.glob(".index-*.safetensors"):
            if old != path:
                old.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _read_cached(path: Path) -> SampleIndex | None:
    """The compact index of a file of `_write_cache`, mapped into memory; None where it is missing or damaged."""
    import numpy as np

    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            parts = json.loads(file.read(min(size, 1 << 27)))
        data = np.asarray(np.memmap(path, np.uint8, "r", offset=8 + size))
        rows, keys = (data[slice(*parts[name]["data_offsets"])] for name in ("rows", "keys"))
        head = json.loads(parts["__metadata__"]["head"])
        for name in head["shards"]:
            _plain_name(path, name)
        return SampleIndex(head, rows.view(_row_type()), keys)
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --------------------------------------------------------------------------------------------------- reading


class Shards:
    """Random access to the samples of a folder of shards.

        sample = Shards("shards").read(0)  # sample.tensors["video"], sample.meta["caption"]

    A shard is opened for each sample and closed again, so that any number of shards can be read by any number of processes.

    Attributes:
        index: the samples in index order.
        name: of their place, for messages.

    Raises:
        UserError: no shards, or a shard that is missing, cut off or unreadable.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = str(self.folder)
        self.index = SampleIndex.load(self.folder)
        if not len(self.index):
            raise UserError(f"the shards in {self.folder} hold no sample; see report.md there")
        self._check()

    def _check(self) -> None:
        """Raises UserError unless every sample lies inside a readable file."""
        import numpy as np

        remedy = "copy it again, or run data.prepare with the same settings into an empty folder"
        sizes = np.zeros(len(self.index.shards), np.int64)
        for number, name in enumerate(self.index.shards):
            path = os.path.join(self.folder, name)  # a Path takes longer than the request
            try:
                status = os.stat(path)
            except OSError as error:
                raise UserError(f"shard {path} is missing or unreadable ({error.strerror}); {remedy}") from error
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"shard {path} is not a file; {remedy}")
            # access() is a second request to a file server, so it is left out where everybody may read.
            if status.st_mode & 0o444 != 0o444 and not os.access(path, os.R_OK):
                raise UserError(f"shard {path} is not readable for you; change its permissions")
            sizes[number] = status.st_size
        rows = self.index.rows
        if rows["shard"].max() >= len(sizes) or rows["bucket"].max() >= len(self.index.buckets):
            raise UserError(f"the compact index .index-*.safetensors in {self.folder} is damaged; delete it")
        size, offset, count = sizes[rows["shard"]], rows["offset"], rows["bytes"]
        if (wrong := (offset < 0) | (count <= 0)).any():
            raise UserError(
                f"{self.folder / INDEX} states no place for {self.index[int(wrong.argmax())].key}; {remedy}"
            )
        if (wrong := count > size - offset).any():
            first = int(rows["shard"][wrong.argmax()])
            needed = max(int(row["offset"]) + int(row["bytes"]) for row in rows[rows["shard"] == first])
            file = self.folder / self.index.shards[first]
            raise UserError(f"shard {file} is cut off ({sizes[first]} of {needed} bytes); {remedy}")

    @property
    def entries(self) -> SampleIndex:
        """All samples, in index order."""
        return self.index

    def __len__(self) -> int:
        return len(self.index)

    def read(self, number: int) -> Sample:
        """Sample `number` in index order.

        Raises:
            SampleError: its bytes are damaged.
            UserError: the machine cannot read them, for another reason than damage.
        """
        from safetensors.torch import load

        entry, shard = self.index[number], self.index.shards[self.index.rows["shard"][number]]
        try:
            data = self._read_bytes(shard, entry.offset, entry.bytes)
            if len(data) < entry.bytes:
                raise SampleError("cut off")
            if entry.crc is not None and zlib.crc32(data) != entry.crc:
                raise SampleError("checksum differs")
            members = _members(data, entry.key)
            meta = json.loads(members["json"])
            tensors = load(members["safetensors"])
            if not isinstance(meta, dict):
                raise SampleError(f"its JSON is a {type(meta).__name__}")
            if "video" not in tensors or "text" not in tensors:
                raise SampleError(f"holds {sorted(tensors)}, not video and text")
            if wrong := [name for name, axes in AXES.items() if name in tensors and tensors[name].ndim != axes]:
                raise SampleError(f"its {wrong[0]} has the shape {list(tensors[wrong[0]].shape)}")
        except UserError:
            raise
        except MemoryError as error:
            raise UserError(f"no memory for the {entry.bytes} bytes of a sample; {REMEDIES[errno.ENOMEM]}") from error
        except SampleError as error:
            raise SampleError(f"{entry.key}: {error} ({shard})") from None
        except Exception as error:
            raise SampleError(f"{entry.key}: {type(error).__name__}: {error} ({shard})") from error
        return Sample(tensors, meta)

    def _read_bytes(self, shard: str, offset: int, count: int) -> bytes:
        """`count` bytes of a shard from `offset` on, fewer at its end."""
        return _read_bytes(self.folder / shard, offset, count)

    @property
    def contract(self) -> Contract:
        """Contract of the latents."""
        from magihuman.models.config import Contract

        return Contract.from_dict(self.index.contract)

    def null_text(self) -> torch.Tensor | None:
        """[S,Ct] fp32 features of the empty prompt, None where the folder has none.

        Raises:
            UserError: the file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / NULL_TEXT
        try:
            return load_file(path)["text"].float() if path.exists() else None
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}); copy it again, or prepare the shards again") from error


def _read_bytes(path: Path, offset: int, count: int) -> bytes:
    """`count` bytes of a file from `offset` on, fewer at its end; some errors of network file systems pass.

    Raises:
        UserError: the machine cannot read them.
    """
    for pause in (*RETRY_DELAYS, None):
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(count)
        except OSError as error:
            if pause is None or error.errno not in TRANSIENT:
                tried = f" after {len(RETRY_DELAYS) + 1} tries" if error.errno in TRANSIENT else ""
                remedy = REMEDIES.get(error.errno or 0, "check the disk or the network")
                raise UserError(f"shard {path} cannot be read ({error.strerror or error}){tried}; {remedy}") from error
        time.sleep(pause)
    raise AssertionError


def _members(data: bytes, key: str) -> dict[str, bytes]:
    """Contents of KEY.safetensors and KEY.json, the members of one sample, by extension.

    Only plain members are read: those of sparse or compressed tars could be many times larger than `data`.

    Raises:
        SampleError: another member, or one that is too large.
    """
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse() or member.size > len(data):
                raise SampleError(f"{member.name[:200]!r} is not a plain member of its size")
            extension = member.name.removeprefix(f"{key}.")
            if extension == "json" and member.size > MAX_META_BYTES:
                raise SampleError(f"its JSON has {member.size} bytes, {MAX_META_BYTES} at most")
            if extension in ("safetensors", "json"):
                found[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found
