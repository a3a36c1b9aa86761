"""Conditioning frames, 8-bit frames and 44.1 kHz audio, compared with the release."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from magihuman.media.images import crop_to_aspect, frames_to_uint8, image_to_frame, resize_frames, to_playback_rate


def test_conditioning_frames_equal_the_release(golden: Path) -> None:
    vector = load_file(golden / "image_resizecrop.safetensors")
    meta = json.loads((golden / "manifest.json").read_text())["files"]["image_resizecrop"]["meta"]
    for index, case in enumerate(meta["cases"]):
        image = Image.fromarray(vector[f"{index}/image"].numpy())
        height, width = case["target_h"], case["target_w"]
        cropped = np.array(crop_to_aspect(image, height, width))
        assert torch.equal(torch.from_numpy(cropped), vector[f"{index}/cropped"])
        frame = image_to_frame(image, height, width)
        # Exact with the Pillow that made the vectors; another may round Lanczos by two levels (manifest).
        torch.testing.assert_close(frame[:, :, 0], vector[f"{index}/preprocessed"], atol=4 / 255, rtol=0)


@pytest.mark.parametrize(("size", "expected"), [((100, 50), (50, 50)), ((50, 100), (50, 50)), ((64, 64), (64, 64))])
def test_crop_is_centred(size: tuple[int, int], expected: tuple[int, int]) -> None:
    width, height = size
    columns = np.tile(np.arange(width, dtype=np.uint8), (height, 1))
    cropped = crop_to_aspect(Image.fromarray(columns).convert("RGB"), 32, 32)
    assert cropped.size == expected
    assert np.asarray(cropped)[0, 0, 0] == (width - expected[0]) // 2


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "RGB"])
def test_any_colour_mode_gives_three_channels(mode: str) -> None:
    frame = image_to_frame(Image.new("RGB", (40, 30), (255, 255, 255)).convert(mode), 32, 64)
    assert frame.shape == (1, 3, 1, 32, 64)
    assert frame.dtype == torch.float32
    assert frame.min() == frame.max() == 1.0


def test_8_bit_frames_equal_the_release(golden: Path) -> None:
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
def test_resizing_keeps_flat_frames_and_size(mode: Literal["bilinear", "bicubic", "nearest"]) -> None:
    frames = torch.full((3, 4, 6, 3), 200, dtype=torch.uint8)
    resized = resize_frames(frames, 8, 10, mode)
    assert resized.shape == (3, 8, 10, 3)
    assert (resized.int() - 200).abs().max() <= 1


def test_playback_audio_equals_the_release(golden: Path) -> None:
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
