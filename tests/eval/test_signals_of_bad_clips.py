"""Measurements without weights on broken and odd files: a value, or a status with its reason; never a crash, never NaN."""

import math
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from bad_media import Sound, movie

pytest.importorskip("cv2", reason="needs opencv-python-headless (extra eval)")

from eval.clip_file import ClipFile
from eval.scoring import score

NAMES = ("motion", "picture", "fidelity", "sound", "av_offset", "av_align")


def statuses(path: Path, reference: Path | None = None) -> dict[str, Any]:
    clip = ClipFile(path, reference=ClipFile(reference) if reference else None)
    values = score([clip], NAMES, progress=False).rows[0].values
    for key, value in values.items():
        assert (value.value is None) == (value.status != "ok"), key
        assert value.status == "ok" or value.reason, key
        assert value.value is None or math.isfinite(value.value), key
    return values


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return movie(tmp_path_factory.mktemp("good") / "good.mp4", seconds=2)


def test_a_good_clip_has_values_of_picture_and_sound(good: Path) -> None:
    values = statuses(good, good)
    assert values["clip_psnr"].value == 99
    assert values["loudness"].status == values["motion"].status == values["picture_sharpness"].status == "ok"


def test_without_a_reference_fidelity_is_skipped(good: Path) -> None:
    assert (statuses(good)["clip_ssim"].status, "reference" in statuses(good)["clip_ssim"].reason) == ("skipped", True)


def test_no_sound(tmp_path: Path) -> None:
    values = statuses(movie(tmp_path / "a.mp4", seconds=2, sound=None))
    assert (values["loudness"].status, values["loudness"].reason) == ("skipped", "the file has no audio")
    assert values["av_offset"].status == "skipped"
    assert values["motion"].status == "ok"


def test_digital_silence_is_no_loudness_of_zero(tmp_path: Path) -> None:
    values = statuses(movie(tmp_path / "a.mp4", seconds=2, sound=Sound(level=0.0)))
    assert (values["loudness"].status, values["loudness"].reason) == ("skipped", "its audio is digital silence")
    assert (values["av_offset"].status, values["av_offset"].reason) == ("skipped", "its audio is silent")


def test_no_video(tmp_path: Path) -> None:
    from scipy.io import wavfile

    wave = (0.2 * np.sin(np.arange(32000) * 0.2)).astype(np.float32)
    wavfile.write(tmp_path / "a.wav", 16000, wave)
    values = statuses(tmp_path / "a.wav")
    assert values["loudness"].status == "ok"
    assert (values["motion"].status, values["motion"].reason) == ("skipped", "the file has no video")


def test_one_frame(tmp_path: Path) -> None:
    values = statuses(movie(tmp_path / "a.mp4", moments=[0.0], sound=None))
    assert {values[key].reason for key in ("motion", "picture_sharpness")} == {"the file has one frame"}


def test_two_frames_have_a_picture_but_no_motion(tmp_path: Path) -> None:
    values = statuses(movie(tmp_path / "a.mp4", moments=[0.0, 0.04], sound=None))
    assert values["brightness"].status == "ok"
    assert (values["motion"].status, values["motion"].reason[:26]) == ("skipped", "motion needs three frames,")


@pytest.mark.parametrize("case", ["empty", "text", "truncated"])
def test_files_that_cannot_be_read_fail_with_the_reason(tmp_path: Path, good: Path, case: str) -> None:
    path = tmp_path / "a.mp4"
    content = {"empty": b"", "text": b"not a movie\n" * 100, "truncated": good.read_bytes()[:3000]}[case]
    path.write_bytes(content)
    values = statuses(path, path)
    assert {value.status for value in values.values()} == {"failed"}


def test_8_khz_mono_has_a_bandwidth_below_4_khz(tmp_path: Path) -> None:
    values = statuses(movie(tmp_path / "a.mp4", seconds=2, sound=Sound(rate=8000)))
    assert values["loudness"].status == "ok"
    assert values["bandwidth"].value <= 4


def test_10_bit_pictures(tmp_path: Path) -> None:
    assert statuses(movie(tmp_path / "a.mp4", seconds=2, pixels="yuv420p10le"))["brightness"].status == "ok"


def test_ten_minutes_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = movie(tmp_path / "a.mp4", moments=[10.0 * i for i in range(61)], width=32, height=32, sound=None)
    values = statuses(path, path)
    assert {value.status for value in values.values()} == {"failed"}
    assert "120 s is the most" in values["motion"].reason


def test_silence_and_stillness_give_no_offset(tmp_path: Path) -> None:
    from magihuman.media.mp4 import write_mp4

    frames = np.full((50, 64, 64, 3), 90, np.uint8)
    wave = (0.2 * np.random.default_rng(0).normal(0, 0.3, (1, 96000))).astype(np.float32)
    write_mp4(tmp_path / "a.mp4", frames, 25, wave, 48000)
    values = statuses(tmp_path / "a.mp4")
    assert (values["av_offset"].status, values["av_offset"].reason) == ("skipped", "its frames do not change")
    assert values["frozen_share"].value == 1
    assert values["motion"].value == 0


def test_a_folder_of_bad_clips_through_every_measurement_that_can_run_here(good: Path, tmp_path: Path) -> None:
    """No clip ends the run, and every metric of every clip has a value or a status with a reason."""
    import shutil

    from eval.clip_list import read_clips
    from eval.scoring import plan, select

    clips, real = tmp_path / "clips", tmp_path / "real"
    clips.mkdir()
    movie(clips / "no sound.mp4", seconds=1, sound=None)
    movie(clips / "8 kHz.mp4", seconds=1, sound=Sound(rate=8000))
    movie(clips / "one frame.mp4", moments=[0.0], sound=None)
    movie(clips / "ten minutes.mp4", moments=[10.0 * i for i in range(61)], width=32, height=32, sound=None)
    movie(clips / "two.mp4", moments=[0.0, 0.04])
    (clips / "empty.mp4").touch()
    (clips / "cut.mp4").write_bytes(good.read_bytes()[:3000])
    with av.open(str(clips / "hdr ünï.mp4"), "w") as container:  # PQ, BT.2020, 10 bits
        stream: Any = container.add_stream("libx265", rate=25, options={"x265-params": "log-level=none"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p10le"
        stream.color_primaries, stream.color_trc, stream.colorspace = 9, 16, 9
        for number in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p10le")))
        container.mux(stream.encode(None))
    with av.open(str(clips / "no video.mp4"), "w") as container:
        track: Any = container.add_stream("aac", rate=48000, layout="mono")
        tone = av.AudioFrame.from_ndarray(0.2 * np.sin(np.arange(48000) / 9)[None].astype(np.float32), "fltp", "mono")
        tone.sample_rate = 48000
        container.mux(track.encode(tone))
        container.mux(track.encode(None))
    for path in clips.glob("*.mp4"):
        path.with_suffix(".txt").write_text('He speaks.\n\nDialogue:\n<Man, English>: "one two three"\n')
    shutil.copytree(clips, real)
    options = {"speech_errors": {"model": "smoke"}}
    names = [
        p.name
        for p in plan(select(["all"]), options if "speech_errors" in select(["all"]) else {})
        if p.missing is None
    ]
    assert {"motion", "sound", "puppets", "fidelity"} <= set(names)
    scored = score(read_clips(clips, real), names, {k: v for k, v in options.items() if k in names}, progress=False)
    rows = {row.clip: row.values for row in scored.rows}
    assert len(rows) == 9
    for name, values in rows.items():
        for key, value in values.items():
            where = (name, key, value)
            assert (value.value is None) == (value.status != "ok"), where
            assert value.status in ("ok", "skipped", "failed"), where
            assert value.reason or value.value is not None, where
            # An error that nobody expected is not cached, and names its type: none may come out of a bad file.
            assert not value.reason.split(":")[0].endswith("Error"), where
    assert {rows[name]["motion"].status for name in ("empty", "cut", "ten minutes")} == {"failed"}
    assert rows["hdr ünï"]["brightness"].status == "ok"
    assert rows["no video"]["motion"].reason == "the file has no video"
    assert rows["no video"]["loudness"].status == "ok"
    assert rows["8 kHz"]["bandwidth"].status == "ok"


def test_digital_silence_is_all_silence(tmp_path: Path) -> None:
    assert statuses(movie(tmp_path / "a.mp4", seconds=1, sound=Sound(level=0.0)))["silence_share"].value == 1


def test_a_bad_reference_is_called_so(good: Path, tmp_path: Path) -> None:
    bad = tmp_path / "true.mp4"
    bad.write_bytes(b"no video")
    row = score([ClipFile(good, reference=ClipFile(bad))], ["fidelity"], progress=False).rows[0]
    assert row.values["clip_psnr"].reason.startswith("its reference true.mp4: ")
