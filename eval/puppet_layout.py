"""Place, size and camera of a puppet of the world `scene`, and its clip as if the puppet filled the frame.

    layout = find_layout(frames)         # layout.side, layout.size, layout.camera, layout.object, layout.error
    close = close_up(frames, layout)     # uint8 [F,H,W,3], measured by `eval.puppet_vision` like a puppet of the world `tiny`

Every combination of place, size, camera and face shape is compared with the first, middle and last frame, in the palette
colours nearest to what it shows in its regions; the combination with the smallest error is taken. Where no combination comes
near, a person would not recognise one puppet either: two half-transparent puppets, or none.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from data.tiny.puppets import (
    CENTRES,
    EYE_COLOURS,
    HAIR,
    MOUTH_CENTRE,
    OBJECT_COLOURS,
    OBJECTS,
    SCALES,
    SHIRTS,
    SKINS,
    WALLS,
    Puppet,
    camera_track,
    layers,
    puppet_points,
    scene_points,
    wall_shading,
)
from magihuman.codecs.tiny_captions import CAMERAS, FACES, SIDES, SIZES

PIXELS = 64  # clips are compared at this size
MOUTH_RADII = (0.19, 0.155)  # of the lips of the widest and of the most open vowel, with a margin for blur
REGIONS = ("wall", "hair", "skin", "neck", "shirt", "white", "pupil")
CLIPPED = 60.0  # of 255: an error that counts no more than this, so that few wrong pixels do not decide
WRONG = 35.0  # of 255: a pixel that differs by more is wrong; the noise of models on the wall is less


@dataclass(frozen=True)
class PuppetLayout:
    """What was found.

    Attributes:
        side, size, camera, object: as in `data.tiny.puppets`; wall: its colour's name.
        error: pixels outside of mouth and object that differ from the drawn combination by more than `WRONG`, as a share of
            the puppet's pixels; at most .1 of real clips through the codec, mostly above .3 of two half-transparent puppets.
    """

    side: str
    size: str
    camera: str
    object: str
    wall: str
    error: float


@dataclass(frozen=True)
class _Hypotheses:
    """For H combinations and P pixels of three frames.

    Attributes:
        names: (side, size, camera, face) of each.
        shares [H,R,P]: share of each region's colour in a pixel; that of the wall is multiplied by `shading`.
        pure [H,R,P]: 1/n in the n pixels that show one region alone.
        counted [H,P]: 1 where the error counts; puppet [H]: how many of these pixels show the puppet.
        shading [H,P]: brightness factor of the wall.
    """

    names: tuple[tuple[str, str, str, str], ...]
    shares: np.ndarray
    pure: np.ndarray
    counted: np.ndarray
    puppet: np.ndarray
    shading: np.ndarray


def _views(camera: str) -> list[tuple[float, float]]:
    """Of the first, the middle and the last frame."""
    return [(float(shift), float(zoom)) for shift, zoom in camera_track(camera, 3)]


def _shares(face: str, side: str, size: str, thing: str, view: tuple[float, float]) -> dict[str, np.ndarray]:
    """Share of each colour in every pixel: name -> [PIXELS, PIXELS]; shares of a pixel sum to 1, the wall included."""
    found = {"wall": np.ones((PIXELS, PIXELS))}
    for name, mask in layers(face, side, size, thing, PIXELS, view):
        found = {key: value * (1 - mask) for key, value in found.items()}
        found[name] = found.get(name, 0) + mask
    return found


def mouth_pixels(puppet: Puppet, size: int) -> np.ndarray:
    """Where a puppet's mouth is drawn, with a margin, in frames of `size` x `size`: boolean [F,size,size]."""
    views = [(float(shift), float(zoom)) for shift, zoom in camera_track(puppet.camera, puppet.frames)]
    regions = {view: _mouth(puppet.side, puppet.size, view, size) for view in dict.fromkeys(views)}
    return np.stack([regions[view] for view in views])


def _mouth(side: str, size: str, view: tuple[float, float], pixels: int = PIXELS) -> np.ndarray:
    x, y = puppet_points(side, size, *scene_points(pixels, view))
    return ((x - MOUTH_CENTRE[0]) / MOUTH_RADII[0]) ** 2 + ((y - MOUTH_CENTRE[1]) / MOUTH_RADII[1]) ** 2 < 1


def _thing(side: str, size: str, view: tuple[float, float]) -> np.ndarray:
    """Where objects hang, [PIXELS, PIXELS]."""
    masks = [layers("round", side, size, thing, PIXELS, view)[0][1] for thing in OBJECTS[1:]]
    return np.asarray(np.max(masks, axis=0) > 0.05)


@lru_cache(maxsize=1)
def _hypotheses() -> _Hypotheses:
    names = tuple(product(SIDES, SIZES, CAMERAS, FACES))
    shares, counted, shading = [], [], []
    for side, size, camera, face in names:
        seen = [_shares(face, side, size, "none", view) for view in _views(camera)]
        shares.append([np.concatenate([one[region].ravel() for one in seen]) for region in REGIONS])
        hidden = [_mouth(side, size, view) | _thing(side, size, view) for view in _views(camera)]
        counted.append(1 - np.concatenate([mask.ravel() for mask in hidden]))
        shading.append(np.concatenate([wall_shading(scene_points(PIXELS, view)[1]).ravel() for view in _views(camera)]))
    share, valid, bright = (np.array(values, np.float32) for values in (shares, counted, shading))
    alone = (share > 0.95) * valid[:, None]
    pure = alone / np.maximum(alone.sum(2, keepdims=True), 1)
    puppet = ((1 - share[:, 0]) * valid).sum(1)
    share[:, 0] *= bright
    return _Hypotheses(names, share, pure, valid, puppet, bright)


def _nearest(found: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> np.ndarray:
    """Numbers of the palette's entries nearest to colours [H,3]."""
    entries = np.array(list(palette.values()), np.float32)
    return np.asarray(np.square(found[:, None] - entries).sum(2).argmin(1))


def require_whole_factor(pixels: int) -> None:
    """Raises ValueError unless clips of this height and width are a multiple of `PIXELS`."""
    if pixels % PIXELS or not pixels:
        raise ValueError(
            f"puppets of the world scene are measured at multiples of {PIXELS} pixels, not {pixels}; scale the clip, for "
            f"example to {PIXELS}x{PIXELS}"
        )


def _small(frames: np.ndarray) -> np.ndarray:
    """First, middle and last frame at `PIXELS`: fp32 [3 * PIXELS^2, 3].

    Raises:
        ValueError: a size that is no multiple of `PIXELS`.
    """
    chosen = frames[[0, len(frames) // 2, len(frames) - 1]].astype(np.float32)
    require_whole_factor(chosen.shape[1])
    factor = chosen.shape[1] // PIXELS
    return chosen.reshape(3, PIXELS, factor, PIXELS, factor, 3).mean((2, 4)).reshape(-1, 3)


def find_layout(frames: np.ndarray) -> PuppetLayout:
    """The layout of a clip, uint8 [F,H,W,3] with H = W a multiple of `PIXELS`."""
    known, pixels = _hypotheses(), _small(frames)
    flat = pixels / known.shading[..., None]  # [H,P,3]; only the wall is shaded, and its colours are compared flat
    shown = known.pure @ pixels  # [H,R,3]
    shown[:, 0] = np.einsum("hp,hpc->hc", known.pure[:, 0], flat)
    painted = np.empty_like(shown)
    chosen = {}
    for name, palette in (("wall", WALLS), ("hair", HAIR), ("skin", SKINS), ("shirt", SHIRTS)):
        chosen[name] = _nearest(shown[:, REGIONS.index(name)], palette)
        painted[:, REGIONS.index(name)] = np.array(list(palette.values()), np.float32)[chosen[name]]
    painted[:, REGIONS.index("neck")] = 0.86 * painted[:, REGIONS.index("skin")]
    for name, colour in EYE_COLOURS.items():
        painted[:, REGIONS.index(name)] = colour
    difference = np.abs(np.einsum("hrp,hrc->hpc", known.shares, painted, optimize=True) - pixels).mean(2)
    errors = (np.minimum(difference, CLIPPED) * known.counted).sum(1) / known.counted.sum(1)
    best = int(errors.argmin())
    side, size, camera, _ = known.names[best]
    wall = list(WALLS)[chosen["wall"][best]]
    wrong = (difference[best] > WRONG) @ known.counted[best]
    error = float(wrong / known.puppet[best])
    return PuppetLayout(side, size, camera, _object(pixels, side, size, camera, wall), wall, error)


def _object(pixels: np.ndarray, side: str, size: str, camera: str, wall: str) -> str:
    """The object on the wall, by the smallest error where objects hang."""
    palette = {"wall": WALLS[wall], **OBJECT_COLOURS}
    where = np.concatenate([_thing(side, size, view).ravel() for view in _views(camera)])
    errors = []
    for thing in OBJECTS:
        seen = [_shares("round", side, size, thing, view) for view in _views(camera)]
        drawn = sum(
            np.concatenate([one.get(name, np.zeros((PIXELS, PIXELS))).ravel() for one in seen])[:, None]
            * np.array(colour)
            for name, colour in palette.items()
        )
        errors.append(np.abs(drawn - pixels)[where].mean())
    return OBJECTS[int(np.argmin(errors))]


@lru_cache(maxsize=64)
def _gather(side: str, size: str, camera: str, frames: int, pixels: int) -> tuple[np.ndarray, ...]:
    """Pixels of each frame around every pixel of the close-up, and the share of each: ([4,F,P] int, [4,F,P] fp32)."""
    x, y = scene_points(pixels, (0.0, 1.0))
    sx, sy = CENTRES[side] + (x - 0.5) * SCALES[size], 1 - (1 - y) * SCALES[size]
    places, weights = [], []
    for shift, zoom in camera_track(camera, frames):
        u = np.clip((0.5 + (sx - shift - 0.5) * zoom) * pixels - 0.5, 0, pixels - 1)
        v = np.clip((0.5 + (sy - 0.5) * zoom) * pixels - 0.5, 0, pixels - 1)
        left, top = np.minimum(u.astype(int), pixels - 2), np.minimum(v.astype(int), pixels - 2)
        a, b = u - left, v - top
        places.append([((top + j) * pixels + left + i).ravel() for j in (0, 1) for i in (0, 1)])
        weights.append([(wv * wu).ravel() for wv in (1 - b, b) for wu in (1 - a, a)])
    return np.array(places).swapaxes(0, 1), np.array(weights, np.float32).swapaxes(0, 1)


def close_up(frames: np.ndarray, layout: PuppetLayout) -> np.ndarray:
    """The clip, uint8 [F,H,W,3], moved and enlarged so that the puppet stands in the middle and fills the frame."""
    count, pixels = len(frames), frames.shape[1]
    places, weights = _gather(layout.side, layout.size, layout.camera, count, pixels)
    flat, rows = frames.reshape(count, -1, 3).astype(np.float32), np.arange(count)[:, None]
    close = sum(flat[rows, place] * weight[..., None] for place, weight in zip(places, weights, strict=True))
    return np.clip(np.rint(close), 0, 255).astype(np.uint8).reshape(frames.shape)
