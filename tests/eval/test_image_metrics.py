"""PSNR and SSIM against closed forms; errors between frames and at seams: what they must notice, and what not."""

import math

import numpy as np
import pytest
import torch

from eval.image_metrics import CEILING, change_errors, clip_errors, flicker, luma, psnr, seam, ssim


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


DRAW = np.random.Generator(np.random.PCG64(3))
TRUTH = DRAW.integers(40, 200, (13, 24, 24, 3)).astype(np.uint8)
STARTS = [1, 5, 9]


def nearness(frames: np.ndarray, truth: np.ndarray = TRUTH):
    return clip_errors(frames, truth, STARTS, [(frames, [5])])


def test_a_wrong_gain_and_offset_cost_psnr() -> None:
    """The trap of the published evaluations: normalised by its own minimum and maximum, this is 148 dB."""
    unit = np.linspace(0, 1, 24 * 24 * 3).reshape(1, 24, 24, 3).repeat(2, 0)
    truth = (unit * 255).round().astype(np.uint8)
    wrong = ((0.8 * unit + 0.15) * 255).round().astype(np.uint8)
    error = np.mean((0.15 - 0.2 * unit) ** 2)
    found = clip_errors(wrong, truth)
    assert found.psnr == pytest.approx(-10 * math.log10(error), abs=0.1)
    assert 21 < found.psnr < 23
    assert found.ssim < 0.999
    stretched = (wrong.astype(float) - wrong.min()) / (np.ptp(wrong)) * 255
    assert clip_errors(stretched.round().astype(np.uint8), truth).psnr > 50  # what normalising would have hidden


def test_equal_clips_are_perfect_and_frames_are_averaged() -> None:
    same = nearness(TRUTH)
    assert (same.psnr, same.change, same.drift) == (99.0, 0.0, 0.0)
    assert same.ssim == pytest.approx(1)
    assert same.sharpness == pytest.approx(1)
    worse = TRUTH.copy()
    worse[0] += 16  # one frame of thirteen, off by 16 of 255
    found = nearness(worse)
    assert found.frame_psnr[0] == pytest.approx(20 * math.log10(255 / 16), abs=1e-3)
    assert found.psnr == pytest.approx((found.frame_psnr[0] + 12 * 99) / 13)
    assert found.drift == pytest.approx(-16, abs=1e-3)


def test_flicker_is_what_moves_where_nothing_does() -> None:
    still = np.repeat(TRUTH[:1], 9, 0)
    assert flicker(still, still) == 0
    blinking = still.copy()
    blinking[::2] += 3
    assert flicker(blinking, still) == 3
    assert flicker(blinking + 20, still) == 3  # a constant offset does not flicker
    assert flicker(blinking, np.arange(9, dtype=np.uint8).reshape(9, 1, 1, 1).repeat(24, 1).repeat(24, 2)) is None
    half = still.copy()
    half[1::2, :12] += 50  # the truth itself moves in the upper half
    assert flicker(half, half) == 0


def test_a_jump_between_chunks_is_a_seam() -> None:
    noise = DRAW.integers(-4, 5, TRUTH.shape)
    decoded = (TRUTH.astype(int) + noise).astype(np.uint8)
    assert seam([(decoded, [5])], TRUTH, STARTS) == pytest.approx(1, abs=0.1)
    cut = decoded.copy()
    cut[5:] += 12
    found = seam([(cut, [5])], TRUTH, STARTS)
    assert found is not None
    assert found > 3
    assert change_errors(cut, TRUTH)[4] == pytest.approx(12, abs=1)
    assert seam([], TRUTH, STARTS) is None


def test_a_moment_that_is_hard_to_decode_is_no_seam() -> None:
    decoded = TRUTH.copy()
    decoded[5:] += 12  # the decoder errs there wherever chunks end
    firsts = [[1], [5], [9]]
    assert seam([(decoded, first) for first in firsts], TRUTH, STARTS) == pytest.approx(1)
    jumps = []
    for first in firsts:
        jumping = TRUTH.copy()
        jumping[first[0] :] += 12
        jumps.append((jumping, first))
    assert seam(jumps, TRUTH, STARTS) == pytest.approx(12 / 1e-9)  # nothing changes elsewhere


def test_ssim_is_that_of_torchmetrics_without_its_borders() -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    draw = np.random.default_rng(0)
    truth = draw.integers(0, 256, (2, 40, 30, 3), dtype=np.uint8)
    frames = np.clip(truth + draw.normal(0, 30, truth.shape), 0, 255).astype(np.uint8)
    a, b = (torch.from_numpy(luma(x, np.float64))[:, None] for x in (frames, truth))
    _, index = structural_similarity_index_measure(a, b, sigma=1.5, data_range=255.0, return_full_image=True)
    assert ssim(frames, truth) == pytest.approx(float(index[..., 5:-5, 5:-5].mean()), abs=1e-9)
