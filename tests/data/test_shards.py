"""Files of shards: members, index.json and its compact copy, what cannot be read."""

import gzip
import hashlib
import io
import json
import mmap
import os
import resource
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from pooled_bundle import build as pooled_bundle
from safetensors.torch import load, save
from small_shards import module, write_shards

from data import shards as shards_module
from data.module import LatentDataModule
from data.shards import Entry, Index, SampleError, SampleIndex, Shards, source_of
from magihuman.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("stream") / "shards")


def one_sample(folder: Path, data: bytes) -> Shards:
    """A folder whose only sample is `data`."""
    folder.mkdir()
    (folder / "a.tar").write_bytes(data)
    entry = Entry("k_0000", 0, len(data), "1x16x16", zlib.crc32(data))
    Index("pooled", pooled_bundle("cpu").contract.to_dict(), [("a.tar", [entry])]).save(folder)
    return Shards(folder)


def tar_of(meta: bytes = b"{}", pax: dict[str, str] | None = None, compress: bool = False) -> bytes:
    """The members of sample k_0000."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tensors = save({"video": torch.zeros(3, 1, 4, 4), "text": torch.zeros(1, 26)})
        for name, content in (("k_0000.safetensors", tensors), ("k_0000.json", meta)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.pax_headers = pax or {}
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(stream.getvalue()) if compress else stream.getvalue()


def sparse_member() -> bytes:
    """An old GNU sparse member of 64 GB that takes a kilobyte."""
    header = tarfile.TarInfo("k_0000.json")
    header.size, header.type = 512, tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:398], block[398:410] = b"%011o\0" % 0, b"%011o\0" % 512
    block[483:495] = b"\x80" + (64 << 30).to_bytes(11, "big")
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block) + bytes(512)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (sparse_member(), "'k_0000.json' is not a plain member of its size"),
        (tar_of(pax={"GNU.sparse.realsize": str(64 << 30), "GNU.sparse.map": f"0,1,{(64 << 30) - 1},1"}), "not a plain"),
        (tar_of(pax={"size": str(64 << 30)}), "not a plain member of its size"),
        (tar_of(compress=True), "ReadError"),
        (tar_of(b'{"caption": "' + b"x" * (1 << 20) + b'"}'), "its JSON has 10485.. bytes, 1048576 at most"),
        (tar_of(b"[" * 100_000), "RecursionError"),
        (tar_of(b"9" * 5000), "ValueError: Exceeds the limit"),
        (tar_of(b"[]"), "its JSON is a list"),
        (b"", ""),
    ],
)  # fmt: skip
def test_members_are_checked_before_they_take_memory(tmp_path: Path, data: bytes, reason: str) -> None:
    if not data:
        data = tar_of()
        assert one_sample(tmp_path / "good", data).read(0).tensors["video"].shape == (3, 1, 4, 4)
        return
    reader = one_sample(tmp_path / "shards", data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SampleError, match=f"^k_0000: .*{reason}.*a.tar"):
        reader.read(0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_an_index_names_only_files_of_its_folder(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    shutil.copy(folder / "shard-000000.tar", tmp_path / "elsewhere.tar")
    content = json.loads((folder / "index.json").read_text())
    for name in ("../elsewhere.tar", str(tmp_path / "elsewhere.tar"), "x/../shard-000000.tar", "..", "", "..\\x", 5):
        content["shards"][0]["name"] = name
        (folder / "index.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="which is not a file of its folder; prepare the shards again"):
            Shards(folder)
    os.mkfifo(folder / "pipe.tar")
    content["shards"][0]["name"] = "pipe.tar"
    (folder / "index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"pipe.tar is not a file; copy it again"):
        Shards(folder)


def test_malformed_indexes_are_one_line(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    path = folder / "index.json"
    text = path.read_text()
    first = json.loads(text)["shards"][0]["samples"][0]

    def with_first(**changes: Any) -> str:
        content = json.loads(text)
        content["shards"][0]["samples"][0] = {**first, **changes}
        return json.dumps(content)

    for damaged in (
        "[" * 100_000, "9" * 5000, "[]", text.replace('"offset"', '"place"'), with_first(offset=0.5),
        with_first(offset=1 << 70), with_first(key=7), with_first(bucket="wide"), with_first(bucket=None),
        with_first(crc="x"), text.replace('"shards"', '"pieces"'), text.replace('"video_channels"', '"channels"'),
    ):  # fmt: skip
        path.write_text(damaged)
        with pytest.raises(
            UserError, match=r"index.json cannot be read \(.*copy it again, or prepare the shards again"
        ):
            Shards(folder)
    for wrong, message in (
        (with_first(offset=-1), "states no place for"),
        (with_first(bytes=0), "states no place for"),
        (with_first(bytes=(1 << 63) - 1, offset=(1 << 63) - 1), r"is cut off \(\d+ of 18446744073709551614 bytes\)"),
    ):
        path.write_text(wrong)
        with pytest.raises(UserError, match=message):
            Shards(folder)
    path.write_text(text)
    monkeypatch.setattr(shards_module, "MAX_INDEX_BYTES", 1000)
    with pytest.raises(UserError, match=r"index.json has \d+ bytes, 1000 at most; prepare the data in several folders"):
        Shards(folder)


def test_a_large_index_is_kept_and_mapped(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    text = (folder / "index.json").read_text()
    entries = [Entry(**e) for shard in json.loads(text)["shards"] for e in shard["samples"]]
    plain = Shards(folder)
    assert list(plain.entries) == entries
    assert plain.entries[-1] == entries[-1]
    assert plain.entries[3:5] == entries[3:5]
    assert not list(folder.glob(".index-*"))
    identity = module(folder)._identity()
    digest = hashlib.sha256("\n".join(entry.key for entry in entries).encode()).hexdigest()[:16]
    monkeypatch.setattr(shards_module, "CACHED_FROM", 72)
    parsed: list[Path] = []
    parse = shards_module._parse
    monkeypatch.setattr(shards_module, "_parse", lambda path: parsed.append(path) or parse(path))
    for _ in range(3):
        kept = Shards(folder)
        assert list(kept.entries) == entries
        assert (kept.index.shards, kept.index.contract) == (plain.index.shards, plain.index.contract)
    assert len(parsed) == 1
    assert module(folder)._identity() == {**identity, "keys": digest}
    mapped = kept.index.rows
    while not isinstance(mapped, mmap.mmap):
        mapped = mapped.base
    (file,) = folder.glob(".index-*.safetensors")
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\xff" * 100):
        file.write_bytes(damaged)
        assert list(Shards(folder).entries) == entries
        assert file.read_bytes() == whole
    (folder / "index.json").write_text(text.replace(entries[0].key, entries[0].key[::-1]))  # of the same size
    assert Shards(folder).entries[0].key == entries[0].key[::-1]
    assert file not in list(folder.glob(".index-*"))
    assert len(list(folder.glob(".index-*"))) == 1


def test_memory_of_an_index_is_its_arrays(shards: Path) -> None:
    index = SampleIndex.load(shards)
    assert index.rows.itemsize == 48
    assert len(index.keys) == sum(len(entry.key) + 1 for entry in index)
    assert not [value for value in vars(index).values() if isinstance(value, list) and len(value) >= len(index)]


def test_unusable_shards_are_one_line_with_a_remedy(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no index.json; make shards with `python -m data.prepare"):
        LatentDataModule(str(tmp_path))
    copy = tmp_path / "missing"
    shutil.copytree(shards, copy)
    (copy / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"shard .*shard-000001.tar is missing or unreadable .*; copy it again, or"):
        LatentDataModule(str(copy))
    whole = (shards / "shard-000001.tar").read_bytes()
    (copy / "shard-000001.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"shard-000001.tar is cut off \(\d+ of \d+ bytes\); copy it again"):
        LatentDataModule(str(copy))
    (copy / "index.json").write_bytes(b'{"format": "magihuman-sh')
    with pytest.raises(UserError, match=r"index.json cannot be read .*; copy it again"):
        LatentDataModule(str(copy))
    (copy / "index.json").write_bytes(b'{"format": "other/7"}')
    with pytest.raises(UserError, match="has the format 'other/7'"):
        LatentDataModule(str(copy))
    (copy / "index.json").unlink()
    with pytest.raises(UserError, match=r"holds no index.json; copy it from where the tars were made"):
        LatentDataModule(str(copy))
    with pytest.raises(UserError, match="batch_size=0 should be at least 1"):
        LatentDataModule(str(shards), batch_size=0)
    with pytest.raises(UserError, match="batch_size=6 is over all ranks and not divisible by 4; choose 8"):
        module(shards, 0, 4).train_dataloader()


def test_webdataset_reads_the_shards(shards: Path) -> None:
    """Any webdataset loader finds the same samples, in index order."""
    import webdataset

    reader = Shards(shards)
    urls = [str(shards / name) for name in reader.index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [entry.key for entry in reader.entries]
    for number, sample in enumerate(samples):
        ours, tensors = reader.read(number), load(sample["safetensors"])
        assert json.loads(sample["json"]) == ours.meta
        assert tensors.keys() == ours.tensors.keys()
        assert all(torch.equal(tensors[name], ours.tensors[name]) for name in tensors)


def test_tar_members_name_no_owner_and_no_time(shards: Path) -> None:
    path = shards / "shard-000000.tar"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    last = Shards(shards).entries[19]  # of 20 in this shard
    assert path.stat().st_size == last.offset + last.bytes + 2 * tarfile.BLOCKSIZE


def test_clips_of_a_file_share_what_comes_before_their_number() -> None:
    assert [source_of(key) for key in ("a_b_0003", "a_b_0004", "a_0003", "plain")] == ["a_b", "a_b", "a", "plain"]
