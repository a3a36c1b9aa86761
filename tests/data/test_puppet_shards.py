"""Shards of puppets without media files: what data.prepare makes of the mp4 files, but for their losses; resumable."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from data.module import LatentDataModule
from data.options import PrepareOptions
from data.prepare import prepare
from data.shards import INDEX, Shards
from data.tiny import dataset
from inference.sample_latents import read_prompts
from magihuman.codecs.bundle import load_bundle
from magihuman.errors import UserError

ensure = partial(dataset.ensure, world="tiny")  # the shorter clips


def through_mp4(folder: Path, clips: int, size: int, **settings: object) -> Shards:
    dataset.make_clips(str(folder / "clips"), clips, size=size, workers=1, world="tiny", progress=False)
    options = PrepareOptions(
        str(folder / "clips"),
        str(folder / "shards"),
        "tiny",
        workers=1,
        progress=False,
        **settings,  # type: ignore[arg-type]
    )
    prepare(options)
    return Shards(folder / "shards")


def rms(difference: torch.Tensor) -> float:
    return float(difference.float().square().mean().sqrt())


def content(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.mark.parametrize(
    ("own", "prepared"),
    [
        ({"size": 64}, {"size": 64, "sizes": "64x64"}),
        (
            {"size": 64, "sr_size": 128, "pixels": True},
            {"size": 128, "sizes": "64x64", "sr_sizes": "128x128", "pixels": True},
        ),
    ],
)
def test_samples_are_those_of_the_mp4_files_but_for_the_losses(own: dict, prepared: dict, tmp_path: Path) -> None:
    direct, media = Shards(ensure(str(tmp_path / "world"), 3, **own)), through_mp4(tmp_path / "mp4", 3, **prepared)
    assert direct.contract == media.contract
    assert torch.equal(direct.null_text(), media.null_text())  # type: ignore[arg-type]
    assert [(e.key, e.bucket) for e in direct.entries] == [(e.key, e.bucket) for e in media.entries]
    # Measured over 200 clips: .126, .031 and, of frames, 3.4 of 255 levels.
    most = {"video": 0.2, "video_sr": 0.2, "audio": 0.06, "frames": 6.0}
    for number in range(3):
        one, other = direct.read(number), media.read(number)
        assert one.meta == other.meta
        assert torch.equal(one.tensors["text"], other.tensors["text"])
        assert one.tensors.keys() == other.tensors.keys()
        for name, limit in most.items():
            if name in one.tensors:
                assert one.tensors[name].dtype == other.tensors[name].dtype
                assert 0 < rms(one.tensors[name].float() - other.tensors[name].float()) < limit


def test_latents_are_those_of_the_rendered_frames_and_waves(tmp_path: Path) -> None:
    codecs = load_bundle("tiny")
    sample = Shards(ensure(str(tmp_path), 1, seed=5)).read(0)
    puppet = dataset.draw_puppet(5, 0)
    frames = torch.from_numpy(dataset.render(puppet, 64)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    wave = torch.from_numpy(dataset.synthesise(puppet))[None, None]
    assert rms(sample.tensors["video"] - codecs.video_codec.encode(frames)[0]) < 1e-3  # fp16
    assert rms(sample.tensors["audio"] - codecs.audio_codec.encode(wave)[0]) < 1e-3


def test_a_stopped_call_is_completed_and_other_processes_write_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "SHARD_CLIPS", 2)
    whole = content(ensure(str(tmp_path / "whole"), 5, workers=1))
    assert sorted(whole) == [INDEX, "null_text.safetensors", "prompts.txt", *(f"shard-00000{i}.tar" for i in range(3))]
    assert whole == content(ensure(str(tmp_path / "several"), 5, workers=2))

    folder, encode = tmp_path / "stopped" / "shards-tiny-5-seed0-64px", dataset.encode_puppet

    def stop_at_the_fourth(form, number, codecs):
        if number == 3:
            raise KeyboardInterrupt
        return encode(form, number, codecs)

    monkeypatch.setattr(dataset, "encode_puppet", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        ensure(str(folder.parent), 5, workers=1)
    assert sorted(path.name for path in folder.glob("*.*")) == [".work", "null_text.safetensors", "shard-000000.tar"]
    (folder / ".shard-000001.tar.1234.part").write_bytes(b"half")  # what SIGKILL leaves
    written = (folder / "shard-000000.tar").stat().st_mtime_ns
    monkeypatch.setattr(dataset, "encode_puppet", encode)
    assert content(ensure(str(folder.parent), 5, workers=1)) == whole
    assert (folder / "shard-000000.tar").stat().st_mtime_ns == written


def test_trainings_of_the_same_settings_share_a_folder_and_others_do_not(tmp_path: Path) -> None:
    folder = ensure(str(tmp_path), 2)
    before = {path: path.stat().st_mtime_ns for path in Path(folder).iterdir()}
    assert ensure(str(tmp_path), 2) == folder
    assert {path: path.stat().st_mtime_ns for path in Path(folder).iterdir()} == before
    assert read_prompts(f"{folder}/prompts.txt") == [dataset.draw_puppet(0, i).caption for i in range(2)]
    others = [
        ensure(str(tmp_path), 2, pixels=True),
        ensure(str(tmp_path), 2, seed=1),
        ensure(str(tmp_path), 2, size=32),
    ]
    dark = ensure(str(tmp_path), 2, only={"skin": "dark"})
    assert len({folder, dark, *others}) == 5
    puppets = [dataset.draw_puppet(0, int(e.key.split("-")[1])) for e in Shards(dark).entries]
    assert [puppet.skin for puppet in puppets] == ["dark"] * 2
    assert LatentDataModule(folder, batch_size=2, val_fraction=0).size == (25, 64, 64)


def test_clips_of_another_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure(str(tmp_path), 1)
    draw = dataset.render
    monkeypatch.setattr(dataset, "render", lambda puppet, size: np.roll(draw(puppet, size), 2, 1))
    with pytest.raises(UserError, match="holds clips that another version has made; remove it"):
        ensure(str(tmp_path), 1)
    shutil.rmtree(tmp_path / "shards-tiny-1-seed0-64px")
    ensure(str(tmp_path), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clips": 0}, "clips=0 is out of range; give at least 1"),
        ({"size": 72}, "data.make.size=72x72 cannot be trained"),
        ({"size": 64, "sr_size": 32}, "sr_sizes=32x32 for 64x64 is smaller"),
        ({"only": {"hat": "green"}}, "puppets have no hat"),
    ],
)
def test_what_cannot_be_made_is_refused_before_a_folder_is(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        ensure(str(tmp_path / "world"), **{"clips": 1, **settings})
    assert message in str(error.value)
    assert not any(tmp_path.iterdir())


def test_codecs_of_another_sample_rate_are_told_the_way_through_mp4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "SAMPLE_RATE", 8000)
    with pytest.raises(
        UserError, match=r"take 25 frames and 16000 samples a second.*write mp4 files with python -m data.tiny"
    ):
        ensure(str(tmp_path), 1)
