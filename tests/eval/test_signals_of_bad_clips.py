"""Measurements without weights on broken and odd files: a value, or a status with its reason; never a crash, never NaN."""

import math
from pathlib import Path
from typing import Any

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
    values = statuses(path)
    assert {value.status for value in values.values()} == {"failed"}


def test_8_khz_mono_has_a_bandwidth_below_4_khz(tmp_path: Path) -> None:
    values = statuses(movie(tmp_path / "a.mp4", seconds=2, sound=Sound(rate=8000)))
    assert values["loudness"].status == "ok"
    assert values["bandwidth"].value <= 4


def test_10_bit_pictures(tmp_path: Path) -> None:
    assert statuses(movie(tmp_path / "a.mp4", seconds=2, pixels="yuv420p10le"))["brightness"].status == "ok"


def test_ten_minutes_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = movie(tmp_path / "a.mp4", moments=[10.0 * i for i in range(61)], width=32, height=32, sound=None)
    values = statuses(path)
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
