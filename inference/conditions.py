"""What a user gives beside the prompt: a first frame and a sound track, brought to the size of the clip."""

from pathlib import Path

import torch

from magihuman import media, preprocess
from magihuman.errors import UserError


def read_picture(path: str | Path, height: int, width: int) -> torch.Tensor:
    """A picture file as the first frame: [1,3,1,height,width] fp32 in [-1,1], centre-cropped and resized.

    Raises:
        UserError: the file is missing, no picture, or too thin for the clip's shape.
    """
    from PIL import Image

    try:
        pixels = media.read_image(path)
    except UserError as error:
        raise UserError(f"image={path}: {error}; give a png or jpg file") from error
    rows, columns = pixels.shape[1:3]
    if min(rows * width // height, columns * height // width) < 1:
        raise UserError(
            f"image={path} has {columns} x {rows} pixels, too thin for a clip of {width} x {height}"
        )
    return preprocess.image_to_frame(Image.fromarray(pixels[0].numpy()), height, width)


def read_sound(path: str | Path, rate: int, channels: int, samples: int) -> torch.Tensor:
    """The sound of a media file: [1,channels,samples] fp32 at `rate`, cut or padded with silence at its end.

    Raises:
        UserError: the file is missing, unreadable or has no sound.
    """
    try:
        wave = media.read_audio(path, rate, channels)[:, :samples]
    except UserError as error:
        raise UserError(
            f"audio={path}: {error}; give a sound file such as wav, or a clip with sound"
        ) from error
    return torch.nn.functional.pad(wave, (0, samples - wave.shape[1]))[None]
