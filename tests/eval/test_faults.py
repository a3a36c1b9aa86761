"""Planted faults: each does what its strength says, and none touches the other track or its inputs."""

import numpy as np
import pytest

from eval.faults import FAULTS

RATE, FPS = 48000, 25.0
NAMES = [name for name, fault in FAULTS.items() if fault.apply]


@pytest.fixture(scope="module")
def clip() -> tuple[np.ndarray, np.ndarray]:
    """A textured picture that moves 1 pixel per frame, and a tone of 200 Hz with harmonics."""
    rng = np.random.default_rng(0)
    from scipy.ndimage import gaussian_filter

    ground = gaussian_filter(rng.uniform(0, 255, (64, 140, 3)), (2, 2, 0))
    ground = (ground - ground.min()) / np.ptp(ground) * 200 + 20
    frames = np.stack([ground[:, 50 - i : 114 - i] for i in range(50)]).astype(np.uint8)
    time = np.arange(2 * RATE) / RATE
    wave = sum(np.sin(2 * np.pi * 200 * k * time) / k for k in range(1, 40))
    return frames, (0.3 * wave / np.abs(wave).max()).astype(np.float32)


def planted(clip: tuple[np.ndarray, np.ndarray], name: str, strength: float) -> tuple[np.ndarray, np.ndarray]:
    apply = FAULTS[name].apply
    assert apply is not None
    return apply(clip[0], FPS, clip[1], RATE, strength, np.random.default_rng(1))


@pytest.mark.parametrize("name", NAMES)
def test_one_track_changes_and_both_keep_their_form(clip: tuple[np.ndarray, np.ndarray], name: str) -> None:
    before = clip[0].copy(), clip[1].copy()
    for strength in FAULTS[name].strengths:
        frames, wave = planted(clip, name, strength)
        assert frames.shape == clip[0].shape
        assert frames.dtype == np.uint8
        assert wave.shape == clip[1].shape
        assert wave.dtype == np.float32
        assert np.isfinite(wave).all()
        assert np.array_equal(frames, clip[0]) == (FAULTS[name].track != "frames")
        assert np.array_equal(wave, clip[1]) == (FAULTS[name].track == "frames")
    assert np.array_equal(before[0], clip[0])
    assert np.array_equal(before[1], clip[1])


@pytest.mark.parametrize("name", NAMES)
def test_without_audio_nothing_fails(clip: tuple[np.ndarray, np.ndarray], name: str) -> None:
    wave = planted((clip[0], np.zeros(0, np.float32)), name, FAULTS[name].strengths[-1])[1]
    assert wave.shape == (0,)


def rms(wave: np.ndarray) -> float:
    return float(np.sqrt(np.mean(wave.astype(float) ** 2)))


def test_strengths_are_in_their_units(clip: tuple[np.ndarray, np.ndarray]) -> None:
    frames, wave = clip
    assert np.array_equal(planted(clip, "delay", 80)[1][3840:], wave[:-3840])
    frozen = planted(clip, "freeze", 0.4)[0]
    assert (frozen[30:] == frozen[30]).all()
    assert np.array_equal(frozen[:31], frames[:31])
    judder = planted(clip, "judder", 3)[0]
    assert np.array_equal(judder[2], frames[0])
    assert np.array_equal(judder[3], frames[3])
    grey = planted(clip, "desaturate", 1)[0].astype(int)
    assert np.ptp(grey, axis=-1).max() == 0
    noise = planted(clip, "hiss", 20)[1] - wave
    assert 20 * np.log10(rms(wave) / rms(noise)) == pytest.approx(20, abs=0.2)
    hum = planted(clip, "hum", -20)[1] - wave
    assert 20 * np.log10(rms(hum) / rms(wave)) == pytest.approx(-20, abs=0.2)
    assert rms(planted(clip, "volume", 6)[1]) == pytest.approx(rms(wave) / 10**0.3)
    assert np.abs(planted(clip, "clip_audio", 6)[1]).max() == 1
    assert np.std(planted(clip, "pixel_noise", 8)[0].astype(float) - frames) == pytest.approx(8, rel=0.05)


def test_pitch_is_raised_at_the_same_speed(clip: tuple[np.ndarray, np.ndarray]) -> None:
    shifted = planted(clip, "pitch", 4)[1][RATE // 2 : RATE]
    spectrum = np.abs(np.fft.rfft(shifted * np.hanning(len(shifted))))
    low = spectrum[: 400 * len(shifted) // RATE]
    peak = np.argmax(low) * RATE / len(shifted)
    assert peak == pytest.approx(200 * 2 ** (4 / 12), rel=0.02)
    assert rms(planted(clip, "pitch", 4)[1][-RATE // 4 :]) > 0.3 * rms(clip[1])


def test_slow_motion_moves_slower_and_stays_sharp(clip: tuple[np.ndarray, np.ndarray]) -> None:
    """1 pixel per frame at a quarter of the speed: frame 40 is frame 10, and frames between are moved, not blended."""
    frames = clip[0]
    slow = planted(clip, "slow", 4)[0]
    assert np.array_equal(slow[40], frames[10])
    half_way = (frames[10, :, :-1].astype(float) + frames[10, :, 1:]) / 2  # the picture moved by half a pixel
    error = np.abs(slow[42, 8:-8, 9:-8] - half_way[8:-8, 8:-8]).mean()
    assert error < 1.5
    assert error < 0.5 * np.abs(frames[10, 8:-8, 9:-8] - half_way[8:-8, 8:-8]).mean()
