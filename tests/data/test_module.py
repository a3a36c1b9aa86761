"""The order of samples and the data module: disjoint ranks, exact resumption, even shares, damaged samples, errors of
the machine."""

import errno
import json
import os
import resource
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_stub
from pooled_bundle import build as pooled_bundle
from small_shards import module, write_shards

from data import shards as shards_module
from data.module import Batches, LatentDataModule, PromptDataModule, split
from data.order import FixedOrder, Order, mix, permutation
from data.shards import Index, Shards, ShardWriter, source_of
from magihuman.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("stream") / "shards")


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
    epoch = take(data, 2 * data.order.batches_per_epoch)
    assert len(set(keys(epoch))) == data.train_samples == 72 - data.val_samples
    for batch in epoch:
        assert batch["video"].dtype == torch.float32
        sounds = batch["audio"].shape[1]
        assert batch["audio"].shape == (6, sounds, 32)
        assert sounds in (0, batch["video"].shape[2] * 4 - 3)
        numbers = batch["video"][:, 0, 0, 0, 0].int().tolist()
        assert batch["caption"] == [f"no {n}" for n in numbers]
        assert [len(text) for text in batch["text"]] == [1 + n % 4 for n in numbers]
    assert {batch["video"].shape[2:] for batch in epoch} == {(7, 16, 16), (4, 16, 32)}
    following = take(data, 2 * data.order.batches_per_epoch)
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
    assert module(shards).order.batches_per_epoch == 11  # so 32 batches cross two ends of epochs
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
    reader.index.rows = reader.index.rows[:40]
    fewer = {source_of(reader.entries[i].key) for i in split(reader, 0.3)[1]}
    assert fewer == {s for s in sources if any(source_of(e.key) == s for e in reader.entries)}
    assert 0.15 < len(val) / (len(val) + len(train)) < 0.45


def corrupt(shards: Path, numbers: list[int]) -> None:
    reader = Shards(shards)
    for number in numbers:
        entry, shard = reader.entries[number], reader.index.shards[reader.index.rows["shard"][number]]
        data = bytearray((shards / shard).read_bytes())
        data[entry.offset + 700] ^= 0xFF
        (shards / shard).write_bytes(bytes(data))


def test_corrupt_samples_are_named_skipped_and_replaced_alike(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    good = module(shards)
    order = [good.order.batch(number) for number in range(3)]
    bad = [int(order[0][1]), *(int(n) for n in order[2])]  # one sample of batch 0, all of batch 2
    corrupt(copy, bad)
    data = module(copy, max_damaged_share=0.1)
    batches = take(data, good.order.batches_per_epoch)
    bad_keys = {data.reader.entries[n].key for n in bad}
    assert not bad_keys & set(keys(batches))
    assert {text.split(":")[0] for text in data.skipped} == bad_keys
    assert all("checksum differs" in text for text in data.skipped)
    assert batches[0]["key"] == [good.reader.entries[n].key for n in (order[0][[0, 2, 2, 3, 4, 5]])]
    assert batches[2]["video"].shape[2:] == take(good, 3)[2]["video"].shape[2:]
    again = module(copy, max_damaged_share=0.1)
    assert keys(take(again, len(batches))) == keys(batches)


def lone_shards(folder: Path, count: int) -> Path:
    """Shards of one small sample each."""
    folder.mkdir()
    shards = []
    for number in range(count):
        path = folder / f"shard-{number:06d}.tar"
        with ShardWriter(path) as writer:
            tensors = {"video": torch.full((3, 1, 2, 2), float(number)), "text": torch.ones(2, 26)}
            writer.add(f"k{number}_0000", "1x8x8", tensors, {"caption": f"no {number}"})
        shards.append((path.name, writer.entries))
    Index("pooled", pooled_bundle("cpu").contract.to_dict(), shards).save(folder)
    return folder


@contextmanager
def open_files(more: int) -> Iterator[None]:
    """Allow this process and its children `more` open files than there are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("workers", [0, 2])
def test_more_shards_than_open_files(tmp_path: Path, workers: int) -> None:
    folder = lone_shards(tmp_path / "shards", 200)
    with open_files(100 if workers else 10):
        data = LatentDataModule(str(folder), batch_size=20, val_fraction=0.0, num_workers=workers)
        seen = Counter(keys(take(data, 10)))
    assert seen == Counter({f"k{number}_0000": 1 for number in range(200)})
    assert not data.skipped


def failing(monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> list[int]:
    """Let the next openings of tars fail with an error number; returns the list of failures."""
    failed, opened = [], Path.open

    def open_or_fail(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.suffix == ".tar" and len(failed) < times:
            failed.append(number)
            raise OSError(number, os.strerror(number))
        return opened(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", open_or_fail)
    monkeypatch.setattr(shards_module, "RETRY_DELAYS", (0.0, 0.0, 0.0))
    return failed


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EMFILE, r"shard .*\.tar cannot be read \(Too many open files\); raise the limit of open files"),
        (errno.EACCES, r"cannot be read \(Permission denied\); change its permissions"),
        (errno.ENOENT, r"cannot be read \(No such file or directory\); it was there at the start"),
        (errno.ENOMEM, r"cannot be read \(Cannot allocate memory\); free some memory"),
        (errno.EIO, r"cannot be read \(Input/output error\) after 4 tries; check the disk or the network"),
        (errno.ESTALE, r"cannot be read \(Stale file handle\) after 4 tries; it was replaced"),
    ],
)
def test_an_error_of_the_machine_ends_the_training(
    shards: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str, workers: int
) -> None:
    data = module(shards, num_workers=workers, max_damaged_share=1.0)
    failing(monkeypatch, number, times=10**9)
    with pytest.raises(UserError, match=message) as raised:
        take(data, 1)
    assert "\n" not in str(raised.value)
    assert not data.skipped


def test_an_error_that_passes_loses_no_sample(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, data = take(module(shards), 2), module(shards)
    failed = failing(monkeypatch, errno.EIO, times=3)
    assert keys(take(data, 2)) == keys(good)
    assert len(failed) == 3
    assert not data.skipped


def test_a_failure_of_the_workers_is_one_line(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(loader: Any) -> Any:
        raise RuntimeError("Too many open files. Communication with the workers is no longer possible.\nMore.")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", fail)
    with pytest.raises(UserError, match=r"num_workers=1 failed \(Too many open files.*ulimit -n") as raised:
        take(module(shards, num_workers=1), 1)
    assert "\n" not in str(raised.value)


def test_shapes_that_differ_in_a_bucket_are_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.tar") as writer:
        for i in range(2):
            tensors = {"video": torch.zeros(3, 1, 4, 4 + i), "text": torch.zeros(1, 26)}
            writer.add(f"k{i}_0000", "1x16x16", tensors, {})
    Index("pooled", pooled_bundle("cpu").contract.to_dict(), [("a.tar", writer.entries)]).save(tmp_path)
    for workers in (0, 1):
        data = LatentDataModule(str(tmp_path), batch_size=2, val_fraction=0.0, num_workers=workers)
        with pytest.raises(
            UserError, match=r"^samples k\d_0000 and k\d_0000 of one bucket hold video of the shapes \["
        ):
            next(iter(data.train_dataloader()))


def test_too_many_damaged_samples_end_the_training(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    order = module(shards).order
    corrupt(copy, [int(order.batch(0)[1])])
    data = module(copy, num_workers=1)
    take(data, 24)
    (reason,) = data.skipped
    (line,) = capsys.readouterr().out.splitlines()  # once, though it was met in each epoch
    assert line.endswith(f"note: a damaged sample is replaced by another: {reason}")
    assert reason.endswith(".tar)")
    data.teardown("fit")
    assert "note: 1 damaged samples were replaced by others" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"1 of 6 samples are damaged, more than data.module.max_damaged_share=0.001 "):
        take(module(copy, max_damaged_share=0.001), 1)
    corrupt(copy, [int(order.batch(2)[3])])
    with pytest.raises(UserError, match=r"2 of 18 samples are damaged, .*_share=0.01 allows \(.*checksum differs"):
        take(module(copy), 24)
    with pytest.raises(UserError, match="max_damaged_share=2 in"):
        module(copy, max_damaged_share=2)


def test_a_run_records_its_damaged_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = training_stub.write_shards(tmp_path / "shards")
    corrupt(shards, [4])
    settings = ["+recipe=pretrain", "callbacks.validation=null", "data.module.val_fraction=0", "trainer.max_steps=10"]
    run = training_stub.train_here(tmp_path / "run", shards, settings)
    (reason,) = json.loads((run / "run.json").read_text())["damaged_samples"]
    assert reason.startswith("clip-04_0000: ")
    out = capsys.readouterr().out
    assert f"note: a damaged sample is replaced by another: {reason}" in out
    assert "note: 1 damaged samples were replaced by others" in out


def test_damaged_validation_samples_are_named(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    number = int(split(Shards(copy), 0.1)[1][0])
    corrupt(copy, [number])
    list(module(copy).val_dataloader())
    assert f"a damaged sample is replaced by another: {Shards(copy).entries[number].key}: " in capsys.readouterr().out


def test_a_bucket_without_a_readable_sample_is_replaced_by_another(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    reader = Shards(copy)
    lost = {i for i, entry in enumerate(reader.entries) if entry.bucket == "25x64x64"}
    corrupt(copy, sorted(lost))
    data = module(copy, max_damaged_share=1.0)
    batches = take(data, 13)
    numbers = [set(map(int, data.order.batch(i))) for i in range(13)]
    assert any(wanted <= lost for wanted in numbers)
    for wanted, batch in zip(numbers, batches, strict=True):
        assert len(batch["key"]) == 6
        assert not {reader.entries[i].key for i in lost} & set(batch["key"])
        if wanted <= lost:
            assert len(set(batch["key"])) == 1
            assert len(batch["skipped"]) == 6
    with pytest.raises(UserError, match=r"samples are damaged, more than data.module.max_damaged_share=0.01"):
        take(module(copy), 13)
    corrupt(copy, [i for i in range(len(reader.entries)) if i not in lost])
    with pytest.raises(UserError, match=r"no sample in .* could be read in place of .*; copy the shards again"):
        take(module(copy, max_damaged_share=1.0), 1)


def test_a_training_sample_is_never_replaced_by_one_of_validation(shards: Path) -> None:
    data = module(shards, val_fraction=0.5)
    batches = Batches(data.reader, data.order)
    training = {data.reader.entries[i].key for i in data.order.samples}
    assert 0 < len(training) < len(data.reader)
    assert {batches._readable(int(number))[0] for number in data.order.samples} <= training


@pytest.mark.parametrize("batch_size", [1, 6, 16])
@pytest.mark.parametrize(
    "sizes", [(20, 1), (100, *[1] * 10), (17, 33, 5), (1,) * 30, (48, 96), (7,), (1954,), (16, 15, 17, 160)]
)
def test_every_sample_has_an_equal_share(sizes: tuple[int, ...], batch_size: int) -> None:
    """After E epochs of n samples a bucket has had E * n of them to less than a batch, and each sample its part of that."""
    ends = np.cumsum(sizes)
    buckets = {f"b{i:02d}": np.arange(end - size, end) for i, (size, end) in enumerate(zip(sizes, ends, strict=True))}
    order, total = Order(buckets, batch_size, seed=5), sum(sizes)
    bucket_of = np.repeat(np.arange(len(sizes)), sizes)
    seen, number = np.zeros(total, int), 0
    for epoch in range(1, 40 if total < 1000 else 5):
        while number < order._before(epoch).sum():
            batch = order.batch(number)
            assert len(batch) == batch_size
            assert len(set(bucket_of[batch])) == 1  # of one bucket
            np.add.at(seen, batch, 1)
            number += 1
        for bucket, size in enumerate(sizes):
            mine = seen[bucket_of == bucket]
            assert abs(mine.sum() - epoch * size) < batch_size
            assert mine.max() - mine.min() <= 1  # passes over the whole bucket
        assert abs(number * batch_size - epoch * total) < batch_size * len(sizes)
    # One still among 20 clips took a third of the training, ten lone clips of 110 took 59 %.
    assert np.abs(seen / seen.sum() - 1 / total).max() < (batch_size + 1) / seen.sum()
    # Anywhere without what came before, as after a resume.
    far = Order(buckets, batch_size, seed=5)
    assert far.batch(number - 1).tolist() == order.batch(number - 1).tolist()


def test_full_buckets_keep_the_order_of_earlier_versions() -> None:
    """Runs on buckets that are multiples of the batch, or of less than an epoch in one bucket, see the same batches."""

    def former(size: int, batch_size: int, epoch: int) -> np.ndarray:
        shuffled = np.resize(permutation(size, 0, epoch, 1), (-(-size // batch_size), batch_size))
        return shuffled[permutation(len(shuffled), 0, epoch, 0)]

    full = Order({"a": range(160)}, 16, seed=0)
    assert all(np.array_equal(full.batch(10 * e + i), former(160, 16, e)[i]) for e in range(4) for i in range(10))
    tiny = Order({"a": range(1954)}, 16, seed=0)  # data=tiny
    differ = [i for i in range(123) if not np.array_equal(tiny.batch(i), former(1954, 16, 0)[i])]
    assert differ == [106]  # the one with the end of the epoch; recipe=dmd2 ends after 90


def test_small_buckets_are_said_at_the_start(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = module(shards, batch_size=30)
    data.trainer.is_global_zero = True  # type: ignore[union-attr]
    data.setup("fit")
    (line,) = capsys.readouterr().out.splitlines()
    assert "note: 2 of 3 buckets hold fewer clips than data.module.batch_size=30" in line
    sizes = data.order.sizes
    assert f"25x64x64 ({sizes['25x64x64']} clips, {sizes['25x64x64'] / data.train_samples:.2g} of the training" in line
    module(shards).setup("fit")  # of 6
    assert capsys.readouterr().out == ""


def test_a_checkpoint_of_an_earlier_version_says_that_the_order_changes(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = module(shards).state_dict()
    module(shards).load_state_dict(state)
    assert capsys.readouterr().out == ""
    del state["order"]
    data = module(shards)
    data.load_state_dict(state)
    assert "its epoch continues in the new order" in capsys.readouterr().out


def test_validation_starts_with_the_usual_clips() -> None:
    order = FixedOrder({"1x64x64": range(3), "25x64x64": range(3, 30)}, 8, 1)
    assert order.batch(0).tolist() == list(range(3, 11))
    assert sorted(i for number in range(order.batches_per_epoch) for i in order.batch(number)) == list(range(30))


def test_prompts_are_those_of_inference(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"caption": "c", "prompt": "p"}\n{"prompt": "", "caption": "c"}\n')
    assert PromptDataModule(str(path)).prompts == ["p", "c"]
    path.write_text('{"prompt": "%s"}' % ("x" * 10_001))
    with pytest.raises(UserError, match="line 1: the prompt has 10001 characters, and 10000 is the most"):
        PromptDataModule(str(path))


def test_prompts_come_equally_often(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"p{i}" for i in range(7)))
    data = PromptDataModule(str(tmp_path / "prompts.txt"), batch_size=4)
    seen: Counter[str] = Counter()
    for number, batch in enumerate(data.train_dataloader()):
        seen.update(batch["caption"])
        assert max(seen.values()) - min(seen[f"p{i}"] for i in range(7)) <= 1
        if number == 20:
            break


def test_batches_of_small_buckets_are_spread_over_the_epochs() -> None:
    order = Order({f"b{i:02d}": [i] for i in range(30)}, 6, seed=5)
    assert np.diff([order._before(epoch).sum() for epoch in range(7)]).tolist() == [5] * 6


def test_a_loader_that_was_made_before_the_resume_follows_it(shards: Path) -> None:
    whole, rest = take(module(shards), 5), module(shards)
    loader, stopped = rest.train_dataloader(), module(shards)
    take(stopped, 3)
    rest.load_state_dict(stopped.state_dict())
    assert next(iter(loader))["key"] == whole[3]["key"]


def test_order_is_made_of_its_arguments_alone() -> None:
    order = Order({"b": range(10, 20), "a": range(10)}, 4, seed=1)
    late = Order({"a": range(10), "b": range(10, 20)}, 4, seed=1)
    assert late.batch(17).tolist() == order.batch(17).tolist()
    assert order.batches_per_epoch == 5


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
