"""Pictures that condition a clip."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from magihuman.media.images import crop_to_aspect, image_to_frame


def test_pictures_equal_the_release(golden: Path) -> None:
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


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 50), (50, 50)), ((50, 100), (50, 50)), ((64, 64), (64, 64))]
)
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
