"""Colours of what is read: any image or video frame to 8-bit RGB as BT.709 and sRGB displays show it.

The networks know ordinary video: BT.709 primaries and about 2.4 gamma. Other encodings are converted here (HDR, wide
gamuts, ICC profiles, 16-bit and floating-point pixels) or refused with a `ValueError` whose text says why.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

# Numbers of H.273, which containers and decoders share.
BT709, UNKNOWN, BT2020, P3_DCI, P3_D65 = 1, 2, 9, 11, 12
PQ, HLG = 16, 18
_NAMES = {BT2020: "BT.2020", P3_DCI: "P3", P3_D65: "P3", PQ: "PQ", HLG: "HLG"}
# (x, y) of red, green and blue; white is D65. Those of BT.601 are so near BT.709 that players ignore them.
_PRIMARIES = {
    BT709: ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    P3_DCI: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    P3_D65: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_UNREAD_TRANSFERS = {8: "linear", 9: "logarithmic", 10: "logarithmic", 17: "SMPTE 428"}
_UNREAD_MATRICES = {8: "YCgCo", 10: "BT.2020 with constant luminance", 11: "YDzDx", 14: "ICtCp", 15: "IPT"}
_UNREAD_PRIMARIES = {4: "BT.470 M", 8: "film", 10: "XYZ"}

_WHITE = 203.0  # cd/m2 of SDR white in HDR (BT.2408)
_PEAK = 1000.0 / _WHITE  # the brightest value that stays apart from white; HLG's nominal peak
_KNEE = 0.8  # share of SDR white below which brightness is kept
_GAMMA = 2.4  # BT.1886
_ROUNDING = 2  # levels by which the result of an sRGB profile may differ from the image
_BAND = 1 << 20  # pixels converted at once, which bounds the memory


def conversion(transfer: int, primaries: int, matrix: int) -> str:
    """What `to_sdr` has to do with colours of these H.273 numbers: a note such as "tone-mapped from HLG", or "".

    Raises:
        ValueError: colours that are not read.
    """
    for number, unread, what in (
        (transfer, _UNREAD_TRANSFERS, "transfer characteristics"),
        (primaries, _UNREAD_PRIMARIES, "primaries"),
        (matrix, _UNREAD_MATRICES, "colour matrix"),
    ):
        if number in unread:
            raise ValueError(f"its {what} ({unread[number]}) are not read here; convert it to BT.709")
    if transfer in (PQ, HLG):
        return f"tone-mapped from {_NAMES[transfer]}"
    return f"converted from {_NAMES[primaries]} colours" if primaries in (BT2020, P3_DCI, P3_D65) else ""


def to_sdr(signal: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """Non-linear RGB in another encoding, uint16 [H,W,3] -> BT.709 RGB, uint8 [H,W,3].

    PQ and HLG become light (BT.2100; HLG on its nominal display of 1000 cd/m2), where 203 cd/m2 are SDR white.
    Brightness (the largest of R, G, B, so that hues stay) is kept up to 80 % of white; above, a shoulder takes 1000 cd/m2
    to white. Colours outside of BT.709 are clipped. Signals for ordinary displays only get other primaries.

    Args:
        transfer, primaries: numbers of H.273; unknown primaries of PQ and HLG are those of BT.2020.
    """
    if primaries not in _PRIMARIES:
        primaries = BT2020 if transfer in (PQ, HLG) else BT709
    matrix = _to_bt709(primaries).T
    luminance = np.array(_xyz(primaries)[1], dtype=np.float32)
    out = np.empty(signal.shape, dtype=np.uint8)
    rows = max(1, _BAND // max(1, signal.shape[1]))
    for top in range(0, len(signal), rows):
        light = _light(transfer)[signal[top : top + rows]]
        if transfer == HLG:  # the display's gamma of 1.2 applies to luminance
            light *= _PEAK * np.maximum(light @ luminance, 1e-9)[..., None] ** 0.2
        light = np.maximum(light @ matrix, 0.0)
        if transfer in (PQ, HLG):
            level = np.maximum(light.max(axis=-1, keepdims=True), 1e-9)
            light *= _shoulder(level) / level
        out[top : top + rows] = np.minimum(light, 1.0) ** (1 / _GAMMA) * 255.0 + 0.5
    return out


def _shoulder(level: np.ndarray) -> np.ndarray:
    """Identity up to the knee, then a rational curve of continuous slope that takes the peak to 1."""
    above = np.maximum(level - _KNEE, 0.0)
    return np.minimum(level, _KNEE) + above / (1 + above * (1 / (1 - _KNEE) - 1 / (_PEAK - _KNEE)))


@cache
def _light(transfer: int) -> np.ndarray:
    """Table [65536] fp32 from a 16-bit signal to light, 1 for SDR white; of the scene, 1 for its peak, with HLG."""
    signal = np.arange(65536) / 65535
    if transfer == PQ:
        root = signal ** (32 / 2523)
        light = (np.maximum(root - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * root)) ** (16384 / 2610) * 10000 / _WHITE
    elif transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        light = signal**_GAMMA
    return light.astype(np.float32)


def _xyz(primaries: int) -> np.ndarray:
    """Matrix [3,3] from linear RGB to XYZ; its second row gives the luminance."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in _PRIMARIES[primaries]]).T
    x, y = 0.3127, 0.3290
    white = np.array([x / y, 1, (1 - x - y) / y])
    return columns * np.linalg.solve(columns, white)


def _to_bt709(primaries: int) -> np.ndarray:
    return np.linalg.solve(_xyz(BT709), _xyz(primaries)).astype(np.float32)


# ------------------------------------------------------------------------------------------------- images


def image_to_rgb(image: Image) -> tuple[Image, str]:
    """A Pillow image of any mode as RGB, upright by its EXIF tag, and a note on what was changed, or "".

    Transparency is dropped as the release does (`convert("RGB")`): the hidden colours show. 16-bit values are
    divided by 257, floating-point values times 255. An embedded ICC profile other than sRGB is applied.

    Raises:
        ValueError: pixels whose range is not known.
    """
    from PIL import Image as pillow
    from PIL import ImageOps

    tags = getattr(image, "tag_v2", {})  # of TIFF; transposing drops them
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode[0] == "I":
        return pillow.fromarray(_grey(image, tags)).convert("RGB"), ""
    notes = []
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        notes.append("its transparency is dropped")
    if image.mode in ("RGBa", "La"):
        image = image.convert("RGBA")
    profile = image.info.get("icc_profile")
    if image.mode in ("P", "PA", "LA", "RGBA", "RGBX", "1", "YCbCr", "HSV"):
        image = image.convert("L" if image.mode in ("LA", "1") else "RGB")
    if profile or image.mode == "LAB":
        image, note = _managed(image, profile)
        notes.append(note)
    if image.mode == "CMYK":
        notes.append("its CMYK colours, without a usable profile, are approximate")
    return image.convert("RGB"), "; ".join(filter(None, notes))


def image_to_sdr(image: Image, transfer: int, primaries: int) -> tuple[Image, str]:
    """An RGB image whose file states H.273 numbers as `to_sdr` makes it, and a note, or "".

    Raises:
        ValueError: colours that are not read.
    """
    from PIL import Image as pillow

    note = conversion(transfer, primaries, UNKNOWN)
    if not note:
        return image, ""
    return pillow.fromarray(to_sdr(np.asarray(image).astype(np.uint16) * 257, transfer, primaries)), note


def _grey(image: Image, tags: Mapping[int, Any]) -> np.ndarray:
    """uint8 [H,W] of an image with 16-bit, 32-bit or floating-point pixels."""
    values = np.asarray(image)
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not (low >= -0.05 and high <= 1.05):  # also for NaN
            raise ValueError(
                f"has floating-point pixels from {low:g} to {high:g}, not 0 to 1; save it with 8 or 16 bits"
            )
        grey = values.clip(0, 1) * 255
    else:
        bits = tags.get(258, (16,))[0]
        if bits > 16 or values.min() < 0 or values.max() > 65535:
            raise ValueError("has 32-bit pixels, whose range is not known; save it with 8 or 16 bits")
        grey = values / ((1 << bits) - 1 if 8 < bits < 16 else 65535) * 255
        if tags.get(262) == 0:  # white is zero
            grey = 255 - grey
    return (grey + 0.5).astype(np.uint8)


def _managed(image: Image, profile: bytes | None) -> tuple[Image, str]:
    """An image through its ICC profile to sRGB, and a note; as it is when that changes nothing or cannot be done."""
    from PIL import ImageChops, ImageCms

    try:
        source: Any = ImageCms.createProfile("LAB")
        name = "LAB"
        if image.mode != "LAB" and profile:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            name = ImageCms.getProfileDescription(source).strip()
        target = ImageCms.createProfile("sRGB")
        converted: Any = ImageCms.profileToProfile(
            image, source, target, outputMode="RGB", flags=ImageCms.Flags.BLACKPOINTCOMPENSATION
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        if image.mode == "LAB":
            raise ValueError("has LAB colours that cannot be converted; save it as RGB") from error
        return image, "its colour profile does not fit and is ignored"
    # Judged by the pixels: names mislead ("Linear sRGB"), and there are many sRGB profiles.
    if image.mode in ("RGB", "L"):
        change = ImageChops.difference(image.convert("RGB"), converted)
        if np.asarray(change).max() <= _ROUNDING:
            return image, ""
    return converted, f"converted from {name} colours"
