"""Measurements in frames of puppets: attributes, mouth opening and shape, eyes, sharpness, flicker.

All positions are shares of the image, so clips of any square size are measured alike (only sharpness depends on the
size). Colours are decided by the nearest palette entry of a region's median over space and time; the
face shape by which of the three drawn silhouettes explains the median frame best. A clip of the world `scene` is first moved
and enlarged until its puppet fills the frame (`eval.puppet_layout`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from data.tiny.puppets import (
    FACES,
    HAIR,
    LIP,
    MOUTH_CENTRE,
    MOUTH_INSIDE,
    SHIRTS,
    SKINS,
    WALLS,
    draw_puppet,
    pixel_grid,
    portrait,
    wall_shading,
)
from eval.image_metrics import laplacian, luma
from eval.puppet_layout import MOUTH_RADII, close_up, find_layout, require_whole_factor

STATIC_AMPLITUDE = 0.004  # of the image's area; the smallest vowel (u) opens 0.012


@dataclass(frozen=True)
class FrameMeasures:
    """Measurements of one clip.

    Attributes:
        attributes: face, hair, shirt, wall and skin; in the world `scene` side, size, camera and object, too.
        openness [F]: area of the mouth's inside as a share of the image; amplitude: its 5 % to 95 % range.
        static: whether the mouth does not move.
        lip_aspect [F]: width over height of the lips with the mouth's inside.
        eyes: contrast of the weaker eye, as a share of a drawn one's; 0 where it is missing.
        sharpness, mouth_sharpness: variance of the Laplacian of the luma in [0,1].
        flicker: mean absolute change of the luma between frames, outside the mouth.
        layout_error: difference from the nearest drawable layout, see `eval.puppet_layout`; None in the world `tiny`.
    """

    attributes: dict[str, str]
    openness: np.ndarray
    amplitude: float
    static: bool
    lip_aspect: np.ndarray
    eyes: float
    sharpness: float
    mouth_sharpness: float
    flicker: float
    layout_error: float | None = None


@lru_cache(maxsize=4)
def _regions(size: int) -> dict[str, np.ndarray]:
    """Regions of each colour for any face shape, and the mouth: boolean [size, size] each."""
    x, y = pixel_grid(size)
    aside = np.abs(x - 0.5)
    forehead = (aside < 0.10) & (y > 0.345) & (y < 0.395)
    nose = (aside < 0.15) & (y > 0.485) & (y < 0.515)
    mouth = ((x - MOUTH_CENTRE[0]) / MOUTH_RADII[0]) ** 2 + ((y - MOUTH_CENTRE[1]) / MOUTH_RADII[1]) ** 2 < 1
    return {
        "wall": (aside > 0.34) & (y > 0.04) & (y < 0.62),
        "shirt": (aside < 0.25) & (y > 0.89) & (y < 0.99),
        "hair": (aside < 0.08) & (y > 0.235) & (y < 0.30),
        "skin": forehead | nose,
        "mouth": mouth,
    }


def mouth_region(size: int) -> np.ndarray:
    """Region of the mouth in an image of `size` x `size`: boolean [size, size]."""
    return _regions(size)["mouth"]


def _nearest(colour: np.ndarray, palette: Mapping[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.sum((np.array(palette[name]) - colour) ** 2)))


@lru_cache(maxsize=512)
def _silhouettes(hair: str, shirt: str, wall: str, skin: str, size: int) -> np.ndarray:
    """The still image with each face shape: fp32 [3, size, size, 3] in 0..255."""
    someone = replace(draw_puppet(0, 0), hair=hair, shirt=shirt, wall=wall, skin=skin)
    return np.stack([portrait(replace(someone, face=face), size) for face in FACES]).astype(np.float32)


def attributes(frames: np.ndarray) -> dict[str, str]:
    """Face, hair, shirt, wall and skin of a clip, uint8 [F,H,W,3] with H = W."""
    still = np.median(frames, axis=0)  # [H, W, 3]
    size = still.shape[0]
    regions = _regions(size)
    # The wall darkens downwards by the drawing's gradient; undo it before the colours are compared.
    shading = wall_shading(pixel_grid(size)[1])
    wall = np.median((still / shading[..., None])[regions["wall"]], axis=0)
    found = {"wall": _nearest(wall, WALLS)}
    for name, palette in (("hair", HAIR), ("shirt", SHIRTS), ("skin", SKINS)):
        found[name] = _nearest(np.median(still[regions[name]], axis=0), palette)
    drawn = _silhouettes(found["hair"], found["shirt"], found["wall"], found["skin"], size)
    apart = (drawn.std(0).sum(-1) > 1) & ~regions["mouth"]  # pixels on which the three shapes disagree
    distance = np.abs(drawn - still)[:, apart].sum(-1)
    return {"face": FACES[int(np.minimum(distance, 120).sum(1).argmin())], **found}


def _skin_colour(frames: np.ndarray) -> np.ndarray:
    """Colour of this clip's skin: fp64 [3]."""
    return np.asarray(np.median(frames[:, _regions(frames.shape[1])["skin"]].reshape(-1, 3), axis=0))


def _mouth_shares(frames: np.ndarray) -> np.ndarray:
    """Shares of the mouth's inside and of the lips in every pixel of the mouth region: fp64 [2,F,pixels].

    Every pixel is unmixed into skin (of this clip), lip and inside, with shares that sum to one by least squares. The result
    is linear in the pixels, so blur moves the shares but keeps their sum, and noise averages out.
    """
    inside, skin = np.array(MOUTH_INSIDE, float), _skin_colour(frames)
    if np.linalg.norm(skin - inside) < 40:  # no skin to see: unmix against the nearest that exists
        skin = np.array(SKINS[_nearest(skin, SKINS)], float)
    mixture = np.stack([inside - skin, np.array(LIP, float) - skin], 1)  # [3, 2]
    pixels = frames[:, mouth_region(frames.shape[1])].astype(float) - skin
    return np.moveaxis(np.linalg.pinv(mixture) @ pixels.swapaxes(1, 2), 1, 0)


def mouth_openness(frames: np.ndarray) -> np.ndarray:
    """Area of the visible mouth inside per frame, as a share of the image: fp64 [F]."""
    return np.asarray(_mouth_shares(frames)[0].sum(-1)) / frames.shape[1] ** 2


def lip_aspect(shares: np.ndarray, size: int) -> np.ndarray:
    """Width over height of the lips with the mouth's inside, by second moments: fp64 [F], NaN where none are seen.

    Args:
        shares: of `_mouth_shares`, [2,F,pixels]; size: height and width of the image.
    """
    region = mouth_region(size)
    weights = np.clip(shares.sum(0), 0, None)  # [F, pixels]
    total = weights.sum(-1)
    spread = []
    for axis in pixel_grid(size):
        places = axis[region]
        centre = (weights @ places) / np.maximum(total, 1e-9)
        spread.append((weights * (places - centre[:, None]) ** 2).sum(-1))
    width, height = spread
    seen = (total > 1e-4 * size**2) & (height > 0)
    return np.sqrt(np.where(seen, width, np.nan) / np.where(seen, height, 1))


@lru_cache(maxsize=4)
def eye_regions(size: int) -> np.ndarray:
    """Regions of both eyes with a margin for blur: boolean [2,size,size]."""
    x, y = pixel_grid(size)
    return np.stack([((x - 0.5 - aside) / 0.055) ** 2 + ((y - 0.44) / 0.046) ** 2 < 1 for aside in (-0.095, 0.095)])


@lru_cache(maxsize=16)
def _eye_difference(skin: str, size: int) -> np.ndarray:
    """Difference of the drawn face from its skin: fp64 [size,size,3]."""
    return np.asarray(portrait(replace(draw_puppet(0, 0), skin=skin), size) - np.array(SKINS[skin], float))


def eye_contrast(frames: np.ndarray) -> float:
    """Contrast of the weaker eye as a share of a drawn one's: about 1 where both are there, 0 where one is missing.

    The mean frame's difference from the skin, projected onto the drawn eye's.
    """
    skin = _skin_colour(frames)
    drawn, difference = _eye_difference(_nearest(skin, SKINS), frames.shape[1]), frames.mean(0) - skin
    found = [
        float((difference[eye] * drawn[eye]).sum() / (drawn[eye] ** 2).sum()) for eye in eye_regions(frames.shape[1])
    ]
    return max(0.0, min(found))


def require_measurable(frames: np.ndarray, world: str = "tiny") -> None:
    """Raises ValueError unless a clip of a world is uint8 [F,H,W,3], square, and of a length and size that is measured."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames must be uint8 [F,H,W,3], not {frames.dtype} {list(frames.shape)}")
    if frames.shape[1] != frames.shape[2] or frames.shape[1] < 16 or len(frames) < 2:
        raise ValueError(
            f"puppets are square, at least 16 pixels and 2 frames; this clip has {frames.shape[2]}x{frames.shape[1]} "
            f"pixels and {len(frames)} frames"
        )
    if world == "scene":
        require_whole_factor(frames.shape[1])


def measure_frames(frames: np.ndarray, world: str = "tiny") -> FrameMeasures:
    """Measure one clip of a world, uint8 [F,H,W,3].

    Raises:
        ValueError: what `require_measurable` refuses.
    """
    require_measurable(frames, world)
    edges = laplacian(luma(frames) / 255)
    layout = find_layout(frames) if world == "scene" else None
    if layout is not None:
        frames = close_up(frames, layout)
    mouth = mouth_region(frames.shape[1])
    shares = _mouth_shares(frames)
    openness = shares[0].sum(-1) / frames.shape[1] ** 2
    amplitude = float(np.quantile(openness, 0.95) - np.quantile(openness, 0.05))
    levels = luma(frames) / 255
    found = attributes(frames)
    if layout is not None:
        found |= {name: getattr(layout, name) for name in ("wall", "side", "size", "camera", "object")}
    return FrameMeasures(
        attributes=found,
        openness=openness,
        amplitude=amplitude,
        static=amplitude < STATIC_AMPLITUDE,
        lip_aspect=lip_aspect(shares, frames.shape[1]),
        eyes=eye_contrast(frames),
        sharpness=float(edges.var(axis=(1, 2)).mean()),
        mouth_sharpness=float(laplacian(levels)[:, mouth[1:-1, 1:-1]].var(axis=1).mean()),
        flicker=float(np.abs(np.diff(levels, axis=0))[:, ~mouth].mean()),
        layout_error=None if layout is None else layout.error,
    )
