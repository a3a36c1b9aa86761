"""Puppets: a pure function of seed and index, written as ordinary files, resumable."""

import os
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data.tiny import dataset
from data.tiny.puppets import (
    MOUTHS,
    ONSETS,
    SAMPLE_RATE,
    VOWELS,
    draw_puppet,
    mouth_track,
    parse_caption,
    render,
    synthesise,
)
from magihuman.cli import run
from magihuman.codecs.tiny_captions import order_fault
from magihuman.errors import UserError
from magihuman.media.reading import probe, read_clip

make_clips = partial(dataset.make_clips, world="tiny")  # the shorter clips


def test_a_puppet_is_a_function_of_seed_and_index():
    assert draw_puppet(3, 7) == draw_puppet(3, 7)
    assert draw_puppet(3, 7) != draw_puppet(3, 8)
    assert draw_puppet(3, 7) != draw_puppet(4, 7)
    puppet = draw_puppet(3, 7)
    assert np.array_equal(render(puppet), render(puppet))
    assert np.array_equal(synthesise(puppet), synthesise(puppet))


def test_pictures_and_sound_have_the_worlds_shape():
    puppet = draw_puppet(0, 0)
    assert render(puppet, 64).shape == (25, 64, 64, 3)
    assert render(puppet, 128).shape == (25, 128, 128, 3)
    wave = synthesise(puppet)
    assert wave.shape == (SAMPLE_RATE,)
    assert wave.dtype == np.float32
    assert 0.1 < np.abs(wave).max() < 1


def test_only_some_looks_are_drawn(tmp_path) -> None:
    looks = {"skin": "dark", "face": "round"}
    first = [i for i in range(60) if all(getattr(draw_puppet(0, i), k) == v for k, v in looks.items())][:2]
    assert make_clips(str(tmp_path / "a"), 2, workers=1, only=looks, progress=False) == 2
    assert sorted(path.stem for path in (tmp_path / "a").glob("*.mp4")) == [f"clip-{i:06d}" for i in first]
    with pytest.raises(UserError, match=r"holds clips of .*skin=dark"):
        make_clips(str(tmp_path / "a"), 2, workers=1, progress=False)
    with pytest.raises(UserError, match="choose skin from light, tan, dark"):
        make_clips(str(tmp_path / "b"), 2, only={"skin": "green"}, progress=False)
    with pytest.raises(UserError, match="puppets have no hat; choose from face"):
        make_clips(str(tmp_path / "b"), 2, only={"hat": "green"}, progress=False)


def test_twice_the_size_is_the_same_picture():
    puppet = draw_puppet(0, 1)
    small = render(puppet, 64).astype(float)
    large = render(puppet, 128).astype(float).reshape(25, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(small - large).mean() < 1.0
    assert np.abs(small - large).max() < 60  # edges only


def test_all_values_are_drawn_about_equally_often():
    puppets = [draw_puppet(5, i) for i in range(600)]
    words = [word for puppet in puppets for word in puppet.words]
    for place, letters in enumerate((ONSETS, VOWELS)):
        for letter in letters:
            share = sum(word[place] == letter for word in words) / len(words)
            assert abs(share - 1 / len(letters)) < 0.05
    for name, count in (("face", 3), ("hair", 5), ("shirt", 6), ("wall", 6), ("skin", 3)):
        values = [getattr(puppet, name) for puppet in puppets]
        assert {round(values.count(v) / 600 * count, 0) for v in set(values)} == {1.0}
        assert len(set(values)) == count


def test_syllables_fit_the_clip_and_do_not_touch():
    for index in range(200):
        syllables = draw_puppet(6, index).syllables
        assert syllables[0].start >= 0.019
        assert syllables[-1].end <= 0.981
        for before, after in pairwise(syllables):
            assert after.start - before.end >= 0.019


def test_the_mouth_opens_for_vowels_and_is_shut_for_m():
    puppet = next(p for p in (draw_puppet(7, i) for i in range(100)) if p.words[1][0] == "m")
    track = mouth_track(puppet)
    middle = puppet.syllables[1]
    vowel = round((middle.start + middle.onset_seconds + middle.vowel_seconds / 2) * 25 - 0.5)
    hum = int((middle.start + middle.onset_seconds / 2) * 25)
    assert track[vowel] == pytest.approx(MOUTHS[middle.vowel], rel=0.15)
    assert track[hum, 1] < 0.02


def test_the_caption_can_be_read_back():
    for index in range(50):
        puppet = draw_puppet(8, index)
        world, words, stated = parse_caption(puppet.caption)
        assert (world, words) == ("tiny", puppet.words)
        assert stated == {name: getattr(puppet, name) for name in ("face", "hair", "shirt", "wall")}


@pytest.mark.parametrize("caption", ["", "hello", "round face", "a, b, c, d, e", "round face, red hair, x, y, says"])
def test_another_sentence_is_refused(caption):
    with pytest.raises(ValueError, match=r"not a puppet's caption.* \(world tiny\) or .* \(world scene\)"):
        parse_caption(caption)


LOOKS = "round face, ginger hair, blue shirt, green wall"


@pytest.mark.parametrize(
    ("caption", "first", "right"),
    [
        (f"{LOOKS}, left, says ma bi do ne, far", "left", f"{LOOKS}, says ma bi do ne, left, far"),
        (f"{LOOKS}, says ma bi do ne, far, left", "far", f"{LOOKS}, says ma bi do ne, left, far"),
        ("ginger hair,  round face, blue shirt, green wall, says ma", "ginger hair", f"{LOOKS}, says ma"),
    ],
)
def test_of_a_caption_in_another_order_the_first_part_out_of_place_is_named(caption, first, right):
    with pytest.raises(ValueError, match="not a puppet's caption") as caught:
        parse_caption(caption)
    assert str(caught.value).endswith(f"; {first!r} is out of place, the right order is {right!r}")


def test_an_order_is_not_blamed_for_what_is_wrong_otherwise():
    assert order_fault("says ma, round face", "tiny", "scene") is None  # incomplete
    assert order_fault(f"{LOOKS}, says ma, ma", "tiny", "scene") is None
    wrong = f"{LOOKS}, far, says ma bi do ne"
    assert order_fault(wrong, "tiny") is None  # no caption of that world in any order
    assert order_fault(wrong, "released") is None
    assert order_fault(wrong, "scene") == f"'far' is out of place, the right order is '{LOOKS}, says ma bi do ne, far'"


def test_clips_are_ordinary_files_that_do_not_depend_on_the_run(tmp_path: Path):
    assert make_clips(str(tmp_path / "a"), 4, seed=2, workers=1, progress=False) == 4
    assert make_clips(str(tmp_path / "b"), 2, seed=2, first=2, workers=1, progress=False) == 2
    for name in ("clip-000002", "clip-000003"):
        for ending in (".mp4", ".txt"):
            assert (tmp_path / "a" / (name + ending)).read_bytes() == (tmp_path / "b" / (name + ending)).read_bytes()
    info = probe(tmp_path / "a" / "clip-000000.mp4")
    assert (info.width, info.height, info.fps, info.audio_rate, info.audio_channels) == (64, 64, 25.0, 16000, 1)
    puppet = draw_puppet(2, 3)
    assert (tmp_path / "a" / "clip-000003.txt").read_text() == puppet.caption + "\n"
    clip = read_clip(tmp_path / "a" / "clip-000003.mp4", fps=25, rate=16000)
    assert np.abs(clip.frames.numpy().astype(float) - render(puppet)).mean() < 4
    wave = clip.wave.numpy()[0]
    assert np.corrcoef(wave[: len(synthesise(puppet))], synthesise(puppet))[0, 1] > 0.98


def test_a_stopped_run_goes_on_and_keeps_what_is_there(tmp_path: Path, capsys):
    make_clips(str(tmp_path), 5, workers=1, progress=False)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path / "clip-000001.mp4").unlink()
    (tmp_path / "clip-000003.txt").unlink()  # what a kill between the two files leaves
    kept = (tmp_path / "clip-000002.mp4").stat().st_mtime_ns
    assert make_clips(str(tmp_path), 5, workers=1, progress=False) == 2
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert (tmp_path / "clip-000002.mp4").stat().st_mtime_ns == kept
    assert make_clips(str(tmp_path), 5, workers=1, progress=False) == 0
    make_clips(str(tmp_path), 6, workers=1)
    assert capsys.readouterr().out == f"1 clips written to {tmp_path}, 5 were there\n"


def test_several_processes_write_the_same_clips(tmp_path: Path):
    assert make_clips(str(tmp_path / "two"), 52, seed=1, size=32, workers=2, progress=False) == 52
    make_clips(str(tmp_path / "one"), 3, seed=1, size=32, first=49, workers=1, progress=False)
    for path in (tmp_path / "one").glob("clip-*"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert len(list((tmp_path / "two").glob("*.mp4"))) == len(list((tmp_path / "two").glob("*.txt"))) == 52


def test_clips_of_two_worlds_do_not_mix(tmp_path: Path):
    make_clips(str(tmp_path), 1, seed=1, workers=1, progress=False)
    with pytest.raises(UserError, match="holds clips of seed=1, size=64"):
        make_clips(str(tmp_path), 2, seed=2, workers=1, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "is not given; set it with"),
        (["output=x"], "clips is not given"),
        (["output=x", "clips=many"], "clips='many' should be an integer"),
        (["output=x", "clips=0"], "clips=0 is out of range"),
        (["output=x", "clips=1", "seed=-1"], "seed=-1 is out of range"),
        (["output=x", "clips=1", "workers=0"], "workers=0 is out of range"),
        (["output=x", "clips=1", "size=63"], "size=63 should be even"),
        (["output=x", "clips=1", "size=8"], "size=8 should be even (H.264) and between 32 and 512"),
        (["output=x", "clips=1", "seeed=1"], "did you mean 'seed'"),
        (["output=x", "clips=1", "clips=2"], "clips is given twice"),
        (["output=x", "clips"], "not of the form key=value"),
    ],
)
def test_bad_settings_are_one_line_and_exit_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        run(dataset.make_clips, "python -m data.tiny", arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not os.listdir(tmp_path)


def test_an_output_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        make_clips(str(tmp_path / "file"), 1, workers=1, progress=False)


def test_the_command_helps_without_loading_torch():
    code = (
        "import runpy, sys; sys.argv = ['puppets', '--help']\n"
        "try: runpy.run_module('data.tiny', run_name='__main__')\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert 'torch' not in sys.modules and 'av' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("output", "clips", "seed", "size", "first", "workers"):
        assert f"\n  {name} " in done.stdout
