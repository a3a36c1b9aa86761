"""8-bit pictures and 44.1 kHz sound."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file

from magihuman.media.images import frames_to_uint8, resize_frames, to_playback_rate


def test_pictures_equal_the_release(golden: Path) -> None:
    vector = load_file(golden / "video_uint8.safetensors")
    frames = frames_to_uint8(vector["video"])
    assert torch.equal(frames[0], vector["uint8"])
    assert torch.equal(resize_frames(frames[0], 7, 9, "bilinear"), vector["up_bilinear_w9_h7"])
    assert torch.equal(resize_frames(frames[0], 7, 9, "bicubic"), vector["up_bicubic_w9_h7"])


def test_values_are_clamped_and_truncated() -> None:
    values = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 1.5])
    frames = values.view(6, 1, 1, 1, 1).expand(6, 3, 2, 4, 5)
    assert frames_to_uint8(frames).shape == (6, 2, 4, 5, 3)
    assert frames_to_uint8(frames)[:, 0, 0, 0, 0].tolist() == [0, 0, 127, 254, 255, 255]


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_resizing_keeps_flat_pictures_and_size(mode: Literal["bilinear", "bicubic", "nearest"]) -> None:
    frames = torch.full((3, 4, 6, 3), 200, dtype=torch.uint8)
    resized = resize_frames(frames, 8, 10, mode)
    assert resized.shape == (3, 8, 10, 3)
    assert (resized.int() - 200).abs().max() <= 1


def test_sound_equals_the_release(golden: Path) -> None:
    vector = load_file(golden / "audio_utils.safetensors")
    resampled = to_playback_rate(vector["resample/in"].T, 51200)
    torch.testing.assert_close(resampled.T, vector["resample/out"], atol=1e-5, rtol=0)


def test_clip_of_101_latents_lasts_4_04_seconds() -> None:
    period = 2 * torch.pi * 400 / 51200  # 1616 whole periods
    tone = torch.sin(period * torch.arange(101 * 2048, dtype=torch.float64)).float()[None]
    resampled = to_playback_rate(tone, 51200)
    assert resampled.shape == (1, 178164)
    expected = torch.sin(period * torch.arange(178164, dtype=torch.float64) * 512 / 441).float()
    torch.testing.assert_close(resampled[0], expected, atol=1e-5, rtol=0)
