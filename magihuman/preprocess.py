"""From a picture to the frame that conditions a clip (SPEC 4.6)."""

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image


def crop_to_aspect(image: "Image", height: int, width: int) -> "Image":
    """Cut the centre of `image` to the aspect ratio height : width, without resizing.

    The crop's size is truncated to whole pixels; Pillow rounds its (half-pixel) position half to even.
    """
    w, h = image.size
    if (w, h) == (width, height):
        return image
    if h / w > height / width:
        crop_w, crop_h = w, int(w * height / width)
    else:
        crop_w, crop_h = int(h * width / height), h
    left, top = (w - crop_w) / 2, (h - crop_h) / 2
    return image.crop((left, top, left + crop_w, top + crop_h))


def image_to_frame(image: "Image", height: int, width: int) -> torch.Tensor:
    """Crop, resize (Lanczos) and scale a picture -> [1,3,1,height,width] fp32 in [-1,1]."""
    from PIL.Image import Resampling

    cropped = crop_to_aspect(image.convert("RGB"), height, width)
    pixels = np.asarray(cropped.resize((width, height), Resampling.LANCZOS), dtype=np.float32) / 255.0
    return (torch.from_numpy(pixels).permute(2, 0, 1) * 2.0 - 1.0)[None, :, None]
