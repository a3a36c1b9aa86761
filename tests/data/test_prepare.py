"""data.prepare: what becomes of odd and broken files, resumption after a kill, crashes, and what stands in shards."""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_media import Expected, build, movie, prepare_bad
from fake_bundle import fake_bundle

from data import encode
from data import prepare as prepare_module
from data.clip_plan import PlannedClip
from data.options import PrepareOptions
from data.prepare import prepare
from data.prepare_report import PrepareReport, form_note
from data.shards import Shards
from magihuman.codecs.tiny_captions import FORMS
from magihuman.errors import UserError
from magihuman.media.container import MediaError

REPO = Path(__file__).resolve().parents[2]
CODECS = "codecs=pooled_bundle:build"


def folder_of_clips(folder: Path, count: int, prefix: str = "c") -> Path:
    folder.mkdir()
    for i in range(count):
        movie(folder / f"{prefix}{i:02d}.mp4", seconds=1.0 + i / 25)  # all of different bytes
        (folder / f"{prefix}{i:02d}.txt").write_text(f"clip number {i}")
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_clips(tmp_path_factory.mktemp("clips") / "media", 12)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Expected]]:
    folder = tmp_path_factory.mktemp("odd") / "media"
    return folder, build(folder)


def prepared(source: Path, output: Path, **options: Any) -> PrepareReport:
    return prepare(PrepareOptions(str(source), str(output), **{"progress": False, **options}))


def command(source: Path, output: Path, *settings: str) -> list[str]:
    given = dict(word.split("=", 1) for word in (CODECS, "shard_clips=3", "workers=2", "progress=false", *settings))
    words = [f"{key}={value}" for key, value in given.items()]
    return [sys.executable, "-m", "data.prepare", f"input={source}", f"output={output}", *words]


def contents(output: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in output.iterdir() if p.suffix == ".tar" or p.name == "index.json"}


@pytest.fixture(scope="module")
def whole(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "shards"
    prepared(clips, output, codecs=CODECS[7:], workers=2, shard_clips=3)
    return output


@pytest.fixture(scope="module")
def permissive(
    odd: tuple[Path, dict[str, Expected]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The odd files prepared with everything accepted: output folder and report."""
    output = tmp_path_factory.mktemp("permissive") / "out"
    return output, prepare_bad(odd[0], output, CODECS, "silent=true", "images=true", "captions=optional")


@pytest.mark.parametrize("allowed", [False, True], ids=["strict", "allowed"])
def test_every_odd_file_gets_what_it_should(
    odd: tuple[Path, dict[str, Expected]], tmp_path: Path, allowed: bool, request: pytest.FixtureRequest
) -> None:
    folder, expected = odd
    output = tmp_path / "out"
    if allowed:
        output, report = request.getfixturevalue("permissive")
    else:
        report = prepare_bad(folder, output, CODECS)
    got = {row["file"]: row for row in report["per_file"]}
    assert len(expected) >= 80
    assert set(got) == {os.fsencode(name).decode("utf-8", "surrogateescape") for name in expected}
    wrong = []
    for name, what in expected.items():
        row = got[name]
        status, clips, reason = what.status, what.clips if what.status == "taken" else 0, what.reason
        if allowed and (what.allowed or status == "taken"):
            status, clips, reason = what.allowed or status, what.allowed_clips, ""
        if (row["status"], row["clips"]) != (status, clips) or reason not in row["reason"]:
            wrong.append((name, status, clips, reason, row))
        if status != "taken":
            assert row["reason"], name
    assert not wrong, wrong
    assert {row["problem"].split(" (")[0] for row in report["table_problems"]} == {
        "line 3 is not JSON",
        "line 4 has no caption",
    }
    taken = sum(row["clips"] for row in report["per_file"])
    assert len(Shards(output)) == taken == report["clips"]


def test_the_report_says_what_reading_changed(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "media").mkdir()
    for name, colour in (("clear.png", (90, 60, 30, 100)), ("opaque.png", (30, 60, 90, 255))):
        Image.new("RGBA", (64, 64), colour).save(tmp_path / "media" / name)
    report = prepared(
        tmp_path / "media", tmp_path / "out", codecs=CODECS[7:], workers=1, images=True, captions="optional"
    )
    assert {row.file: row.note for row in report.files} == {
        "clear.png": "its transparency is dropped",
        "opaque.png": "",
    }
    assert "| clear.png | taken | 1 | its transparency is dropped |" in (tmp_path / "out" / "report.md").read_text()
    assert "1 x taken, its transparency is dropped" in report.summary()


def samples(output: Path) -> dict[str, Any]:
    reader = Shards(output)
    read = [reader.read(i) for i in range(len(reader))]
    return {f"{s.meta['source']}@{s.meta['start']:g}": s for s in read}


def test_odd_but_good_files_hold_the_right_pictures_and_sound(permissive: tuple[Path, dict[str, Any]]) -> None:
    """The bright quarter of the drawn frame must be where the display matrix puts it, the tone where it began."""
    found = samples(permissive[0])
    plain = found["copy-of-plain.mp4@0"].tensors
    assert plain["video"].shape == (3, 7, 16, 16)
    assert plain["audio"].shape == (25, 32)
    assert plain["video"].dtype == plain["audio"].dtype == plain["text"].dtype == torch.float16

    def bright(name: str) -> tuple[bool, ...]:
        """Which quarters are red: top left, top right, bottom left, bottom right (the lowest rows hold the bar)."""
        red = found[name].tensors["video"][0, 0].float()
        return tuple(bool(red[y, x] > 0) for y in (4, 9) for x in (4, 11))

    for name in ("container.webm", "container.ts", "container.avi", "10-bit.mp4", "chroma-444.mp4", "hd.mp4"):
        assert bright(f"{name}@0") == (True, False, False, False), name
    # A display matrix turns counter-clockwise: at 90 degrees the top left goes to the bottom left.
    assert bright("rotated-90.mp4@0") == (False, False, True, False)
    assert bright("rotated-180.mp4@0") == (False, False, False, True)
    assert bright("rotated-270.mp4@0") == (False, True, False, False)
    assert bright("still-turned.jpg@0") == (False, True, False, False)

    def loudness(name: str) -> torch.Tensor:
        return found[name].tensors["audio"].float().abs().amax(1)  # per frame

    late, short = loudness("sound-late.mp4@0"), loudness("sound-short.mp4@0")
    assert late[:9].max() < 0.02 < 0.2 < late[11:24].min()
    assert short[14:].max() < 0.02 < 0.2 < short[1:12].min()
    for name in ("rate-8000.mp4", "rate-44100.mp4", "rate-48000.mp4", "pcm.mov", "container.webm"):
        assert loudness(f"{name}@0")[2:23].min() > 0.2, name
        assert loudness(f"{name}@0").max() < 0.6, name
    assert "audio" not in found["sound-none.mp4@0"].tensors
    assert not found["sound-silent.mp4@0"].meta["has_audio"]
    assert found["still.png@0"].tensors["video"].shape == (3, 1, 16, 16)
    assert [found[f"long.mp4@{start}"].meta["start"] for start in (0, 1, 2)] == [0, 1, 2]
    assert found["caption-bom.mp4@0"].meta["caption"] == "a bar\nover two lines"
    assert found["caption-csv.mp4@0"].meta["caption"] == "a bar, in a table"
    assert found["talk/caption-nested.mp4@0"].meta["caption"] == "below"
    assert found["caption-missing.mp4@0"].meta["caption"] == ""
    # The bar of green moves right once a second, whatever the file's frame rate: its place at half time.
    for name in ("fps-12.mp4", "fps-24.mp4", "fps-30.mp4", "fps-60.mp4", "fps-ntsc.mp4"):
        green = found[f"{name}@0"].tensors["video"][1, 3, 14].float()  # latent frame 3: frames 9 to 12
        reference = plain["video"][1, 3, 14].float()
        assert (green - reference).abs().max() < 0.75, name  # at most one column off
        assert abs(float((green > -0.5).float().argmax()) - float((reference > -0.5).float().argmax())) <= 1, name


def test_killed_at_random_points_and_resumed_gives_the_same_bytes(clips: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "shards"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills = 0
    for shards_wanted in (0, 1, 2):
        process = subprocess.Popen(
            command(clips, output, "workers=1"), cwd=REPO, env=environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            looked = (output / ".work" / "seen.jsonl").exists()
            if looked and len(list(output.glob("*.tar"))) >= shards_wanted:
                break
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 3
    assert not (output / "index.json").exists()
    prepared(clips, output, codecs=CODECS[7:], workers=2, shard_clips=3)
    assert contents(output) == contents(whole)
    assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in whole.iterdir())
    keys = [entry.key for entry in Shards(output).entries]
    assert len(keys) == len(set(keys)) == 12


def test_number_of_workers_changes_nothing_and_a_finished_run_is_left_alone(
    clips: Path, whole: Path, tmp_path: Path
) -> None:
    prepared(clips, tmp_path / "one", codecs=CODECS[7:], workers=1, shard_clips=3)
    assert contents(tmp_path / "one") == contents(whole)
    before = {p.name: p.stat().st_mtime_ns for p in whole.iterdir() if p.is_file()}
    again = prepared(clips, whole, codecs=CODECS[7:], workers=1, shard_clips=3)
    assert again.clips == 12
    assert {p.name: p.stat().st_mtime_ns for p in whole.iterdir() if p.is_file()} == before


def stored(output: Path) -> dict[str, bytes]:
    """Bytes of every sample by key; exactly these are in the tars."""
    index = json.loads((output / "index.json").read_text())
    found = {
        entry["key"]: (output / shard["name"]).read_bytes()[entry["offset"] : entry["offset"] + entry["bytes"]]
        for shard in index["shards"]
        for entry in shard["samples"]
    }
    names = []
    for file in output.glob("*.tar"):
        with tarfile.open(file) as tar:
            names += [name.split(".")[0] for name in tar.getnames() if name.endswith(".json")]
    assert sorted(names) == sorted(found)
    return found


def same_size(path: Path, size: int) -> None:
    """Pad an mp4 with an empty box to a size."""
    missing = size - path.stat().st_size
    with path.open("ab") as file:
        file.write(struct.pack(">I4s", missing, b"free") + bytes(missing - 8))


@pytest.fixture
def copy(clips: Path, whole: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the clips and of their shards of 3 clips, with all times."""
    return shutil.copytree(clips, tmp_path / "media"), shutil.copytree(whole, tmp_path / "shards")


def test_changes_of_the_input_cost_the_clips_that_they_concern(
    copy: tuple[Path, Path], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    media, output = copy

    def again(source: Path = media, target: Path = output) -> str:
        prepared(source, target, codecs=CODECS[7:], workers=1, shard_clips=3)
        return capsys.readouterr().err.rpartition(": ")[2]

    before = contents(output)
    assert again() == ""  # the files are copies: other times, the same bytes
    assert contents(output) == before
    # One more clip, which sorts into the middle.
    movie(media / "c05b.mp4", seconds=1.5)
    (media / "c05b.txt").write_text("one more")
    assert again() == "12 clips kept, 1 encoded, 0 removed\n"
    after = contents(output)
    assert {name: after[name] for name in before if name.endswith(".tar")}.items() <= before.items()
    # A file of the same size and time of modification in place of another, a new caption, and a removed file.
    status = (media / "c00.mp4").stat()
    movie(media / "c00.mp4", seconds=1.0, width=32, height=32)
    same_size(media / "c00.mp4", status.st_size)
    os.utime(media / "c00.mp4", ns=(status.st_atime_ns, status.st_mtime_ns))
    (media / "c07.txt").write_text("another caption")
    (media / "c11.mp4").unlink()
    assert again() == "10 clips kept, 2 encoded, 1 removed\n"
    old, new = stored(whole), stored(output)
    changed = {key for key in old if old[key] != new.get(key)}
    assert sorted(key[:3] for key in changed) == ["c00", "c07", "c11"]
    # All at once gives the same samples.
    again(media, tmp_path / "all at once")
    assert stored(tmp_path / "all at once") == new
    reader = Shards(output)
    assert list(reader.index.rows["shard"]) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    captions = {s.meta["source"]: s.meta["caption"] for s in map(reader.read, range(len(reader)))}
    assert captions["c07.mp4"] == "another caption"
    # A sample that was damaged since is encoded again when it would be copied.
    with (output / reader.index.shards[0]).open("r+b") as file:
        file.seek(reader.index[0].offset + 700)
        file.write(b"damage")
    (media / f"{reader.index[1].key[:3]}.mp4").unlink()
    again()
    assert stored(output).items() <= new.items()
    assert len(stored(output)) == 11


def test_an_update_that_is_killed_leaves_the_old_shards_and_goes_on(copy: tuple[Path, Path], tmp_path: Path) -> None:
    media, output = copy
    for i in range(12, 20):
        movie(media / f"c{i}.mp4", seconds=1.0 + i / 25)
        (media / f"c{i}.txt").write_text(f"clip number {i}")
    (media / "c01.mp4").unlink()
    reference = shutil.copytree(output, tmp_path / "reference")
    prepared(media, reference, codecs=CODECS[7:], workers=1, shard_clips=3)
    before = stored(output)
    process = subprocess.Popen(command(media, output, "workers=1"), cwd=REPO, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(output.glob("*.tar"))) < 6:
        time.sleep(0.002)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    reader = Shards(output)
    assert [reader.read(i).meta["caption"] for i in range(12)] == [f"clip number {i}" for i in range(12)]
    prepared(media, output, codecs=CODECS[7:], workers=2, shard_clips=3)
    assert contents(output) == contents(reference)
    assert len(stored(output)) == 19
    assert {key: data for key, data in before.items() if key[:3] != "c01"}.items() <= stored(output).items()


def test_output_of_other_settings_or_files_is_refused(clips: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"of other settings \(shard_clips: 3 then, 4 now\); delete it or choose another"
    ):
        prepared(clips, whole, codecs=CODECS[7:], shard_clips=4)
    with pytest.raises(UserError, match=r"shards of other files: 12 of its 12 clips are not in input=.* delete it or"):
        prepared(folder_of_clips(tmp_path / "others", 1, "d"), whole, codecs=CODECS[7:], shard_clips=3)
    (copy := tmp_path / "copy").mkdir()
    (copy / "shard-000000.tar").touch()
    with pytest.raises(UserError, match="holds shards without notes on their making; delete it or choose another"):
        prepared(clips, copy, codecs=CODECS[7:])


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(clips: Path, whole: Path, tmp_path: Path) -> None:
    import resource

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # a shard has 45 kB, other files less

    output = tmp_path / "shards"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command(clips, output), cwd=REPO, env=environment, capture_output=True, text=True,
        preexec_fn=small_files_only,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: output={output} cannot be written (File too large); make room")
    assert result.stderr.count("\n") == 1
    assert not list(output.glob("*.tar"))
    prepared(clips, output, codecs=CODECS[7:], workers=1, shard_clips=3)
    assert contents(output) == contents(whole)


def test_a_file_that_kills_its_process_costs_only_itself(tmp_path: Path) -> None:
    clips = folder_of_clips(tmp_path / "media", 7)
    deadly = clips / "c03.mp4"
    movie(deadly, seconds=1.0, width=96, height=96)
    prepared(
        clips, tmp_path / "shards", codecs="pooled_bundle:deadly", workers=2, shard_clips=3,

    )  # fmt: skip
    report = json.loads((tmp_path / "shards" / "report.json").read_text())
    status = {row["file"]: (row["status"], row["reason"]) for row in report["per_file"]}
    assert status.pop("c03.mp4") == (
        "rejected",
        "crashes the decoder (its process died twice; the same command tries again)",
    )
    assert set(status.values()) == {("taken", "")}
    first = Shards(tmp_path / "shards")
    assert len(first) == 6
    # The same command tries again what may have been killed for its memory, copies the rest, and then it is finished.
    again = command(clips, tmp_path / "shards", "codecs=pooled_bundle:deadly")
    made = []
    for _ in range(2):
        result = subprocess.run(again, cwd=REPO, env={**os.environ, "SPARED": "1"}, capture_output=True, text=True)
        assert "7 clips (" in result.stdout, result.stderr
        made.append((contents(tmp_path / "shards"), "6 clips kept, 1 encoded" in result.stderr))
    assert made == [(made[0][0], True), (made[0][0], False)]
    found = Shards(tmp_path / "shards")
    before = {entry.key: first.index[i].crc for i, entry in enumerate(first.entries)}
    assert before.items() <= {entry.key: entry.crc for entry in found.entries}.items()


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        *[(OSError(number, "x"), True) for number in (errno.EIO, errno.EMFILE, errno.EACCES, errno.ENOENT)],
        (MemoryError(), True),
        (OSError("image file is truncated"), False),
        (ValueError("x"), False),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_only_an_error_of_the_file_itself_is_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, passes: bool, wrapped: bool
) -> None:
    def fail(path: str) -> Any:
        if wrapped:
            raise MediaError("cannot be read: x") from error
        raise error

    monkeypatch.setattr(encode, "open_bundle", lambda name, device: fake_bundle())
    monkeypatch.setattr(encode, "MediaReader", fail)
    clips = [PlannedClip(f"k_{i}", "/a.mp4", "a.mp4", "x", float(i), 25, 64, 64, False, "") for i in range(2)]
    job = encode.ShardJob(tmp_path / "a.tar", clips, PrepareOptions(str(tmp_path), str(tmp_path / "out")), {}, {})
    result = encode.write_shard(job, lambda path: None, frozenset())
    assert set(result.rejected) == {"k_0", "k_1"}
    assert result.transient == (frozenset(result.rejected) if passes else frozenset())
    assert all(why.endswith("(the same command tries again)") == passes for why in result.rejected.values())


@pytest.mark.parametrize(
    ("number", "file", "message"),
    [
        (errno.EMFILE, None, r"^data.prepare failed \(.*Too many open files\); give the same command again$"),
        (errno.EACCES, "media/a.mp4", r"^data.prepare failed \(.*Permission denied: .*media/a.mp4'\)"),
        (errno.ENOSPC, None, r"^output=.*out cannot be written \(No space left on device\); make room"),
        (errno.EACCES, "out/a.tar", r"^output=.*out cannot be written \(Permission denied\)"),
    ],
)
def test_the_output_is_named_only_where_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, file: str | None, message: str
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(number, os.strerror(number), *([] if file is None else [str(tmp_path / file)]))

    (tmp_path / "media").mkdir()
    monkeypatch.setattr(prepare_module, "list_files", fail)
    with pytest.raises(UserError, match=message):
        prepared(tmp_path / "media", tmp_path / "out", codecs=CODECS[7:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["wrokers=2"], "unknown setting wrokers, did you mean 'workers'?"),
        (["workers=two"], "workers='two' should be an integer"),
        (["silent=perhaps"], "silent='perhaps' should be true or false"),
        (["frames=24"], "frames=24: the video codec needs 4k+1 frames, for example 25"),
        (["sizes=64"], "sizes='64' should look like 448x256"),
        (["sizes=66x64"], "sizes=66x64 cannot be trained: height must be divisible by 4 and width by 4; the nearest"),
        (["codecs=tiny", "sizes=64x64,60x60"], "60x60 cannot be trained: height must be divisible by 16 and width by"),
        (["pixels=true", "sizes=66x60"], "sizes=66x60 cannot be trained: height must be divisible by 4 and width by 4"),
        (["codecs=toy"], "codecs 'toy' are unknown; choose one of tiny, scene, released"),
        (["captions=maybe"], "captions='maybe' should be one of required, optional"),
        (["table=nowhere.csv"], "table=nowhere.csv is not a file ending in .csv, .tsv, .jsonl, .json; give"),
        (["shard_clips=0"], "shard_clips=0 is out of range; give at least 1"),
        (["silent"], "'silent' is not of the form key=value"),
    ],
)
def test_wrong_settings_are_one_line_with_a_remedy(
    clips: Path, tmp_path: Path, settings: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from magihuman.cli import run as run_command

    words = [f"input={clips}", f"output={tmp_path / 'x'}", "progress=false"]
    if not any(word.startswith("codecs=") for word in settings):
        words.append(CODECS)
    with pytest.raises(SystemExit) as leaving:
        run_command(prepare, "python -m data.prepare", [*words, *settings])
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "x").glob("*.tar"))


def test_folders_without_use_are_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder; give the folder that holds the video files"):
        prepared(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no media file"):
        prepared(tmp_path / "empty", tmp_path / "out", codecs=CODECS[7:])
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="holds no media file"):
        prepared(tmp_path / "empty", tmp_path / "mine", codecs=CODECS[7:])
    assert (tmp_path / "mine").exists()
    clips = folder_of_clips(tmp_path / "media", 1)
    (clips / "c00.txt").unlink()
    with pytest.raises(UserError, match=r"no clip of .* could be used; most often: has no caption; .*report.md"):
        prepared(clips, tmp_path / "out", codecs=CODECS[7:])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prepared(clips, tmp_path / "file" / "out", codecs=CODECS[7:])


def test_buckets_by_length_and_shape(tmp_path: Path) -> None:
    clips = tmp_path / "media"
    clips.mkdir()
    for name, how in {
        "wide": {"width": 128, "height": 64, "seconds": 1.0},
        "tall": {"width": 64, "height": 128, "seconds": 0.56},
        "long": {"width": 64, "height": 64, "seconds": 2.6},
    }.items():
        movie(clips / f"{name}.mp4", **how)  # type: ignore[arg-type]
        (clips / f"{name}.txt").write_text(name)
    report = prepared(
        clips, tmp_path / "out", codecs=CODECS[7:], sizes="64x64,128x64,64x128", frames="25,13",
        workers=1,
    )  # fmt: skip
    assert report.buckets == {"13x128x64+a": 1, "13x64x64+a": 1, "25x64x128+a": 1, "25x64x64+a": 2}
    assert report.seconds == pytest.approx((3 * 25 + 2 * 13) / 25)


def test_captions_of_another_world_than_the_codecs_are_noted(tmp_path: Path) -> None:
    tiny, scene = FORMS["tiny"].example, FORMS["scene"].example
    assert form_note([tiny, tiny, scene, ""], "tiny") is None
    assert form_note(["a man speaks"], "released") is None
    note = form_note([scene, tiny, scene], "tiny")
    assert note is not None
    assert note.startswith(f"2 of 3 captions have not the form of codecs=tiny, the first: {scene!r}; give codecs=scene")
    assert "37 frames (codecs=tiny: 25)" in note
    from data.tiny.dataset import make_clips

    make_clips(str(tmp_path / "clips"), 1, seed=11, workers=1, world="scene", progress=False)
    report = prepared(tmp_path / "clips", tmp_path / "shards", codecs="tiny", workers=1)
    assert "note: 1 of 1 captions have not the form of codecs=tiny" in report.summary()
    assert "give codecs=scene" in json.loads((tmp_path / "shards" / "report.json").read_text())["notes"][0]


def test_puppets_end_to_end(tmp_path: Path) -> None:
    """Puppets to mp4 to latents and back: the picture and the sound's spectrum survive."""
    from data.inspect import inspect
    from data.tiny.dataset import make_clips
    from magihuman.codecs.bundle import load_bundle
    from magihuman.media.reading import read_clip

    make_clips(str(tmp_path / "clips"), 4, seed=11, workers=1, world="tiny", progress=False)
    prepared(tmp_path / "clips", tmp_path / "shards", codecs="tiny", workers=1, pixels=True)
    reader, world = Shards(tmp_path / "shards"), load_bundle("tiny")
    assert reader.contract == world.contract
    for i in range(4):
        sample = reader.read(i)
        truth = read_clip(tmp_path / "clips" / sample.meta["source"], fps=25, rate=16000)
        decoded = world.video_codec.decode(sample.tensors["video"].float()[None])[0].permute(1, 2, 3, 0)
        error = (decoded.clamp(-1, 1) - (truth.frames.float() / 127.5 - 1)).square().mean()
        assert 10 * torch.log10(4 / error) > 26  # dB; the codec itself reaches about 30
        assert truth.wave is not None
        again = world.audio_codec.encode(truth.wave[None])[0]
        assert (again - sample.tensors["audio"].float()).abs().max() < 0.02 * again.abs().max()
        assert (
            sample.meta["caption"]
            == (tmp_path / "clips" / sample.meta["source"]).with_suffix(".txt").read_text().strip()
        )
        words = world.text_encoder.encode([sample.meta["caption"]])[0]
        assert torch.equal(words.half(), sample.tensors["text"])
        assert torch.equal(sample.tensors["frames"], truth.frames.permute(3, 0, 1, 2))
    text = inspect(str(tmp_path / "shards"), str(tmp_path / "sheet.png"), samples=3)
    assert "4 samples, 4 checked, 0 corrupt" in text
    assert "bucket 25x64x64+a: 4" in text
    assert f"video latents: {world.contract.video_channels} channels" in text
    assert (tmp_path / "sheet.png").stat().st_size > 3000
    # A sample does not depend on the clips that it is encoded with.
    (tmp_path / "one").mkdir()
    for file in (tmp_path / "clips").glob("clip-000002.*"):
        shutil.copy(file, tmp_path / "one")
    prepared(tmp_path / "one", tmp_path / "alone", codecs="tiny", workers=1, pixels=True)
    assert stored(tmp_path / "alone").items() <= stored(tmp_path / "shards").items()
    large = prepared(tmp_path / "clips", tmp_path / "large", codecs="tiny", sizes="128x128", workers=1)
    assert large.buckets == {"25x128x128+a": 4}
    assert Shards(tmp_path / "large").read(0).tensors["video"].shape == (world.contract.video_channels, 7, 32, 32)


def test_inspection_counts_corrupt_samples_and_refuses_another_world(whole: Path, tmp_path: Path) -> None:
    from data.inspect import inspect

    copy = tmp_path / "shards"
    shutil.copytree(whole, copy)
    data = bytearray((copy / "shard-000001.tar").read_bytes())
    data[1000] ^= 0xFF
    (copy / "shard-000001.tar").write_bytes(bytes(data))
    text = inspect(str(copy), str(tmp_path / "x.png"), samples=2, codecs="pooled_bundle:build")  # user code is named
    assert "12 samples, 12 checked, 1 corrupt" in text
    assert "checksum differs" in text
    bare = [sys.executable, "-m", "data.inspect", str(copy), "samples=0"]
    assert "1 corrupt" in subprocess.run(bare, cwd=REPO, capture_output=True, text=True, check=True).stdout
    with pytest.raises(UserError, match=r"were made for different latents \(video_codec: 'pooled' against 'tiny-"):
        inspect(str(copy), str(tmp_path / "x.png"), codecs="tiny")


def test_text_features_of_another_attention_or_library_are_another_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle: Any = fake_bundle()
    monkeypatch.setattr(encode, "open_bundle", lambda name, device: bundle)
    described = encode.describe_codecs(("fake", "cpu", str(tmp_path)), lambda path: None, frozenset())
    assert "text_computed_by" not in described  # plans of encoders without it stay what they were
    bundle.text_encoder.computed_by = "sdpa attention, transformers 5.23.0"
    other = encode.describe_codecs(("fake", "cpu", str(tmp_path)), lambda path: None, frozenset())
    assert other == {**described, "text_computed_by": "sdpa attention, transformers 5.23.0"}
