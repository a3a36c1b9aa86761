"""Reading shards that lie elsewhere: commands, limits of what is fetched, the cache, locations, passwords."""

import json
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from failing_server import FailingServer, first_requests_fail
from safetensors.torch import save_file
from small_shards import write_shards
from small_stream import module, same, stream, take

from data import remote
from data.remote import Location, RemoteFile, RemoteShards, Retries, ShardCache, open_source
from magihuman.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 samples of three buckets in nine shards."""
    return write_shards(tmp_path_factory.mktemp("stream") / "shards", per_shard=8)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)


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
