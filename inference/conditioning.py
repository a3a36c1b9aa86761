"""Conditioning inputs of a clip: first frame, audio track and negative prompt, read from files and fitted to it."""

import ast
import hashlib
import os
from functools import cache
from pathlib import Path

import torch

from inference.requests import RELEASED
from magihuman.errors import UserError
from magihuman.io.text import read_text
from magihuman.media import images, reading
from magihuman.media.image_files import open_image

RELEASE_VARIABLE = "MAGIHUMAN_RELEASE"
"""Environment variable with the folder of a checkout of the release's code."""
RELEASE_SCRIPT = Path("inference/pipeline/video_generate.py")
LARGEST_SCRIPT = 1_000_000
# Of the negative prompt that the released base model is guided away from (SPEC 5).
NEGATIVE_LENGTH = 1719
NEGATIVE_SHA256 = "4515a21f8d125d12e5a42b23e65bb09f46ea9817567f1834ad556e8cd1852c4b"


def read_image(path: str | Path, height: int, width: int) -> tuple[torch.Tensor, str]:
    """An image file as the first frame, and a note on what reading changed, or "".

    The frame is [1,3,1,height,width] fp32 in [-1,1], centre-cropped and resized.

    Raises:
        UserError: the file is missing, not an image, or too thin for the clip's shape.
    """
    try:
        image, note = open_image(path)
    except UserError as error:
        hint = "" if "; " in str(error) else "; give a png or jpg file"
        raise UserError(f"image={path}: {error}{hint}") from error
    columns, rows = image.size
    if min(rows * width // height, columns * height // width) < 1:
        raise UserError(f"image={path} has {columns} x {rows} pixels, too thin for a clip of {width} x {height}")
    return images.image_to_frame(image, height, width), note


def audio_seconds_of(path: str | Path, rate: int) -> float:
    """Duration of a file's audio when it is read at `rate` Hz; the file is decoded, so that damage is found.

    Raises:
        UserError: the file is missing, unreadable, has no audio, or lasts longer than
            `magihuman.media.container.LONGEST_AUDIO`.
    """
    try:
        return reading.read_audio(path, rate).shape[1] / rate
    except UserError as error:
        raise _unusable(path, error) from error


def read_audio_track(path: str | Path, rate: int, channels: int, samples: int, tail: int = 0) -> torch.Tensor:
    """The audio of a media file: [1,channels,samples] fp32 at `rate`, cut or padded with silence at its end.

    Args:
        tail: keep so many samples more where the file has them.

    Raises:
        UserError: the file is missing, unreadable or has no audio.
    """
    try:
        wave = reading.read_audio(path, rate, channels)[:, : samples + tail]
    except UserError as error:
        raise _unusable(path, error) from error
    return torch.nn.functional.pad(wave, (0, max(0, samples - wave.shape[1])))[None]


def _unusable(path: str | Path, error: UserError) -> UserError:
    hint = "" if "; " in str(error) else "; give an audio file such as wav, or a clip with audio"
    return UserError(f"audio={path}: {error}{hint}")


def read_negative_prompt(path: str | Path, setting: str = "negative_prompt_file") -> tuple[str, str | None]:
    """The text of a negative prompt's file, without the line feed at its end, and a warning if it is not the
    released one.

    Args:
        setting: that names the file, for messages.

    Raises:
        UserError: the file is missing, empty or not UTF-8.
    """
    text = read_text(path, f"{setting}={path}").rstrip("\n")
    if not text.strip():
        raise UserError(f"{setting}={path} is empty")
    found = hashlib.sha256(text.encode()).hexdigest()
    if found == NEGATIVE_SHA256:
        return text, None
    return text, (
        f"{path} is not the released negative prompt: {len(text)} characters, sha256 {found[:8]}, instead of "
        f"{NEGATIVE_LENGTH} and {NEGATIVE_SHA256[:8]}"
    )


def released_negative_prompt() -> str:
    """The release's own negative prompt, which is not ours to copy, from its code in the folder `RELEASE_VARIABLE`.

    The code is parsed and not run: the text is what a function assigns and adds to the name `negative_prompt`.

    Raises:
        UserError: the variable is not set, the script cannot be read or holds another text; says what that changes.
    """
    effect = "without it, guidance leads away from an empty text, which changes every guided clip"
    folder = os.environ.get(RELEASE_VARIABLE)
    if not folder:
        raise UserError(
            f"negative_prompt={RELEASED} is read from the release's code: set {RELEASE_VARIABLE} to a checkout of "
            f"https://github.com/GAIR-NLP/daVinci-MagiHuman, or leave it out ({effect})"
        )
    return _released_text(folder, effect)


@cache
def _released_text(folder: str, effect: str) -> str:
    path = Path(os.path.expanduser(folder), RELEASE_SCRIPT)  # pathlib's raises for an unknown user
    if not path.is_file():
        raise UserError(f"{RELEASE_VARIABLE}={folder} is no checkout of the release: {path} is missing ({effect})")
    if path.stat().st_size > LARGEST_SCRIPT:
        raise UserError(f"{path} is no script of the release: it has more than {LARGEST_SCRIPT} bytes ({effect})")
    try:
        parsed = ast.parse(read_text(path, RELEASE_VARIABLE))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(
            f"{path} is not a Python script ({type(error).__name__}); check it out again ({effect})"
        ) from None
    texts = [_assigned(node, "negative_prompt") for node in ast.walk(parsed) if isinstance(node, ast.FunctionDef)]
    text = next(filter(None, texts), "")
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != NEGATIVE_SHA256:
        raise UserError(
            f"{path} does not hold the released negative prompt: {len(text)} characters, sha256 {found[:8]}, instead of "
            f"{NEGATIVE_LENGTH} and {NEGATIVE_SHA256[:8]}; check out the release ({effect})"
        )
    return text


def _assigned(function: ast.FunctionDef, name: str) -> str:
    """The text that the function's statements assign and add to a name, as far as they are constants."""
    text = ""
    for node in function.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not (isinstance(node, ast.Assign | ast.AugAssign) and isinstance(target, ast.Name) and target.id == name):
            continue
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            text = node.value.value if isinstance(node, ast.Assign) else text + node.value.value
    return text
