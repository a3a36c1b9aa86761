"""Streaming: the order of samples, resuming, failures of the server, trainings."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import training_stub
from failing_server import FailingServer, Failure, first_requests_fail
from processes import Launcher, assert_same, final_state, seen
from safetensors.torch import save_file
from small_shards import module as local_module
from small_shards import write_shards
from small_stream import keys, module, same, take

from data import remote
from data.shards import Index, ShardWriter
from magihuman.errors import UserError
from magihuman.io.provenance import fingerprint


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 samples of three buckets in nine shards."""
    return write_shards(tmp_path_factory.mktemp("stream") / "shards", per_shard=8)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)


# -- order ----------------------------------------------------------------------------------------------------------


def test_batches_are_those_of_local_reading(shards: Path) -> None:
    local, made = local_module(shards, val_fraction=0.1), module(shards)
    assert made.train_samples == local.train_samples
    assert (made.size, made.sizes, made.codecs, made.contract) == (local.size, local.sizes, "pooled", local.contract)
    read = take(made, 3 * made.train_samples // 4)
    for batch in read:
        numbers = batch["video"][:, 0, 0, 0, 0].int().tolist()
        assert batch["caption"] == [f"no {n}" for n in numbers]
        assert batch["key"] == [f"s{n // 2:03d}_{n % 2:04d}" for n in numbers]
        assert [len(text) for text in batch["text"]] == [1 + n % 4 for n in numbers]
        assert batch["audio"].shape[1] in (0, 25, 13)
        assert batch["video"].shape == (4, 3, 7, 16, 16) or batch["video"].shape == (4, 3, 4, 16, 32)
    assert [int(i) for batch in read for i in batch["index"]] == list(range(4 * len(read)))
    held_out = {key for batch in made.val_dataloader() for key in batch["key"]}
    assert held_out == {key for batch in local.val_dataloader() for key in batch["key"]}
    assert not held_out & set(keys(read))


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 2), (3, 1), (4, 2)])
def test_every_sample_once_per_epoch_split_without_overlap(shards: Path, ranks: int, workers: int) -> None:
    """The workers' samples of an epoch are a partition, and what does not fill a batch waits for the next epoch."""
    size = 2 * ranks
    made = [module(shards, rank, ranks, num_workers=workers, batch_size=size) for rank in range(ranks)]
    total = made[0].train_samples
    counts: Counter[tuple[int, int]] = Counter()
    waiting = 0
    for rank, each in enumerate(made):
        batches = each._batches(rank, ranks)
        for worker in range(workers):
            batches[worker]  # makes its stream
            samples = batches._streams[worker]
            places = [place for _ in range(300) for place in samples.next_batch()]
            last = max(epoch for epoch, _ in places)
            assert last > 3
            # Within three epochs: all of the worker's samples but those that wait for their batch.
            counts.update(place for place in places if place[0] < 3)
    assert set(counts.values()) == {1}
    waiting = 3 * total - len(counts)
    assert 0 <= waiting <= 3 * (2 - 1) * ranks * workers  # fewer than a batch, of three buckets


def test_order_is_shuffled_by_seed_and_epoch(shards: Path) -> None:
    made = module(shards, batch_size=1)
    one, two = (keys(take(made, made.train_samples)) for _ in range(2))
    assert sorted(one) == sorted(two)
    assert len(set(one)) == made.train_samples
    assert one != two
    assert keys(take(module(shards, batch_size=1), made.train_samples)) == one
    assert keys(take(module(shards, batch_size=1, seed=4), made.train_samples)) != one
    # Neither the shards nor the samples of one are in the order of the files.
    file_order = [entry.key for entry in made.reader.index if entry.key in set(one)]
    moves = np.abs(np.argsort([file_order.index(key) for key in one]) - np.arange(len(one)))
    assert moves.mean() > 12
    plain = keys(take(module(shards, batch_size=1, shuffle=0), made.train_samples))
    positions = np.diff([file_order.index(key) for key in plain])
    assert (positions == 1).sum() >= made.train_samples - 9  # whole shards


def test_workers_read_the_batches_of_the_order(shards: Path) -> None:
    read_ahead = take(module(shards, 1, 2, num_workers=2), 15)
    alone = module(shards, 1, 2, num_workers=2)
    batches = alone._batches(1, 2)
    assert same(read_ahead, [batches[number] for number in range(15)])


def test_too_few_shards_are_refused(shards: Path) -> None:
    with pytest.raises(UserError, match="9 shards with training samples are too few for 5 ranks x 2 workers"):
        module(shards, 0, 5, num_workers=2, batch_size=5)


def test_clips_that_wait_for_long_are_named(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module(shards, 0, 2, num_workers=4, batch_size=4)
    said = capsys.readouterr().out
    assert "1 of 3 buckets hold fewer clips than the 8 workers need" in said
    assert "25x64x64 (" in said


def test_a_pattern_chooses_shards(shards: Path) -> None:
    made = module(shards / "shard-{000002..000004}.tar", batch_size=1)
    chosen = set(range(16, 40))
    assert 20 <= made.train_samples <= 24
    read = take(made, 2 * made.train_samples)
    assert {int(batch["video"][0, 0, 0, 0, 0]) for batch in read} <= chosen
    assert len(set(keys(read))) == made.train_samples
    with pytest.raises(UserError, match=r"does not know shard-000009\.tar"):
        module(shards / "shard-{000008..000009}.tar")


def test_shards_that_are_not_chosen_need_not_be_there(shards: Path, tmp_path: Path) -> None:
    for name in ("index.json", "shard-000003.tar", "shard-000004.tar"):
        shutil.copy(shards / name, tmp_path)
    made = module(tmp_path / "shard-{000003..000004}.tar", batch_size=1)
    assert made.sr_size is None  # a sample is read for it
    assert len(set(keys(take(made, made.train_samples)))) == made.train_samples


# -- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_on_the_next_sample(shards: Path, workers: int) -> None:
    whole = {rank: take(module(shards, rank, 2, num_workers=workers), 60) for rank in range(2)}
    for stop in (7, 41) if workers else (1, 7, 20, 41):
        first = module(shards, 0, 2, num_workers=workers)
        take(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
        for rank in range(2):
            rest = module(shards, rank, 2, num_workers=workers)
            rest.load_state_dict(state)
            assert same(take(rest, 60 - stop), whole[rank][stop:])


def test_skipped_batches_are_not_read(shards: Path) -> None:
    """A resumed run reads the shards of its buffers again, not the epochs before."""
    whole = take(module(shards), 100)
    first = module(shards)
    take(first, 90)
    with FailingServer(shards) as server:
        rest = module(server.url)
        rest.load_state_dict(first.state_dict())
        assert same(take(rest, 10), whole[90:])
        assert sum(count for name, count in server.requests.items() if name.endswith(".tar")) <= 14


def test_another_number_of_ranks_begins_a_new_epoch(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = module(shards)
    before = take(first, 20)
    capsys.readouterr()
    total = first.train_samples
    resumed = [module(shards, rank, 2) for rank in range(2)]
    for each in resumed:
        each.load_state_dict(first.state_dict())
    said = capsys.readouterr().out
    assert f"(ranks 1 then, 2 now): a new epoch begins here; about {80 % total} of {total} samples" in said
    assert {each.state_dict()["segment"]["epoch"] for each in resumed} == {80 // total + 1}
    after = [take(each, 30) for each in resumed]
    positions = sorted(int(i) for part in after for batch in part for i in batch["index"])
    assert positions == list(range(80, 80 + 4 * 30))
    assert len(set(keys(before) + keys(after[0] + after[1]))) == total
    # And from there on exactly.
    state = resumed[0].state_dict()
    module(shards, 0, 2).load_state_dict(state)
    assert "the stream continues in the same order behind 200 samples" in capsys.readouterr().out
    again = module(shards, 1, 2)
    again.load_state_dict(state)
    assert "note" not in capsys.readouterr().out
    assert same(take(again, 3), take(resumed[1], 3))


def test_state_of_other_data_is_refused(shards: Path) -> None:
    with pytest.raises(UserError, match="seed: 3 then, 5 now"):
        module(shards, seed=5).load_state_dict(module(shards).state_dict())


# -- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
def test_a_failing_server_loses_nothing(shards: Path, ranges: bool, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = take(module(shards), 36)
    with FailingServer(shards, first_requests_fail, ranges) as server:
        made = module(server.url)
        assert same(take(made, 36), wanted)
        assert set(server.failed) == {"reset", "status", "truncate", "slow", "stall"}
        # Nothing is "slow" that has to be opened again.
        failures = sum(count for kind, count in server.failed.items() if kind != "slow")
        assert made.lost_connections == failures
    with FailingServer(shards, ranges=ranges) as clean:
        take(module(clean.url), 36)
    again = sum(server.sent.values()) / sum(clean.sent.values())
    assert again < (1.2 if ranges else 2)  # without ranges a shard is read from its start again
    assert not made.skipped
    made.teardown("fit")
    said = capsys.readouterr().out
    assert f"{failures} lost connections were opened again" in said
    assert "trying again in" in said


def test_a_connection_that_ends_on_the_way_back_to_its_place_is_tried_again(shards: Path) -> None:
    """Without ranges a shard comes from its start again, and may break off before the byte that is wanted."""

    def fails(name: str, number: int) -> Failure:
        ends = (50_000, 10_000, 30_000)
        return ("truncate", ends[number]) if name.endswith(".tar") and number < len(ends) else None

    with FailingServer(shards, fails, ranges=False) as server:
        made = module(server.url)
        assert same(take(made, 12), take(module(shards), 12))
        assert not made.skipped
        assert made.lost_connections >= 9


def test_two_ranks_with_two_workers_through_failures(shards: Path) -> None:
    """Evidence 5 of issue 14, with real worker processes: the same batches as without failures."""
    with FailingServer(shards, first_requests_fail) as server:
        for rank in range(2):
            settings = {"num_workers": 2, "batch_size": 4}
            assert same(
                take(module(server.url, rank, 2, **settings), 24), take(module(shards, rank, 2, **settings), 24)
            )
        assert sum(server.failed.values()) >= 9


def test_a_shard_that_fails_for_good_is_replaced_counted_and_named(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(name: str, number: int) -> Failure:
        if name != "shard-000004.tar" or number > 2:
            return None
        return ("status", 500) if number else ("reset", 40_000)

    wanted = take(module(shards), 32)
    with FailingServer(shards, fails) as server:
        made = module(server.url, tries=3)
        got = take(made, 32)
    assert server.requests["shard-000004.tar"] == 4  # fine in the second epoch
    changed = 0
    for a, b in zip(got, wanted, strict=True):
        assert a["index"].tolist() == b["index"].tolist()
        changed += sum(x != y for x, y in zip(a["key"], b["key"], strict=True))
        assert [f"no {n}" for n in a["video"][:, 0, 0, 0, 0].int().tolist()] == a["caption"]
    assert 0 < changed == len(made.skipped) <= 8
    assert all(
        "HTTP status 500 (Internal Server Error), 3 tries (shard-000004.tar)" in reason for reason in made.skipped
    )
    said = capsys.readouterr().out
    assert (
        f"shard-000004.tar: HTTP status 500 (Internal Server Error), 3 tries; its last {changed} samples are lost"
        in said
    )


def test_too_many_lost_samples_end_the_training(shards: Path) -> None:
    def fails(name: str, number: int) -> Failure:
        return ("status", 404) if name.endswith(".tar") and int(name[6:12]) % 2 else None

    with FailingServer(shards, fails) as server:
        made = module(server.url)
        with pytest.raises(
            UserError, match=r"of \d+ samples are damaged, more than data.module.max_damaged_share=0.01"
        ):
            take(made, 30)
        assert 8 < len(made.skipped) <= 8 + 4  # one shard is tolerated
        assert max(server.requests.values()) == 1  # what does not exist is asked for once
        assert take(module(server.url, max_damaged_share=1), 30)


def test_a_server_without_any_shard_is_an_error_at_once(shards: Path) -> None:
    with FailingServer(shards, lambda name, number: ("status", 403) if name.endswith(".tar") else None) as server:
        made = module(server.url)
        with pytest.raises(UserError, match=r"s000_0000: HTTP status 403 \(Forbidden\) \(shard-000000.tar\)"):
            assert made.sr_size
        with pytest.raises(UserError, match=r"no sample in http://.* could be read in place of"):
            take(made, 1)


def test_a_damaged_sample_does_not_spoil_those_behind_it(shards: Path) -> None:
    with FailingServer(
        shards, lambda name, number: ("garble", 3_000) if name == "shard-000001.tar" else None
    ) as server:
        made = module(server.url)
        take(made, 36)
    assert len(made.skipped) == 1
    assert "checksum differs (shard-000001.tar)" in made.skipped.pop()


def test_a_shard_that_is_cut_off_is_not_tried_again(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    cut = copy / "shard-000002.tar"
    with cut.open("r+b") as file:
        file.truncate(cut.stat().st_size // 2)
    for where in (None, copy, f"pipe:cat {copy}/index.json"):
        with FailingServer(copy) as server:
            made = module(where or server.url, max_damaged_share=1)
            take(made, 18)
            assert {"cut off" in reason for reason in made.skipped} == {True}
            assert 2 <= len(made.skipped) <= 5
            assert made.lost_connections == 0


# -- training -------------------------------------------------------------------------------------------------------

TRAINING = [
    "+recipe=pretrain", "data=stream", "data.module.num_workers=%d", "data.module.shuffle=6", "data.module.timeout=2",
    "trainer.max_steps=9", "checkpoint.every_steps=3", "trainer.devices=%d", "strategy=%s", "callbacks.validation=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 small clips in four shards, with and without sound."""
    folder = tmp_path_factory.mktemp("stream") / "clips"
    folder.mkdir()
    made = []
    for shard in range(4):
        with ShardWriter(folder / f"shard-{shard:06d}.tar") as writer:
            for number in range(8 * shard, 8 * shard + 8):
                bucket = "9x16x16" + "+a" * (number % 3 > 0)
                writer.add(
                    f"clip-{number:02d}_0000", bucket, training_stub.sample(number, 3, number % 3 > 0), {"caption": ""}
                )
        made.append((f"shard-{shard:06d}.tar", writer.entries))
    Index("tiny", training_stub.CONTRACT.to_dict(), made).save(folder)
    save_file({"text": torch.zeros(1, 5)}, folder / "null_text.safetensors")
    return folder


def launcher(clips: Path, workers: int) -> Launcher:
    more = [each.replace("workers=%d", f"workers={workers}") for each in TRAINING]
    return Launcher(clips, [*more, "+callbacks.spy={_target_: training_stub.Spy}"])


def test_a_training_from_a_server_that_fails_ends_as_one_from_a_folder(clips: Path, tmp_path: Path) -> None:
    values = {"data.module.num_workers=%d": 0, "trainer.devices=%d": 1, "strategy=%s": "single"}
    overrides = [word % values[word] if word in values else word for word in TRAINING]
    training_stub.train_here(tmp_path / "folder", clips, overrides)
    with FailingServer(clips, first_requests_fail) as server:
        training_stub.train_here(tmp_path / "server", clips, [*overrides, f"data.module.shards={server.url}"])
    mine, theirs = final_state(tmp_path / "server"), final_state(tmp_path / "folder")
    for part in ("state_dict", "optimizer_states", "recipe", "StreamDataModule"):
        assert_same(mine[part], theirs[part], part)
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("server", "folder")]
    assert records[0]["lost_connections"] > 0
    assert "lost_connections" not in records[1]
    assert [r["parents"][0]["sha256"] for r in records] == [fingerprint(clips / "index.json")["sha256"]] * 2
    assert records[0]["parents"][0]["name"] == server.url
    assert "damaged_samples" not in records[0]


@pytest.mark.slow
def test_a_training_from_a_server_that_fails_is_killed_and_ends_as_one_from_a_folder(
    clips: Path, tmp_path: Path
) -> None:
    launch = launcher(clips, 0)
    assert launch.run(tmp_path / "through", "single", 1) == [0]
    with FailingServer(clips, first_requests_fail) as server:
        url = f"data.module.shards={server.url}"
        kill = "+callbacks.die={_target_: training_stub.DieAt, batch: 5}"
        assert launch.run(tmp_path / "killed", "single", 1, url, kill) == [-9]
        assert launch.run(tmp_path / "killed", "single", 1, url) == [0]
    mine, theirs = final_state(tmp_path / "killed"), final_state(tmp_path / "through")
    for part in ("state_dict", "optimizer_states", "recipe", "StreamDataModule"):
        assert_same(mine[part], theirs[part], part)
    assert seen(tmp_path / "killed")[0] == list(range(6, 18))


@pytest.mark.slow
def test_two_ranks_with_different_buckets_train_and_resume(clips: Path, tmp_path: Path) -> None:
    launch = launcher(clips, 0)
    assert launch.run(tmp_path / "through", "ddp", 2) == [0, 0]
    with FailingServer(clips, first_requests_fail) as server:
        url = f"data.module.shards={server.url}"
        kill = "+callbacks.die={_target_: training_stub.DieAt, batch: 5}"
        assert launch.run(tmp_path / "killed", "ddp", 2, url, kill)[0] == -9
        assert launch.run(tmp_path / "killed", "ddp", 2, url) == [0, 0]
    mine, theirs = final_state(tmp_path / "killed"), final_state(tmp_path / "through")
    for part in ("state_dict", "optimizer_states", "recipe", "StreamDataModule"):
        assert_same(mine[part], theirs[part], part)
    by_rank = seen(tmp_path / "killed")
    assert by_rank == {0: list(range(6, 18, 2)), 1: list(range(7, 18, 2))}
