"""Streaming: the order of samples, resuming, failures of the server, limits of what is fetched."""

import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import training_stub
from failing_server import FailingServer, Failure
from processes import Launcher, assert_same, final_state, seen
from safetensors.torch import save_file
from small_shards import module as local_module
from small_shards import write_shards

from data import remote
from data.remote import Location, RemoteFile, RemoteShards, Retries, ShardCache, open_source
from data.shards import Index, ShardWriter
from data.stream import StreamDataModule
from magihuman.errors import UserError
from magihuman.io.provenance import fingerprint


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 samples of three buckets in nine shards."""
    return write_shards(tmp_path_factory.mktemp("stream") / "shards", per_shard=8)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)


def module(where: object, rank: int = 0, ranks: int = 1, **settings: Any) -> StreamDataModule:
    """A data module as a trainer's rank sees it."""
    chosen = {
        "batch_size": 4,
        "val_fraction": 0.1,
        "seed": 3,
        "num_workers": 0,
        "shuffle": 12,
        "timeout": 0.3,
        **settings,
    }
    made = StreamDataModule(str(where), **chosen)
    made.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank, world_size=ranks, training=True, is_global_zero=rank == 0
    )
    made.setup("fit")
    return made


def stream(made: StreamDataModule) -> Iterator[dict[str, Any]]:
    """Batches, counted as a training counts them."""
    for batch in made.train_dataloader():
        yield made.on_after_batch_transfer(batch, 0)


def take(made: StreamDataModule, count: int) -> list[dict[str, Any]]:
    batches = stream(made)
    return [next(batches) for _ in range(count)]


def keys(batches: list[dict[str, Any]]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    return len(a) == len(b) and all(
        x["key"] == y["key"] and torch.equal(x["video"], y["video"]) and torch.equal(x["index"], y["index"])
        for x, y in zip(a, b, strict=True)
    )


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
    """The lanes of an epoch are a partition, and what does not fill a batch waits for the next epoch."""
    size = 2 * ranks
    made = [module(shards, rank, ranks, num_workers=workers, batch_size=size) for rank in range(ranks)]
    total = made[0].train_samples
    counts: Counter[tuple[int, int]] = Counter()
    waiting = 0
    for rank, each in enumerate(made):
        batches = each._batches(rank, ranks)
        for worker in range(workers):
            batches[worker]  # makes the lane
            lane = batches._lanes[worker]
            places = [place for _ in range(300) for place in lane.next_batch()]
            last = max(epoch for epoch, _ in places)
            assert last > 3
            # Within three epochs: all of the lane's samples but those that wait for their batch.
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


def test_workers_read_what_their_lanes_say(shards: Path) -> None:
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
    assert {each.state_dict()["leg"]["epoch"] for each in resumed} == {80 // total + 1}
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

KINDS: list[Failure] = [
    ("reset", 30_000), ("status", 500), ("truncate", 50_000), ("slow", 8_000), ("stall", 10_000), ("reset", 0), ("status", 503),
]  # fmt: skip


def first_requests_fail(name: str, number: int) -> Failure:
    """The first two requests of every shard fail, each shard in another way."""
    if not name.endswith(".tar") or number > 1:
        return None
    return KINDS[(int(name[6:12]) + number) % len(KINDS)]


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


# -- pipes, caching, addresses --------------------------------------------------------------------------------------


def test_pipes(shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wanted = take(module(shards), 20)
    made = module(f"pipe:cat {shards}/index.json")
    assert same(take(made, 20), wanted)
    once = tmp_path / "failed"
    # The first command of each shard stops half-way with an error, and the first of all hangs.
    flaky = (
        f"pipe:f={shards}/index.json; m={tmp_path}/$(basename $f); if [ -e $m ]; then cat $f; else touch $m; "
        f"head -c 20000 $f; case $f in *.json) cat $f | tail -c +20001;; *) [ -e {once} ] || (touch {once}; sleep 9); "
        "exit 3;; esac; fi"
    )
    flaked = module(flaky)
    assert same(take(flaked, 20), wanted)
    assert flaked.lost_connections >= 3
    said = capfd.readouterr().out
    assert "the command ended with status 3" in said or "no answer (timeout)" in said
    with pytest.raises(UserError, match=r"index\.json cannot be read \(the command ended with status 7, 5 tries"):
        module("pipe:exit 7; cat index.json")


def test_no_fetched_name_reaches_a_shell_or_leaves_the_folder(shards: Path, tmp_path: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    for name in (
        "a;touch pwned;.tar",
        "$(touch pwned).tar",
        "a b.tar",
        "-x.tar",
        "..",
        "x\n.tar",
        "a?b.tar",
        "a#b.tar",
    ):
        index["shards"][3]["name"] = name
        (tmp_path / "index.json").write_text(json.dumps(index))
        for where in (f"pipe:cd {tmp_path}; cat index.json", tmp_path):
            with pytest.raises(UserError, match=r"names the shard"):
                module(where)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": -512}, "states no place"),
        ({"bytes": 1 << 40}, "states no place for s008_0000, or one of more than"),
        ({"offset": (1 << 63) - 1}, "states no place"),
    ],
)
def test_an_index_that_states_impossible_places_is_refused(
    shards: Path, tmp_path: Path, change: dict[str, int], message: str
) -> None:
    index = json.loads((shards / "index.json").read_text())
    index["shards"][2]["samples"][0] |= change
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        module(tmp_path)


def test_an_index_is_limited_and_checked(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.json").write_text("<html>not here</html>")
    with FailingServer(tmp_path) as server:
        with pytest.raises(UserError, match=rf"^{server.url}: index.json cannot be read \(JSONDecodeError"):
            module(server.url)
        (tmp_path / "index.json").unlink()
        with pytest.raises(
            UserError, match=r"index\.json cannot be read \(HTTP status 404 \(Not Found\)\); give the folder"
        ):
            module(server.url)
    monkeypatch.setattr(remote, "MAX_INDEX_BYTES", 1000)
    with pytest.raises(UserError, match="has more than 1000 bytes"):
        module(shards)


def test_no_memory_for_what_does_not_come(shards: Path, tmp_path: Path) -> None:
    """A sample of 3 GB in the index of a small file takes no memory."""
    import tracemalloc

    index = json.loads((shards / "index.json").read_text())
    index["shards"][0]["samples"][0]["bytes"] = 3 << 30
    (tmp_path / "index.json").write_text(json.dumps(index))
    shutil.copy(shards / "shard-000000.tar", tmp_path)
    with FailingServer(tmp_path) as server:
        reader = RemoteShards(server.url, Retries(1, 1.0))
        tracemalloc.start()
        with pytest.raises(remote.SampleError, match="cut off"):
            reader.read(0)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
        tracemalloc.stop()


def test_cache(shards: Path, tmp_path: Path) -> None:
    sizes = sorted(file.stat().st_size for file in shards.glob("*.tar"))
    wanted = take(module(shards), 36)
    with FailingServer(shards, first_requests_fail) as server:
        settings = {"cache_dir": str(tmp_path), "cache_gb": 1}
        assert same(take(module(server.url, **settings), 36), wanted)
        before = sum(server.requests.values())
        assert same(take(module(server.url, **settings), 36), wanted)
        assert sum(server.requests.values()) == before + 1  # index.json
        # Another data set with the same names has its own copies.
        other = write_shards(tmp_path / "other", per_shard=9)
        with FailingServer(other) as second:
            assert same(take(module(second.url, **settings), 9), take(module(other), 9))
    # A limit of three shards, with a file of somebody else beside.
    limited = tmp_path / "limited"
    limited.mkdir()
    (limited / "mine.tar").write_bytes(bytes(10))
    limit = 3 * sizes[-1]
    held = []
    with FailingServer(shards) as server:
        made = module(server.url, cache_dir=str(limited), cache_gb=limit / 1e9)
        batches = stream(made)
        got = []
        for _ in range(36):
            got.append(next(batches))
            held.append(sum(file.stat().st_size for file in (limited / remote.CACHE).glob("*/*")))
        assert same(got, wanted)
        assert sizes[0] < max(held) <= limit
    assert (limited / "mine.tar").exists()
    with FailingServer(shards) as server:
        assert same(take(module(server.url, cache_dir=str(limited), cache_gb=1e-6), 5), wanted[:5])


def test_the_cache_keeps_what_was_used_last(shards: Path, tmp_path: Path) -> None:
    location, names = Location.parse(str(shards)), [f"shard-{n:06d}.tar" for n in range(3)]
    cache = ShardCache(tmp_path, "data", 20_000)
    for turn, name in enumerate([names[0], names[1], names[0], names[2]]):
        path = cache.path(
            name,
            10_000,
            lambda name=name: RemoteFile(lambda start: open_source(location, name, start, 1), name, Retries()),
        )
        assert path is not None
        assert path.read_bytes() == (shards / name).read_bytes()[:10_000]
        if turn < 2:
            os.utime(path, (turn, turn))
    assert sorted(file.name for file in path.parent.iterdir()) == [names[0], names[2]]


def test_a_command_ends_with_all_that_it_started(tmp_path: Path) -> None:
    command = f"pipe:sleep 600 & echo $! > {tmp_path}/pid; echo; wait; cat index.json"
    source = open_source(Location.parse(command), "index.json", 0, 5)
    assert source.read1(1) == b"\n"
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    assert stat.exists()
    source.close()
    for _ in range(100):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("the command's child lives on")


def test_a_full_cache_disk_is_said(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardCache, "path", full)
    with FailingServer(shards) as server:
        assert same(take(module(server.url, cache_dir=str(tmp_path)), 9), take(module(shards), 9))
    assert capsys.readouterr().out.count("cache_dir: No space left on device; reading without it") == 1


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("https://h/a/b", "https://h/a/b/N", "https://h/a/b"),
        ("https://h/a/b/", "https://h/a/b/N", "https://h/a/b"),
        ("http://u:secret@h:81/b/index.json?sig=x", "http://u:secret@h:81/b/N?sig=x", "http://h:81/b"),
        ("http://h/b/s-{0..3}.tar", "http://h/b/N", "http://h/b/s-{0..3}.tar"),
        ("/data/b", "/data/b/N", "/data/b/index.json"),
        ("file:///data/b/index.json", "/data/b/N", "/data/b/index.json"),
        ("pipe:aws s3 cp s3://b/c/index.json -", "aws s3 cp s3://b/c/N -", "pipe:aws s3 cp s3://b/c/index.json -"),
        ("pipe:x s3://b/s-{0..3}.tar -", "x s3://b/N -", "pipe:x s3://b/s-{0..3}.tar -"),
    ],
)
def test_locations(text: str, address: str, shown: str) -> None:
    location = Location.parse(text)
    assert location.at("N") == address
    assert str(location) == shown
    assert location.names() == (["s-0.tar", "s-1.tar", "s-2.tar", "s-3.tar"] if "{" in text else None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://bucket/shards", "s3:// is read through a command .*pipe:aws s3 cp s3://bucket/shards/index.json -"),
        ("pipe:aws s3 ls", "names 0 files"),
        ("pipe:cat a/index.json b/index.json", "names 2 files"),
    ],
)
def test_other_locations_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Location.parse(text)


def test_settings_out_of_range(shards: Path) -> None:
    for wrong in ({"shuffle": -1}, {"cache_gb": 0}, {"tries": 0}, {"timeout": 0}, {"batch_size": 0}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))}="):
            module(shards, **wrong)


def test_a_password_in_the_address_goes_to_its_server_only(shards: Path) -> None:
    with FailingServer(shards) as target:

        class Guarded(BaseHTTPRequestHandler):
            """Wants user u with the password p@ss, and sends elsewhere whoever has it."""

            def do_GET(self) -> None:
                if self.headers.get("Authorization") != "Basic dTpwQHNz":
                    self.send_error(401)
                    return
                self.send_response(302)
                self.send_header("Location", f"{target.url}/{self.path.rpartition('/')[2]}")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        guard = ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
        threading.Thread(target=guard.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        host = f"127.0.0.1:{guard.server_address[1]}"
        made = module(f"http://u:p%40ss@{host}/b")
        assert same(take(made, 9), take(module(shards), 9))
        assert made.reader.name == f"http://{host}/b"
        assert not target.passwords
        with pytest.raises(UserError, match=rf"^data.module.shards=http://{host}/b: .* status 401 \(Unauthorized\)"):
            module(f"http://u:wrong@{host}/b")
        guard.shutdown()
        guard.server_close()


def test_null_text(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert module(shards).null_text is None
    assert "null_text.safetensors is not there (No such file or directory)" in capsys.readouterr().out
    copy = shutil.copytree(shards, tmp_path / "copy")
    save_file({"text": torch.full((2, 26), 3.0).half()}, copy / "null_text.safetensors")
    with FailingServer(copy, lambda name, number: ("status", 503) if number == 0 else None) as server:
        text = module(server.url).null_text
    assert text is not None
    assert torch.equal(text, torch.full((2, 26), 3.0))
