"""Metrics of motion and of the offset between picture and sound, against pictures whose motion and offset are known."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2", reason="needs opencv-python-headless (extra eval)")

from eval.clip_file import ClipFile, NotMeasured
from eval.metrics import av_offset
from eval.metrics.movement import measure_motion, repeats, still_change
from eval.metrics.registry import metrics
from eval.optical_flow import Motion, motion_of
from magihuman.media.mp4 import write_mp4

FPS, SIDE = 25.0, 96


def texture(seed: int = 0, width: int = SIDE) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    ground = gaussian_filter(np.random.default_rng(seed).uniform(0, 1, (SIDE, width)), 2.5)
    return ((ground - ground.min()) / np.ptp(ground) * 180 + 40).astype(np.uint8)


def moving(pixels: float, count: int = 20) -> np.ndarray:
    """A texture that moves to the right: uint8 [F,H,W,3]."""
    wide = texture(width=SIDE + 130)
    rows = [wide[:, 65 - round(pixels * i) :][:, :SIDE] for i in range(count)]
    return np.repeat(np.stack(rows)[..., None], 3, -1)


def written(tmp_path: Path, frames: np.ndarray, wave: np.ndarray | None = None, rate: int = 48000) -> ClipFile:
    write_mp4(tmp_path / "a.mp4", frames, FPS, None if wave is None else wave[None], rate, crf=8)
    return ClipFile(tmp_path / "a.mp4")


def test_motion_is_in_frame_heights_per_second(tmp_path: Path) -> None:
    values = measure_motion(written(tmp_path, moving(2)))
    assert values["motion_speed"] == pytest.approx(2 * FPS / SIDE, rel=0.1)
    assert values["moving_share"] > 0.9
    assert values["frozen_share"] == 0


def test_half_the_speed_is_half_the_motion(tmp_path: Path) -> None:
    fast, slow = (measure_motion(written(tmp_path, moving(speed))) for speed in (2, 1))
    assert slow["motion"] == pytest.approx(fast["motion"] / 2, rel=0.1)


def test_a_static_clip_is_frozen_and_has_no_speed(tmp_path: Path) -> None:
    values = measure_motion(written(tmp_path, moving(0)))
    assert values["motion"] == pytest.approx(0, abs=1e-3)
    assert str(values["motion_speed"]) == "less than 0.5% of its picture moves"
    assert values["frozen_share"] == 1
    assert values["repeated_share"] == 0


def test_repeated_frames_are_told_from_frozen_ones(tmp_path: Path) -> None:
    frames = moving(2)
    judder = measure_motion(written(tmp_path, frames[np.arange(20) // 2 * 2]))
    assert judder["repeated_share"] == pytest.approx(10 / 19)
    assert judder["frozen_share"] == 0
    frozen = measure_motion(written(tmp_path, frames[np.minimum(np.arange(20), 9)]))
    assert frozen["frozen_share"] == pytest.approx(10 / 19)
    assert frozen["repeated_share"] == 0


def test_a_small_mouth_alone_is_motion() -> None:
    """20 x 20 pixels that change in an otherwise static picture are no frozen frames."""
    luma = np.repeat(texture()[None], 10, 0)
    luma[::2, 40:60, 40:60] //= 2
    motion = Motion(luma, np.zeros((9, SIDE, SIDE, 2), np.float16), FPS)
    assert repeats(motion) == (0, 0)


def test_flicker_of_known_size() -> None:
    luma = np.repeat(texture()[None], 10, 0)
    luma[1::2] += 6
    motion = Motion(luma, np.zeros((9, SIDE, SIDE, 2), np.float16), FPS)
    assert still_change(motion) == pytest.approx(6)
    everywhere = Motion(luma, np.ones((9, SIDE, SIDE, 2), np.float16), FPS)
    assert still_change(everywhere) is None


def test_noise_alone_has_no_still_part(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (6, SIDE, SIDE, 3)).astype(np.uint8)
    assert str(measure_motion(written(tmp_path, noise))["luma_flicker"]) == "less than 2% of its picture is still"


def test_a_fade_is_no_flicker_of_the_brightness(tmp_path: Path) -> None:
    fade = np.repeat(texture()[None, ..., None], 3, -1)
    fade = np.concatenate([fade + i for i in range(20)])
    flickering = fade + (np.arange(20) % 2 * 4)[:, None, None, None].astype(np.uint8)
    assert measure_motion(written(tmp_path, fade))["brightness_flicker"] < 0.3
    assert measure_motion(written(tmp_path, flickering))["brightness_flicker"] == pytest.approx(4, abs=0.4)


def test_motion_is_the_same_at_two_frame_rates_and_residuals_are_not(tmp_path: Path) -> None:
    """Every second frame of the same scene, with noise."""
    noise = np.random.default_rng(0).normal(0, 3, (40, SIDE, SIDE, 1))
    frames = np.clip(np.rint(moving(1, 40) + noise), 0, 255).astype(np.uint8)
    found = []
    for step in (1, 2):
        write_mp4(tmp_path / "a.mp4", frames[::step], FPS / step, crf=8)
        found.append(measure_motion(ClipFile(tmp_path / "a.mp4")))
    whole, half = found
    for key in ("motion", "motion_speed", "moving_share"):
        assert half[key] == pytest.approx(whole[key], rel=0.06), key
        assert not metrics()[key].per_frame
    assert half["interpolation_residual"] > 1.1 * whole["interpolation_residual"]
    for key in ("luma_flicker", "brightness_flicker", "warping_error", "interpolation_residual"):
        assert metrics()[key].per_frame


def test_a_slow_pan_is_frozen_at_a_high_frame_rate_only() -> None:
    """3 levels per 80 ms are 1.5 per 40 ms: why frozen and repeated frames are not compared between rates."""
    luma = np.repeat((np.arange(0, 30, 1.5)[:, None, None]).astype(np.uint8), SIDE, 1).repeat(SIDE, 2)
    still = np.zeros((19, SIDE, SIDE, 2), np.float16)
    assert repeats(Motion(luma, still, FPS)) == (1, 0)
    assert repeats(Motion(luma[::2], still[:9], FPS / 2)) == (0, 0)
    assert metrics()["frozen_share"].per_frame
    assert metrics()["repeated_share"].per_frame


def test_two_frames_are_too_few(tmp_path: Path) -> None:
    with pytest.raises(NotMeasured, match="needs three frames"):
        measure_motion(written(tmp_path, moving(2, 2)))


def test_flow_is_measured_once_for_a_picture_and_anew_for_another(tmp_path: Path) -> None:
    clip = written(tmp_path, moving(2))
    first = motion_of(clip)
    assert motion_of(clip.only(("frames",))) is first
    write_mp4(tmp_path / "b.mp4", moving(2), FPS, np.zeros((1, 38400)), 48000, crf=8)
    assert motion_of(ClipFile(tmp_path / "b.mp4")) is first
    write_mp4(tmp_path / "c.mp4", moving(1), FPS, crf=8)
    assert motion_of(ClipFile(tmp_path / "c.mp4")) is not first


# ---- Offset ----


def talking(late: float, seconds: float = 3.2) -> tuple[np.ndarray, np.ndarray]:
    """A dark mouth on a texture that opens with bursts of noise; the sound is `late` seconds late."""
    rng = np.random.default_rng(3)
    starts = np.cumsum(rng.uniform(0.2, 0.45, 20))
    starts = starts[starts < seconds - 0.4]
    lengths = rng.uniform(0.08, 0.2, len(starts))

    def opening(time: np.ndarray) -> np.ndarray:
        bumps = [
            np.where((time > s) & (time < s + 2 * d), np.sin(np.pi * (time - s) / (2 * d)) ** 2, 0)
            for s, d in zip(starts, lengths, strict=True)
        ]
        return np.sum(bumps, axis=0).clip(0, 1)

    times = np.arange(round(seconds * FPS)) / FPS
    frames = np.repeat(np.repeat(texture()[None], len(times), 0)[..., None], 3, -1)
    mouth = np.s_[:, 50:66, 40:64]
    frames[mouth] = np.rint(frames[mouth] * (1 - 0.7 * opening(times))[:, None, None, None])
    sound = np.arange(round(seconds * 48000)) / 48000
    wave = 0.3 * opening(sound - late) * rng.normal(0, 0.3, len(sound)) + rng.normal(0, 1e-4, len(sound))
    return frames, wave.clip(-1, 1).astype(np.float32)


@pytest.mark.parametrize("late", [-0.2, 0.0, 0.04, 0.12, 0.4])
def test_a_planted_offset_is_found(tmp_path: Path, late: float) -> None:
    values = av_offset.measure_offset(written(tmp_path, *talking(late)))
    assert values["av_offset"] == pytest.approx(1000 * late, abs=12)
    assert values["av_offset_size"] == pytest.approx(abs(1000 * late), abs=12)


def test_few_frames_give_no_offset_however_long(tmp_path: Path) -> None:
    """2 s at 8 frames/s: the search of 15 frames to each side would compare one frame with one."""
    frames, wave = talking(0.0)
    write_mp4(tmp_path / "slow.mp4", frames[:48:3], 8, wave[None, : 2 * 48000], 48000, crf=4)
    with pytest.raises(NotMeasured, match="36 frames, and the clip has 16"):
        av_offset.measure_offset(ClipFile(tmp_path / "slow.mp4"))


def test_another_clips_sound_gives_no_offset(tmp_path: Path) -> None:
    frames, wave = talking(0)
    values = av_offset.measure_offset(written(tmp_path, frames, np.roll(wave[::-1], 30000)))
    assert values["av_confidence"] < av_offset.LEAST_CONFIDENCE
    assert isinstance(values["av_offset"], NotMeasured)


def test_static_or_silent_clips_have_no_offset(tmp_path: Path) -> None:
    frames, wave = talking(0)
    with pytest.raises(NotMeasured, match="do not change"):
        av_offset.luma_change(Motion(frames[..., 0][:1].repeat(80, 0), np.zeros((79, SIDE, SIDE, 2), np.float16), FPS))
    with pytest.raises(NotMeasured, match="silent"):
        av_offset.measure_offset(written(tmp_path, frames, wave * 0))
    with pytest.raises(NotMeasured, match=r"needs 1\.5 s"):
        av_offset.measure_offset(written(tmp_path, frames[:20], wave[: 20 * 1920]))


def test_onsets_and_peaks_are_where_they_were_put() -> None:
    rng = np.random.default_rng(0)
    wave = rng.normal(0, 1e-4, 48000 * 2)
    for start in (0.4, 0.9, 1.5):
        at = round(start * 48000)
        wave[at : at + 4800] += rng.normal(0, 0.2, 4800)
    onsets = av_offset.onset_times(wave, 48000)
    assert [round(float(t), 1) for t in onsets] == [0.4, 0.9, 1.5]
    flow = np.zeros((20, 8, 8, 2), np.float16)
    flow[:, :, :, 0] = np.array([0.05] * 20)[:, None, None]
    flow[4], flow[11] = 1, 2
    motion = Motion(np.zeros((21, 8, 8), np.uint8), flow, FPS)
    assert av_offset.flow_peaks(motion).tolist() == pytest.approx([5 / FPS, 12 / FPS])


def test_av_align_is_the_intersection_over_the_union(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clip = written(tmp_path, *talking(0))
    monkeypatch.setattr(av_offset, "onset_times", lambda wave, rate: np.array([0.2, 1.0, 2.0]))
    monkeypatch.setattr(av_offset, "flow_peaks", lambda motion: np.array([0.22, 1.5]))
    assert av_offset.measure_av_align(clip) == {"av_align": pytest.approx(1 / 4)}
    # Two onsets that meet one peak count twice, as in the authors' code: 1 is not the best.
    monkeypatch.setattr(av_offset, "onset_times", lambda wave, rate: np.array([0.2, 0.25]))
    monkeypatch.setattr(av_offset, "flow_peaks", lambda motion: np.array([0.22]))
    assert av_offset.measure_av_align(clip) == {"av_align": 2.0}
    assert metrics()["av_align"].best is None
    monkeypatch.setattr(av_offset, "flow_peaks", lambda motion: np.array([0.22, 1.5]))
    monkeypatch.setattr(av_offset, "onset_times", lambda wave, rate: np.zeros(0))
    assert av_offset.measure_av_align(clip) == {"av_align": 0}
