"""Metrics of decoders: what they must notice, and what must not change them."""

import math

import numpy as np
import pytest

from eval.temporal import change_errors, clip_errors, flicker, latent_starts, seam

DRAW = np.random.Generator(np.random.PCG64(3))
TRUTH = DRAW.integers(40, 200, (13, 24, 24, 3)).astype(np.uint8)
STARTS = latent_starts(13, 4)


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
    assert STARTS == [1, 5, 9]


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
