"""Conditioning inputs of a clip: first frame, audio track and negative prompt, read from files and fitted to it."""

import hashlib
from pathlib import Path

import torch

from magihuman.errors import UserError
from magihuman.io.text import read_text
from magihuman.media import images, reading

# Only the beginning of a track is used; one of many minutes is a mistake, and slow to decode.
LONGEST_AUDIO = 300.0
# Of the negative prompt that the released base model is guided away from (SPEC 5).
NEGATIVE_LENGTH = 1719
NEGATIVE_SHA256 = "4515a21f8d125d12e5a42b23e65bb09f46ea9817567f1834ad556e8cd1852c4b"


def read_image(path: str | Path, height: int, width: int) -> torch.Tensor:
    """An image file as the first frame: [1,3,1,height,width] fp32 in [-1,1], centre-cropped and resized.

    Raises:
        UserError: the file is missing, not an image, or too thin for the clip's shape.
    """
    from PIL import Image

    try:
        pixels = reading.read_image(path)
    except UserError as error:
        raise UserError(f"image={path}: {error}; give a png or jpg file") from error
    rows, columns = pixels.shape[1:3]
    if min(rows * width // height, columns * height // width) < 1:
        raise UserError(f"image={path} has {columns} x {rows} pixels, too thin for a clip of {width} x {height}")
    return images.image_to_frame(Image.fromarray(pixels[0].numpy()), height, width)


def audio_seconds_of(path: str | Path, rate: int) -> float:
    """Duration of a file's audio when it is read at `rate` Hz; the file is decoded, so that damage is found.

    Raises:
        UserError: the file is missing, unreadable, has no audio, or lasts longer than `LONGEST_AUDIO`.
    """
    try:
        seconds = reading.probe(path).seconds
        if seconds > LONGEST_AUDIO:
            raise UserError(f"it lasts {seconds:.0f} s, and {LONGEST_AUDIO:g} s is the most; cut the part you mean")
        return reading.read_audio(path, rate).shape[1] / rate
    except UserError as error:
        raise _unusable(path, error) from error


def read_audio_track(path: str | Path, rate: int, channels: int, samples: int) -> torch.Tensor:
    """The audio of a media file: [1,channels,samples] fp32 at `rate`, cut or padded with silence at its end.

    Raises:
        UserError: the file is missing, unreadable or has no audio.
    """
    try:
        wave = reading.read_audio(path, rate, channels)[:, :samples]
    except UserError as error:
        raise _unusable(path, error) from error
    return torch.nn.functional.pad(wave, (0, samples - wave.shape[1]))[None]


def _unusable(path: str | Path, error: UserError) -> UserError:
    hint = "" if "; " in str(error) else "; give an audio file such as wav, or a clip with audio"
    return UserError(f"audio={path}: {error}{hint}")


def read_negative_prompt(path: str | Path) -> tuple[str, str | None]:
    """The text of a negative prompt's file, without the line feed at its end, and a warning if it is not the
    released one.

    Raises:
        UserError: the file is missing, empty or not UTF-8.
    """
    text = read_text(path, f"negative_prompt_file={path}").rstrip("\n")
    if not text.strip():
        raise UserError(f"negative_prompt_file={path} is empty")
    found = hashlib.sha256(text.encode()).hexdigest()
    if found == NEGATIVE_SHA256:
        return text, None
    return text, (
        f"{path} is not the released negative prompt: {len(text)} characters, sha256 {found[:8]}, instead of "
        f"{NEGATIVE_LENGTH} and {NEGATIVE_SHA256[:8]}"
    )
