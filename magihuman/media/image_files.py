"""Image files through Pillow: upright, RGB as sRGB displays show it, with limits before they are decoded."""

from __future__ import annotations

import contextlib
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from magihuman.media import colour
from magihuman.media.container import MOST_PIXELS, MediaError, reason

if TYPE_CHECKING:  # torch takes a second to import and probing files does not need it
    import torch
    from PIL.Image import Image as Picture

# Image formats that Pillow reads without starting other programs, as it does for EPS.
_IMAGES = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM", "JPEG2000")


def probe_image(path: str | Path) -> tuple[tuple[int, int], str] | None:
    """(width, height) of an image file, upright, and the note of `open_image`.

    None where Pillow cannot read it, and for an animation, which is read as a video.

    Raises:
        MediaError: an image that cannot be read, or of a kind that is not.
    """
    from PIL import UnidentifiedImageError

    try:
        with _image_file(path) as file:
            if getattr(file, "is_animated", False) and file.format not in ("MPO", "TIFF"):
                if file.format == "WEBP":
                    raise MediaError("is an animated WebP image, which is not read here; convert it to mp4")
                return None
        image, note = open_image(path)
    except UnidentifiedImageError:
        if _kind_of(path) == "a HEIC photo":  # its tiles would pass for videos
            raise MediaError(_not_an_image(path)) from None
        return None
    except (OSError, SyntaxError, ValueError) as error:
        raise MediaError(f"cannot be read: {reason(error)}") from error
    return image.size, note


@contextlib.contextmanager
def _image_file(path: str | Path) -> Iterator[Any]:
    """A file opened by Pillow, not decoded yet; raises MediaError if it has too many pixels."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the limit is ours; palettes with transparency warn too
        try:
            file = Image.open(path, formats=_IMAGES)
        except Image.DecompressionBombError as error:
            raise MediaError("the image is too large to be opened safely; shrink it") from error
        with file:
            if file.width * file.height > MOST_PIXELS:
                size = f"{file.width} x {file.height}"
                raise MediaError(f"the image is too large to be opened safely ({size} pixels); shrink it")
            yield file


def open_image(path: str | Path) -> tuple[Picture, str]:
    """An image file as a Pillow image, upright and RGB (`colour.image_to_rgb`), and a note on what was changed, or "".

    Raises:
        MediaError: not a readable image, or more than 134 million pixels.
    """
    from PIL import UnidentifiedImageError

    try:
        with _image_file(path) as file:
            image, note = colour.image_to_rgb(file)
            if not file.info.get("icc_profile") and (coded := _coded_colours(path)):
                image, changed = colour.image_to_sdr(image, *coded)
                note = "; ".join(filter(None, (note, changed)))
            pages = getattr(file, "n_frames", 1) if file.format != "MPO" else 1  # MPO: previews of phones
    except UnidentifiedImageError as error:
        raise MediaError(_not_an_image(path)) from error
    except MediaError:
        raise
    except Exception as error:  # decoders of damaged files raise errors of many kinds
        raise MediaError(f"cannot be read: {reason(error)}") from error
    first = f"the first of its {pages} images" if pages > 1 else ""
    return image, "; ".join(filter(None, (first, note)))


def _coded_colours(path: str | Path) -> tuple[int, int] | None:
    """(transfer, primaries) of H.273 that an AVIF (nclx) or PNG (cICP) file states."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if (at := head.find(b"colrnclx")) >= 0:
        primaries, transfer = struct.unpack_from(">HH", head, at + 8)
        return transfer, primaries
    if head[:4] == b"\x89PNG" and (at := head.find(b"cICP", 0, head.find(b"IDAT"))) >= 0:
        return head[at + 5], head[at + 4]
    return None


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> torch.Tensor:
    """An image file, upright; transparency is dropped: uint8 [1,H,W,3].

    Args:
        size: (height, width): scaled to cover it and cropped at the centre; None keeps the image's own.

    Raises:
        MediaError: not a readable image.
    """
    import torch
    from PIL import Image, ImageOps

    image, _ = open_image(path)
    if size is not None and image.size != (size[1], size[0]):
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)[None])


def _kind_of(path: str | Path) -> str:
    """What a file without a reader is, by its first bytes; "" if that is not known."""
    with open(path, "rb") as file:
        head = file.read(512)
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        return "a HEIC photo"
    if b"<svg" in head:
        return "an SVG drawing"
    kinds = {b"%PDF": "a PDF document", b"%!PS": "a PostScript document", b"8BPS": "a Photoshop document"}
    return kinds.get(head[:4], "")


def _not_an_image(path: str | Path) -> str:
    kind = _kind_of(path)
    return f"is {kind}, which is not read here; export it as JPEG or PNG" if kind else "is not a readable image"
