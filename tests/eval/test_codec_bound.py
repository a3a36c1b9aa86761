"""The codec bound: equal to the codecs alone, in shape and rate for mp4, resumable, and said where it changes a clip."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.clip_file import ClipFile, UnreadableClip
from eval.clips import ground_truth, held_out, through_codec
from eval.codec_bound import bound_clips, coded, coded_shape
from magihuman import zoo
from magihuman.codecs.bundle import load_bundle, load_media_codecs
from magihuman.errors import UserError
from magihuman.media.mp4 import write_mp4

TINY = "tiny/base"


def movie(
    path: Path, frames: int = 25, size: tuple[int, int] = (64, 64), fps: float = 25, audio: int = 16000
) -> ClipFile:
    """A moving gradient with a tone."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    images = np.stack([np.stack([rows * 2 + 3 * t, columns * 2, rows + columns], -1) % 256 for t in range(frames)])
    count = round(frames / fps * audio)
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(count) / audio)[None] if audio else None
    write_mp4(path, images.astype(np.uint8), fps, wave, audio)
    return ClipFile(path, prompt="a gradient", dialogue="")


def test_before_the_mp4_it_is_what_the_evaluation_of_puppets_calls_the_bound() -> None:
    codecs = load_bundle("tiny")
    truth = ground_truth(held_out(2))
    known = through_codec(truth, codecs)
    for index in range(2):
        wave = truth.waves[index]
        assert wave is not None
        frames, sound = coded(
            torch.from_numpy(truth.frames[index]),
            torch.from_numpy(wave)[None].float(),
            codecs.video_codec,
            codecs.audio_codec,
        )
        assert np.array_equal(frames.numpy(), known.frames[index])
        assert np.allclose(sound[0].numpy(), known.waves[index], atol=1e-6)


def test_files_and_records_and_nothing_is_coded_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = movie(tmp_path / "real.mp4")
    made = movie(tmp_path / "made.mp4", frames=17, size=(48, 64))
    clips = [ClipFile(made.path, name=name, prompt="p", group="g", reference=truth) for name in ("a", "b")]
    found = bound_clips(clips, TINY, tmp_path / "bound", progress=False)
    assert [(c.name, c.prompt, c.group, c.reference) for c in found] == [("a", "p", "g", truth), ("b", "p", "g", truth)]
    assert found[0].path == found[1].path  # the same reference at the same shape
    assert found[0].frames.shape == (17, 48, 64, 3)
    assert (found[0].fps, found[0].info.audio_rate) == (25, 16000)
    assert len(found[0].wave(16000)) == pytest.approx(17 * 640, abs=1)
    record = json.loads(found[0].path.with_suffix(".json").read_text())
    assert record["codecs"]["video"] == zoo.config_of(TINY).contract.video_codec
    assert "scaled from 64x64 to 64x48" in " ".join(record["notes"])
    assert "scaled from 64x64 to 64x48" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "bound" / "manifest.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["a", "b"]

    def loaded(*_: object) -> None:
        raise AssertionError("the codecs were loaded again")

    monkeypatch.setattr("magihuman.codecs.bundle.load_media_codecs", loaded)
    again = bound_clips(clips, TINY, tmp_path / "bound", progress=False)
    assert [c.path for c in again] == [c.path for c in found]
    found[0].path.write_bytes(b"damaged")
    with pytest.raises(AssertionError, match="loaded again"):
        bound_clips(clips, TINY, tmp_path / "bound", progress=False)


def test_a_true_clip_by_itself_keeps_its_size_as_far_as_the_codec_takes_it(tmp_path: Path) -> None:
    contract = zoo.config_of(TINY).contract
    odd = movie(tmp_path / "odd.mp4", frames=20, size=(50, 66), fps=20, audio=0)
    shape = coded_shape(odd, contract)
    assert (shape.frames, shape.height, shape.width, shape.scaled) == (25, 48, 64, False)
    assert "read at 25 instead of 20 frames a second" in shape.notes[0]
    assert "cropped from 66x50 to 64x48" in shape.notes[1]
    assert shape.notes[2] == "no audio"
    (found,) = bound_clips([odd], TINY, tmp_path / "bound", progress=False)
    assert found.frames.shape == (25, 48, 64, 3)
    assert not found.has_audio
    # The centre is kept: the codec's picture is near the cropped one, and not near one that is shifted by two pixels.
    truth = odd.frames[0][1:49, 1:65].astype(int)
    errors = [np.abs(found.frames[0].astype(int) - np.roll(truth, shift, 1)).mean() for shift in (0, 4)]
    assert errors[0] < errors[1]
    ten = coded_shape(movie(tmp_path / "ten.mp4", frames=27), contract)
    assert ten.frames == 25
    assert "the last 2 of 27 frames are cut" in " ".join(ten.notes)


def test_what_cannot_be_coded_is_said_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = movie(tmp_path / "good.mp4")
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    clips = [
        ClipFile(good.path, name="first", reference=ClipFile(empty)),
        ClipFile(good.path, name="second", reference=good),
    ]
    first, second = bound_clips(clips, TINY, tmp_path / "bound", progress=False)
    assert not first.path.exists()
    assert second.path.exists()
    assert "no codec bound of first: its reference:" in capsys.readouterr().err
    assert "second" in (tmp_path / "bound" / "manifest.jsonl").read_text()
    with pytest.raises(UnreadableClip, match="smaller than a latent"):
        coded_shape(good, zoo.config_of(TINY).contract, (2, 64))
    with pytest.raises(UnreadableClip, match=r"25 frames of 20000x20000 need .* GiB"):
        coded_shape(good, zoo.config_of(TINY).contract, (20000, 20000))
    with pytest.raises(UserError, match="nowhere"):
        bound_clips([good], "nowhere", tmp_path / "bound")


def test_released_media_codecs_are_asked_for_without_the_text_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAGIHUMAN_WAN_VAE", "MAGIHUMAN_STABLE_AUDIO", "MAGIHUMAN_T5GEMMA"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError) as caught:
        load_media_codecs("released", video_codec="wan.pth")
    assert "MAGIHUMAN_STABLE_AUDIO" in str(caught.value)
    assert "T5GEMMA" not in str(caught.value)
