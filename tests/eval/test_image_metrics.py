"""PSNR and SSIM against closed forms."""

import numpy as np
import pytest

from eval.image_metrics import CEILING, psnr, ssim


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(40, 200, shape).astype(np.uint8)


def test_psnr_of_a_constant_error() -> None:
    truth = noise((3, 16, 16, 3))
    assert psnr(truth + 5, truth) == pytest.approx(20 * np.log10(255 / 5), abs=1e-4)
    assert psnr(truth, truth) == CEILING


def test_psnr_of_a_part() -> None:
    truth = noise((3, 16, 16, 3))
    wrong = truth.copy()
    wrong[:, :4] += 10
    where = np.zeros((16, 16), bool)
    where[:4] = True
    assert psnr(wrong, truth, where) == pytest.approx(20 * np.log10(25.5), abs=1e-4)
    assert psnr(wrong, truth, ~where) == CEILING
    assert psnr(wrong, truth) == pytest.approx(20 * np.log10(25.5) + 10 * np.log10(4), abs=1e-4)


def test_ssim_of_flat_pictures_is_the_luminance_term() -> None:
    a, b = (np.full((2, 16, 16, 3), value, np.uint8) for value in (100, 120))
    x, y, c = 100 / 255, 120 / 255, 1e-4
    assert ssim(a, b) == pytest.approx((2 * x * y + c) / (x * x + y * y + c), abs=1e-6)


def test_ssim_knows_equal_inverted_and_blurred_pictures() -> None:
    truth = noise((2, 24, 24, 3))
    assert ssim(truth, truth) == pytest.approx(1)
    assert ssim(240 - truth, truth) < 0  # structure turned round
    grey = np.repeat(truth[..., :1], 3, -1)
    blurred = ((grey.astype(int) + np.roll(grey, 1, 2)) // 2).astype(np.uint8)
    assert 0.5 < ssim(blurred, grey) < 0.95
    assert ssim(blurred, grey) == pytest.approx(ssim(grey, blurred))


def test_a_plane_s_ssim_equals_another_implementation_s() -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    a, b = noise((1, 32, 32, 3)), noise((1, 32, 32, 3), 1)
    mixed = (0.7 * a + 0.3 * b).astype(np.uint8)
    luma = [x[0].astype(float) @ np.array([0.299, 0.587, 0.114]) / 255 for x in (a, mixed)]
    _, full = metrics.structural_similarity(
        *luma, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    assert ssim(a, mixed) == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-6)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        psnr(noise((2, 16, 16, 3)), noise((3, 16, 16, 3)))
    with pytest.raises(ValueError, match="cannot be compared"):
        ssim(noise((2, 16, 16, 3)), noise((3, 16, 16, 3)))
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(noise((2, 8, 8, 3)), noise((2, 8, 8, 3)))
