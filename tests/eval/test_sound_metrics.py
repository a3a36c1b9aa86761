"""Metrics of sound against signals whose loudness, noise, hum, bandwidth and pitch are known."""

from pathlib import Path

import numpy as np
import pytest

from eval.clip_file import SILENT_PEAK, ClipFile, MeasurementError, NotMeasured
from eval.metrics import sound
from magihuman.media.mp4 import write_mp4

RATE = sound.RATE
TIME = np.arange(3 * RATE) / RATE


def sine(frequency: float, level: float = 0.0) -> np.ndarray:
    """A sine whose peak is `level` dB to full scale."""
    return 10 ** (level / 20) * np.sin(2 * np.pi * frequency * TIME)


def voice(pitch: float = 120.0) -> np.ndarray:
    """Harmonics up to 4 kHz of a wandering pitch, in syllables with pauses, over a floor of -70 dB."""
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.05 * np.sin(2 * np.pi * 1.3 * TIME))) / RATE
    tone = sum(np.sin(k * phase) / k for k in range(1, int(4000 / pitch)))
    syllables = np.clip(np.sin(2 * np.pi * 1.5 * TIME) * 2, 0, 1)
    return 0.15 * tone * syllables + np.random.default_rng(0).normal(0, 10**-3.5, len(TIME))


def test_loudness_of_the_standards_test_signals() -> None:
    """BS.1770: 997 Hz at full scale in one channel is -3.01 LUFS; EBU Tech 3341: 1 kHz at -23 dB is 20 dB below -3.01."""
    assert sound.integrated_loudness(sine(997)) == pytest.approx(-3.01, abs=0.02)
    assert sound.integrated_loudness(sine(1000, -23)) == pytest.approx(-26.01, abs=0.1)


def test_loudness_leaves_out_silence_and_quiet_parts() -> None:
    gap = np.concatenate([sine(1000, -23), np.zeros(3 * RATE), sine(1000, -23)])
    assert sound.integrated_loudness(gap) == pytest.approx(-26.0, abs=0.25)
    quiet = np.concatenate([sine(1000, -23), sine(1000, -50)])
    assert sound.integrated_loudness(quiet) == pytest.approx(-26.0, abs=0.25)
    assert sound.integrated_loudness(np.full(RATE, 1e-6)) is None


def share(wave: np.ndarray) -> float:
    levels = sound.frame_levels(wave)
    return sound.silence_share(levels, sound.loud_level(levels))


def test_silence_share_does_not_depend_on_the_volume() -> None:
    half = np.where(TIME < 1.5, voice(), 0)
    shares = [share(half * gain) for gain in (1, 0.01)]
    assert shares[0] == pytest.approx(shares[1])
    assert shares[0] >= 0.5
    assert share(sine(300)) == 0


def test_noise_distance_is_the_ratio_of_speech_and_noise() -> None:
    loud = np.where(np.sin(2 * np.pi * 2 * TIME) > 0, sine(300, -10), 0)
    for ratio in (40, 20):
        noise = np.random.default_rng(1).normal(0, 10 ** ((-13.01 - ratio) / 20), len(TIME))
        assert sound.noise_distance(sound.frame_levels(loud + noise)) == pytest.approx(ratio, abs=1.5)


def test_hum_is_told_from_a_voice_that_moves() -> None:
    clean = sound.hum(voice())
    assert clean < 6
    for mains in (50, 60):
        tones = sum(sine(mains * k, -30 - 6 * k) for k in range(1, 6))
        assert sound.hum(voice() + tones) > clean + 8


def test_bandwidth_of_noise_is_its_cut_off() -> None:
    from scipy.signal import butter, sosfilt

    noise = np.random.default_rng(2).normal(0, 0.1, len(TIME))
    for cut in (2000, 8000):
        low = sosfilt(butter(8, cut, fs=RATE, output="sos"), noise)
        assert sound.bandwidth(low) == pytest.approx(cut / 1000, rel=0.15)


@pytest.mark.parametrize("pitch", [80.0, 120.0, 220.0, 350.0])
def test_pitch(pitch: float) -> None:
    assert sound.pitch_median(voice(pitch)) == pytest.approx(pitch, rel=0.03)


def test_noise_has_no_pitch() -> None:
    assert sound.pitch_median(np.random.default_rng(3).normal(0, 0.1, len(TIME))) is None


def test_clipping_is_seen_after_the_volume_was_turned_down() -> None:
    clean, clipped = voice(), 0.2 * np.clip(voice() * 8, -1, 1)
    assert sound.clipped_share(clean) < 0.02
    assert sound.clipped_share(clipped) > 3 * sound.clipped_share(clean)


def written(tmp_path: Path, *channels: np.ndarray) -> ClipFile:
    count = max(3, round(len(channels[0]) / RATE * 25))
    write_mp4(tmp_path / "a.mp4", np.zeros((count, 32, 32, 3), np.uint8), 25, np.stack(channels), RATE)
    return ClipFile(tmp_path / "a.mp4")


MIXED = ("audio_snr", "hum", "bandwidth", "pitch_median")


def test_loudness_adds_the_channels() -> None:
    """EBU Tech 3341: 1 kHz at -23 dB in both channels is -23 LUFS."""
    tone = sine(1000, -23)
    assert sound.integrated_loudness(np.stack([tone, tone])) == pytest.approx(-23, abs=0.1)
    assert sound.integrated_loudness(np.stack([tone, 0 * tone])) == sound.integrated_loudness(tone)
    assert sound.integrated_loudness(tone[None]) == sound.integrated_loudness(tone)


def test_channels_that_cancel_are_heard_and_never_called_silent(tmp_path: Path) -> None:
    clip = written(tmp_path, voice(), -voice())
    values = sound.measure_sound(clip)
    assert values["loudness"] == pytest.approx(sound.integrated_loudness(voice()) + 3.01, abs=0.3)
    assert values["silence_share"] < 0.6
    assert all("channels cancel: their mean has" in str(values[key]) for key in MIXED)
    with pytest.raises(MeasurementError, match="channels cancel"):
        clip.wave(16000)
    clip = written(tmp_path, voice(), voice())
    assert isinstance(sound.measure_sound(clip)["hum"], float)
    np.testing.assert_allclose(clip.wave(16000), clip.channels(16000)[0], atol=2e-3)


def test_a_dead_and_a_clipped_and_an_exchanged_channel_are_seen(tmp_path: Path) -> None:
    right = 0.5 * voice()
    good, dead, clipped, exchanged = (
        sound.measure_sound(written(tmp_path, *channels))
        for channels in (
            (voice(), right),
            (voice(), 0 * right),
            (voice(), np.clip(8 * right, -0.5, 0.5)),
            (right, voice()),
        )
    )
    assert good["silence_share"] < 0.6 < dead["silence_share"] == 1
    assert dead["clipped_audio"] < 0.02
    assert clipped["clipped_audio"] > 3 * good["clipped_audio"]
    assert good["channel_balance"] == pytest.approx(6.02, abs=0.2)
    assert exchanged["channel_balance"] == pytest.approx(-6.02, abs=0.2)
    assert dead["channel_balance"] == 60


def test_quiet_noise_that_cancels_is_silence(tmp_path: Path) -> None:
    assert np.abs(written(tmp_path, 2e-4 * voice(), -2e-4 * voice()).wave(16000)).max() < SILENT_PEAK


def test_a_coded_clip_gives_all_values(tmp_path: Path) -> None:
    values = sound.measure_sound(written(tmp_path, voice()))
    assert set(values) == {metric.key for metric in sound.MEASUREMENTS[0].metrics}
    assert str(values["channel_balance"]) == "it has one channel"
    assert values["pitch_median"] == pytest.approx(120, rel=0.03)
    assert values["loudness"] == pytest.approx(sound.integrated_loudness(voice()), abs=0.3)


def test_silent_clips_give_no_values_but_the_reason(tmp_path: Path) -> None:
    silent = sound.measure_sound(written(tmp_path, np.zeros(RATE)))
    assert silent.pop("silence_share") == 1
    assert {str(reason) for reason in silent.values()} == {"its audio is digital silence"}
    with pytest.raises(NotMeasured, match=r"0\.20 s of audio"):
        sound.measure_sound(written(tmp_path, voice()[: RATE // 5]))
    faint = sound.measure_sound(written(tmp_path, 2e-4 * voice()))
    assert faint["silence_share"] == 1
    assert {str(faint[key]) for key in ("loudness", "hum", "pitch_median")} == {
        "its audio is below -70 LUFS throughout"
    }
    noise = np.random.default_rng(3).normal(0, 0.1, RATE)
    assert (
        str(sound.measure_sound(written(tmp_path, noise))["pitch_median"]) == "fewer than five of its frames are voiced"
    )
