"""Metrics of single frames and of fidelity, against closed forms and planted faults."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2", reason="needs opencv-python-headless (extra eval)")

from eval import image_metrics
from eval.clip_file import ClipFile, NotMeasured
from eval.faults import FAULTS
from eval.metrics import fidelity, picture
from magihuman.media.mp4 import write_mp4


def textured(side: int = 192, count: int = 6) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    ground = gaussian_filter(rng.uniform(0, 255, (side, side + count, 3)), (2, 2, 0))
    ground = ((ground - ground.min()) / np.ptp(ground) * 200 + 25).astype(np.uint8)
    return np.stack([ground[:, i : side + i] for i in range(count)])


def planted(name: str, strength: float, frames: np.ndarray) -> np.ndarray:
    apply = FAULTS[name].apply
    assert apply is not None
    return apply(frames, 25.0, np.zeros(0, np.float32), 16000, strength, np.random.default_rng(0))[0]


def values_of(frame: np.ndarray) -> dict[str, float]:
    return picture._of_frame(frame)


def test_noise_level_is_the_noise_that_was_added() -> None:
    flat = np.full((2, 256, 256, 3), 128, np.uint8)
    for level in (3, 10):
        noisy = planted("pixel_noise", level, flat)[0]
        # Independent noise of three channels in the luma.
        expected = level * float(np.sqrt(np.sum(np.square(image_metrics.LUMA))))
        assert values_of(noisy)["noise_level"] == pytest.approx(expected, rel=0.07)


def test_colourfulness_of_two_colours_by_hand() -> None:
    """Half red, half grey: rg is 255 or 0, yb is 127.5 or 0; mean 127.5 and 63.75, deviation the same."""
    frame = np.full((10, 10, 3), 90, np.uint8)
    assert picture.colourfulness(frame) == 0
    frame[:, :5] = (255, 0, 0)
    length = float(np.hypot(127.5, 63.75))
    assert picture.colourfulness(frame) == pytest.approx(length + 0.3 * length)


def test_brightness_and_clipped_pixels() -> None:
    frame = np.zeros((8, 8, 3), np.uint8)
    frame[:4] = 200
    assert values_of(frame)["brightness"] == pytest.approx(100)
    assert values_of(frame)["clipped_pixels"] == 0.5


def test_blur_lowers_sharpness() -> None:
    frames = textured()
    blurred = planted("blur", 2, frames)
    assert values_of(blurred[0])["picture_sharpness"] < values_of(frames[0])["picture_sharpness"] - 3


def clip(folder: Path, name: str, frames: np.ndarray, reference: ClipFile | None = None, fps: float = 25.0) -> ClipFile:
    write_mp4(folder / f"{name}.mp4", frames, fps, crf=1)
    return ClipFile(folder / f"{name}.mp4", reference=reference)


def test_psnr_is_that_of_torchmetrics_over_all_frames() -> None:
    frames = textured(64)
    noisy = planted("pixel_noise", 9, frames)
    assert fidelity.psnr_of_clips(noisy, frames) == pytest.approx(image_metrics.psnr(noisy, frames))
    assert fidelity.psnr_of_clips(frames, frames) == image_metrics.CEILING


def test_fidelity_of_an_equal_a_noisy_and_a_mirrored_clip(tmp_path: Path) -> None:
    truth = clip(tmp_path, "truth", textured())
    same = fidelity.measure_fidelity(clip(tmp_path, "same", textured(), truth))
    assert same["clip_ssim"] == pytest.approx(1)
    assert same["clip_ms_ssim"] == pytest.approx(1)
    assert same["mirror_margin"] > 0.5
    noisy = fidelity.measure_fidelity(clip(tmp_path, "noisy", planted("pixel_noise", 12, textured()), truth))
    assert noisy["clip_ssim"] < 0.9
    assert 25 < noisy["clip_psnr"] < 31 < same["clip_psnr"]
    mirrored = fidelity.measure_fidelity(clip(tmp_path, "mirrored", planted("mirror", 1, textured()), truth))
    assert mirrored["mirror_margin"] < -0.5


def test_clips_that_do_not_fit_their_reference_are_skipped_with_the_reason(tmp_path: Path) -> None:
    truth = clip(tmp_path, "truth", textured(64))
    with pytest.raises(NotMeasured, match="no reference"):
        fidelity.measure_fidelity(truth)
    with pytest.raises(NotMeasured, match="it is 96x96 at 25 fps and its reference 64x64 at 25 fps"):
        fidelity.measure_fidelity(clip(tmp_path, "large", textured(96), truth))
    with pytest.raises(NotMeasured, match="64x64 at 30 fps"):
        fidelity.measure_fidelity(clip(tmp_path, "fast", textured(64), truth, fps=30))
    with pytest.raises(NotMeasured, match="it has 4 frames and its reference 6"):
        fidelity.measure_fidelity(clip(tmp_path, "short", textured(64)[:4], truth))


def test_small_clips_have_no_ms_ssim(tmp_path: Path) -> None:
    truth = clip(tmp_path, "truth", textured(64))
    values = fidelity.measure_fidelity(clip(tmp_path, "same", textured(64), truth))
    assert values["clip_ssim"] == pytest.approx(1)
    assert str(values["clip_ms_ssim"]) == "it needs 176 pixels on the shorter side, and the clip has 64"
    tiny = clip(tmp_path, "tiny", textured(8))
    values = fidelity.measure_fidelity(clip(tmp_path, "same-tiny", textured(8), tiny))
    assert {str(values[key]) for key in ("clip_ssim", "mirror_margin", "clip_ms_ssim")} == {
        "it needs 11 pixels on the shorter side, and the clip has 8"
    }


def test_frames_are_spread_over_the_clip() -> None:
    assert picture.spread(5).tolist() == [0, 1, 2, 3, 4]
    chosen = picture.spread(1000, 16)
    assert (len(chosen), chosen[0], chosen[-1]) == (16, 0, 999)
