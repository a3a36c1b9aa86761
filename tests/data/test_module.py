"""The order of samples and the data module: disjoint ranks, exact resumption, corrupt samples, unusable shards."""

import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pooled_bundle import build as pooled_bundle
from safetensors.torch import load

from data.module import LatentDataModule, Order, mix, permutation, split
from data.shards import Index, Shards, ShardWriter, source_of
from magihuman.errors import UserError

BUCKETS = {"25x64x64+a": 41, "25x64x64": 9, "13x64x128+a": 22}


def write_shards(folder: Path, per_shard: int = 20) -> Path:
    """Synthetic samples: the video's value is the sample's number."""
    folder.mkdir()
    names = [name for name, count in BUCKETS.items() for _ in range(count)]
    names = [names[i] for i in permutation(len(names), 7)]
    shards = []
    for first in range(0, len(names), per_shard):
        path = folder / f"shard-{first // per_shard:06d}.tar"
        with ShardWriter(path) as writer:
            for number in range(first, min(first + per_shard, len(names))):
                bucket = names[number]
                shape = (3, 7, 16, 16) if bucket.startswith("25") else (3, 4, 16, 32)
                tensors = {"video": torch.full(shape, float(number)), "text": torch.ones(1 + number % 4, 26)}
                if bucket.endswith("+a"):
                    tensors["audio"] = torch.full((int(bucket[:2]), 32), float(number))
                writer.add(
                    f"s{number // 2:03d}_{number % 2:04d}",
                    bucket,
                    tensors,
                    {"caption": f"no {number}", "bucket": bucket},
                )
        shards.append((path.name, writer.entries))
    Index("pooled", pooled_bundle("cpu").contract.to_dict(), shards).save(folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("stream") / "shards")


def module(shards: Path, rank: int = 0, ranks: int = 1, **settings: Any) -> LatentDataModule:
    """A data module as a trainer's rank sees it."""
    made = LatentDataModule(str(shards), **{"batch_size": 6, "val_fraction": 0.1, "seed": 3, **settings})
    made.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, training=True)  # type: ignore[assignment]
    return made


def take(made: LatentDataModule, count: int) -> list[dict[str, Any]]:
    """The next batches, counted as a training counts them."""
    batches = []
    for batch in made.train_dataloader():
        batches.append(made.on_after_batch_transfer(batch, 0))
        if len(batches) == count:
            break
    return batches


def keys(batches: list[dict[str, Any]]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def test_numbers_of_the_order_never_change() -> None:
    # splitmix64 of seed 0, from the reference implementation by Vigna.
    assert [int(x) for x in mix(count=3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert permutation(8, 1, 2).tolist() == [1, 3, 4, 0, 7, 6, 5, 2]
    counts = np.bincount([int(permutation(5, seed)[0]) for seed in range(5000)])
    assert counts.min() > 900  # uniform: 1000 +- 28


def test_an_epoch_holds_every_sample_and_never_mixes_buckets(shards: Path) -> None:
    data = module(shards)
    epoch = take(data, data.order.batches_per_epoch)
    seen = Counter(keys(epoch))
    assert len(seen) == data.train_samples == 72 - data.val_samples
    filled = sum(seen.values()) - len(seen)
    assert filled == sum(-len(n) % 6 for n in data._by_bucket(split(data.reader, 0.1)[0]).values())
    for batch in epoch:
        assert batch["video"].dtype == torch.float32
        sounds = batch["audio"].shape[1]
        assert batch["audio"].shape == (6, sounds, 32)
        assert sounds in (0, batch["video"].shape[2] * 4 - 3)
        numbers = batch["video"][:, 0, 0, 0, 0].int().tolist()
        assert batch["caption"] == [f"no {n}" for n in numbers]
        assert [len(text) for text in batch["text"]] == [1 + n % 4 for n in numbers]
    assert {batch["video"].shape[2:] for batch in epoch} == {(7, 16, 16), (4, 16, 32)}
    following = take(data, data.order.batches_per_epoch)
    assert set(keys(following)) == set(keys(epoch))
    assert keys(following) != keys(epoch)
    assert keys(take(module(shards, seed=4), 5)) != keys(epoch[:5])
    positions = [int(i) for batch in epoch + following for i in batch["index"]]
    assert positions == list(range(len(positions)))


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_ranks_share_the_global_batches(shards: Path, ranks: int) -> None:
    alone = take(module(shards), 30)
    parts = [take(module(shards, rank, ranks), 30) for rank in range(ranks)]
    for t, batch in enumerate(alone):
        assert batch["key"] == [key for part in parts for key in part[t]["key"]]
        assert batch["index"].tolist() == [i for part in parts for i in part[t]["index"].tolist()]
        assert torch.equal(batch["video"], torch.cat([part[t]["video"] for part in parts]))


def test_resumes_exactly_anywhere_on_any_number_of_ranks(shards: Path) -> None:
    whole = take(module(shards), 32)
    assert module(shards).order.batches_per_epoch == 12  # so 32 batches cross two ends of epochs
    for stop in (1, 7, 11, 12, 13, 24, 25, 31):
        first = module(shards, 0, 2)
        take(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
        assert state["position"] == stop * 6
        rests = []
        for rank in range(3):
            rest = module(shards, rank, 3)
            rest.load_state_dict(state)
            rests.append(take(rest, 32 - stop))
        for t, batch in enumerate(whole[stop:]):
            assert batch["key"] == [key for rest in rests for key in rest[t]["key"]]


def test_workers_give_the_same_batches(shards: Path) -> None:
    plain, read_ahead = module(shards), module(shards, num_workers=2)
    for a, b in zip(take(plain, 9), take(read_ahead, 9), strict=True):
        assert a["key"] == b["key"]
        assert torch.equal(a["video"], b["video"])
    assert read_ahead.state_dict() == plain.state_dict()  # what was read ahead does not count


def test_state_of_other_data_is_refused(shards: Path) -> None:
    state = module(shards).state_dict()
    with pytest.raises(UserError, match=r"batch_size: 6 then, 12 now.*restore the data settings"):
        module(shards, batch_size=12).load_state_dict(state)
    with pytest.raises(UserError, match="seed: 3 then, 5 now"):
        module(shards, seed=5).load_state_dict(state)
    with pytest.raises(UserError, match="keys: "):
        module(shards).load_state_dict({**state, "keys": "others"})


def test_validation_holds_each_sample_once_and_shares_no_source(shards: Path) -> None:
    data = module(shards)
    loader = data.val_dataloader()
    held = keys(list(loader))
    assert len(held) == len(set(held)) == data.val_samples > 0
    assert keys(list(loader)) == held
    training = {source_of(key) for key in keys(take(data, data.order.batches_per_epoch))}
    assert not training & {source_of(key) for key in held}
    parts = [list(module(shards, rank, 2).val_dataloader()) for rank in range(2)]
    assert [len(a["key"]) for a in parts[0]] == [len(b["key"]) for b in parts[1]]
    assert set(keys(parts[0] + parts[1])) == set(held)
    assert module(shards, val_fraction=0.0).val_dataloader() == []


def test_the_side_of_a_file_stays_when_files_are_added(shards: Path) -> None:
    reader = Shards(shards)
    train, val = split(reader, 0.3)
    sources = {source_of(reader.entries[i].key) for i in val}
    reader.entries = reader.entries[:40]
    fewer = {source_of(reader.entries[i].key) for i in split(reader, 0.3)[1]}
    assert fewer == {s for s in sources if any(source_of(e.key) == s for e in reader.entries)}
    assert 0.15 < len(val) / (len(val) + len(train)) < 0.45


def corrupt(shards: Path, numbers: list[int]) -> None:
    reader = Shards(shards)
    for number in numbers:
        entry, shard = reader.entries[number], reader.index.shards[reader._shard_of[number]][0]
        data = bytearray((shards / shard).read_bytes())
        data[entry.offset + 700] ^= 0xFF
        (shards / shard).write_bytes(bytes(data))


def test_corrupt_samples_are_named_skipped_and_replaced_alike(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    good = module(shards)
    order = good.order.epoch(0)
    bad = [int(order[0][1]), *(int(n) for n in order[2])]  # one sample of batch 0, all of batch 2
    corrupt(copy, bad)
    data = module(copy)
    batches = take(data, good.order.batches_per_epoch)
    bad_keys = {data.reader.entries[n].key for n in bad}
    assert not bad_keys & set(keys(batches))
    assert {text.split(":")[0] for text in data.skipped} == bad_keys
    assert all("checksum differs" in text for text in data.skipped)
    assert batches[0]["key"] == [good.reader.entries[n].key for n in (order[0][[0, 2, 2, 3, 4, 5]])]
    assert batches[2]["video"].shape[2:] == take(good, 3)[2]["video"].shape[2:]
    again = module(copy)
    assert keys(take(again, len(batches))) == keys(batches)


def test_a_bucket_without_a_readable_sample_is_an_error(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    reader = Shards(copy)
    corrupt(copy, [i for i, entry in enumerate(reader.entries) if entry.bucket == "25x64x64"])
    with pytest.raises(UserError, match=r"no sample of bucket 25x64x64 in .* can be read; copy the shards again"):
        take(module(copy), 13)


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
    urls = [str(shards / name) for name, _ in reader.index.shards]
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
    last = Index.load(shards).shards[0][1][-1]
    assert path.stat().st_size == last.offset + last.bytes + 2 * tarfile.BLOCKSIZE


def test_order_is_made_of_its_arguments_alone() -> None:
    order = Order({"b": range(10, 20), "a": range(10)}, 4, seed=1)
    late = Order({"a": range(10), "b": range(10, 20)}, 4, seed=1)
    assert late.batch(17).tolist() == order.batch(17).tolist()
    assert order.batches_per_epoch == 6
    assert sorted(set(order.epoch(5).ravel().tolist())) == list(range(20))


def test_lightning_resumes_on_the_next_sample(shards: Path, tmp_path: Path) -> None:
    from lightning.pytorch import LightningModule, Trainer

    class Recorder(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.seen: list[list[str]] = []

        def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
            self.seen.append(batch["key"])
            return (self.weight * batch["video"].mean()).sum()

        def validation_step(self, batch: dict[str, Any]) -> None:
            assert len(batch["key"]) <= 6

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-9)

    def fit(steps: int, resume: Path | None) -> tuple[list[list[str]], Path]:
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False, val_check_interval=4, check_val_every_n_epoch=None, num_sanity_val_steps=1,
        )  # fmt: skip
        recorder, data = Recorder(), LatentDataModule(str(shards), batch_size=6, seed=3, val_fraction=0.1)
        trainer.fit(recorder, data, ckpt_path=resume, weights_only=True if resume else None)
        path = tmp_path / f"{steps}.ckpt"
        trainer.save_checkpoint(path)
        return recorder.seen, path

    whole, _ = fit(30, None)
    assert len(whole) == 30
    first, saved = fit(9, None)
    second, saved = fit(12, saved)  # the end of an epoch
    third, saved = fit(24, saved)  # and of the next
    fourth, _ = fit(30, saved)
    assert first + second + third + fourth == whole


def test_further_tensors_travel_with_the_batch(tmp_path: Path) -> None:
    """Paired latents of another size, or the frames themselves, need nothing but their names."""
    path = tmp_path / "shard-000000.tar"
    with ShardWriter(path) as writer:
        for i in range(4):
            tensors = {
                "video": torch.zeros(3, 1, 4, 4), "text": torch.zeros(1, 26),
                "video_sr": torch.full((3, 1, 8, 8), i / 7), "frames": torch.full((1, 16, 16, 3), i, dtype=torch.uint8),
            }  # fmt: skip
            writer.add(f"k{i}_0000", "1x16x16", tensors, {"bucket": "1x16x16"})
    Index("pooled", pooled_bundle("cpu").contract.to_dict(), [(path.name, writer.entries)]).save(tmp_path)
    data = LatentDataModule(str(tmp_path), batch_size=4, val_fraction=0.0)
    batch = next(iter(data.train_dataloader()))
    assert batch["video_sr"].shape == (4, 3, 1, 8, 8)
    assert batch["frames"].dtype == torch.uint8
    assert sorted(batch["frames"][:, 0, 0, 0, 0].tolist()) == [0, 1, 2, 3]
    assert data.size == (1, 16, 16)
