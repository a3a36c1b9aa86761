"""Puppets and their worlds: synthetic cartoon faces that speak syllables.

A puppet is rendered from signed distances (any size, anti-aliased) and speaks by formant synthesis; one articulation
drives mouth and audio. Everything is a pure function of (world, seed, index), so any clip can be made again. After the mp4
files are written, they are treated like real videos.

    python -m data.tiny output=clips clips=200

A caption states looks and syllables. In the world `tiny` it leaves open skin tone, pitch and timing. In `scene` it also
states, with a probability each, place, size, camera, voice and background sound; what it does not state is drawn with shares
that are known and unequal, which measures the diversity of a model's samples. These words come last, because the text encoder
gives every word its index: in this order the k-th syllable has the same index in every caption. Pairs of shirt and wall in
`NOVEL_PAIRS` are never drawn unless asked for: evaluation uses them as combinations that no training has seen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from magihuman.codecs.tiny_captions import (
    CAMERAS,
    FACES,
    FORMS,
    HAIR,
    ONSETS,
    SCENE_ONSETS,
    SHIRTS,
    SIDES,
    SIZES,
    SOUNDS,
    TONES,
    VOWELS,
    WALLS,
    read_caption,
)

FPS = 25
SAMPLE_RATE = 16000

SKINS = {"light": (250, 215, 190), "tan": (215, 160, 115), "dark": (135, 88, 62)}
OBJECTS = ("none", "clock", "picture")

# First three formants in Hz, and the mouth (half width, half height) as shares of a puppet's frame.
FORMANTS = {
    "a": (820, 1250, 2600),
    "e": (480, 1950, 2600),
    "i": (280, 2450, 3100),
    "o": (500, 850, 2450),
    "u": (310, 700, 2300),
}
MOUTHS = {"a": (0.125, 0.115), "e": (0.145, 0.080), "i": (0.150, 0.052), "o": (0.085, 0.100), "u": (0.060, 0.065)}
REST_WIDTH = 0.105
BILABIALS = ("b", "m")
"""Onsets for which the lips close; for the others they are slightly apart."""
APART = 0.018  # half height of the mouth then
LIP = (185, 50, 65)
LIPS = (0.022, 0.024)  # breadth of the lips beside and above the mouth's inside
MOUTH_INSIDE = (70, 8, 28)
MOUTH_CENTRE = (0.5, 0.63)

# Where a puppet stands, as shares of the scene: the centre, and its size; puppets stand on the lower edge.
CENTRES = {"left": 0.3, "middle": 0.5, "right": 0.7}
SCALES = {"full": 1.0, "near": 0.8, "far": 0.6}
PAN = 0.07  # to either side, share of the scene
ZOOM = 1.2  # at the end
OBJECT_SIDE = {"left": 0.83, "middle": 0.86, "right": 0.17}
OBJECT_HEIGHT = 0.2
RAIN, ENGINE = 0.03, 0.04  # root mean square of the background sounds; speech has about 0.13
ENGINE_HERTZ = 55.0


@dataclass(frozen=True)
class Attribute:
    """What a world's clips differ in.

    Attributes:
        values: its values; shares: how often each is drawn, None for equally often.
        stated: probability that the caption states it.
    """

    values: tuple[str, ...]
    shares: tuple[float, ...] | None = None
    stated: float = 1.0

    @property
    def expected(self) -> tuple[float, ...]:
        """Share of each value."""
        return self.shares or (1 / len(self.values),) * len(self.values)


@dataclass(frozen=True)
class World:
    """What the clips of a world are drawn from.

    Attributes:
        name: key of `WORLDS`, and the name of its codec bundle.
        frames: of a clip; syllables: least and most; onsets: its consonants.
        onset_seconds, vowel_seconds: ranges; pause: least pause; evenness: of the pauses, concentration of a Dirichlet.
        attributes: name -> attribute, in the order of drawing.
        novel_pairs: pairs of shirt and wall that are drawn only where asked for.
    """

    name: str
    frames: int
    syllables: tuple[int, int]
    onsets: tuple[str, ...]
    onset_seconds: tuple[float, float]
    vowel_seconds: tuple[float, float]
    pause: float
    evenness: float
    attributes: Mapping[str, Attribute]
    novel_pairs: frozenset[tuple[str, str]] = frozenset()

    @property
    def open(self) -> dict[str, Attribute]:
        """Attributes that some captions do not state."""
        return {name: attribute for name, attribute in self.attributes.items() if attribute.stated < 1}


_LOOKS = {
    "face": Attribute(FACES),
    "hair": Attribute(tuple(HAIR)),
    "shirt": Attribute(tuple(SHIRTS)),
    "wall": Attribute(tuple(WALLS)),
}
NOVEL_PAIRS = frozenset(zip(SHIRTS, tuple(WALLS)[2:] + tuple(WALLS)[:2], strict=True))

WORLDS = {
    "tiny": World(
        "tiny", FORMS["tiny"].frames, (3, 3), ONSETS, (0.07, 0.11), (0.13, 0.19), 0.02, 3.0,
        MappingProxyType({**_LOOKS, "skin": Attribute(tuple(SKINS), stated=0)}),
    ),
    "scene": World(
        "scene", FORMS["scene"].frames, (4, 6), SCENE_ONSETS, (0.06, 0.085), (0.10, 0.135), 0.012, 1.5,
        MappingProxyType(
            {
                **_LOOKS,
                "hair": Attribute(("black", "ginger", "blond")),
                "skin": Attribute(tuple(SKINS), (0.5, 0.3, 0.2), 0),
                "side": Attribute(SIDES, (0.4, 0.35, 0.25), 0.75),
                "size": Attribute(SIZES, (0.6, 0.4), 0.75),
                "camera": Attribute(CAMERAS, (0.6, 0.2, 0.2), 0.75),
                "voice": Attribute(TONES, None, 0.75),
                "sound": Attribute(SOUNDS, (0.5, 0.3, 0.2), 0.75),
                "object": Attribute(OBJECTS, (0.5, 0.3, 0.2), 0),
            }
        ),
        NOVEL_PAIRS,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Syllable:
    """One spoken syllable; times in seconds, pitch in Hz."""

    onset: str
    vowel: str
    start: float
    onset_seconds: float
    vowel_seconds: float
    pitch: float
    glide: float

    @property
    def end(self) -> float:
        return self.start + self.onset_seconds + self.vowel_seconds


@dataclass(frozen=True)
class Puppet:
    """All attributes that determine a clip; the defaults are those of the world `tiny`, which does not draw them."""

    face: str
    hair: str
    shirt: str
    wall: str
    skin: str
    syllables: tuple[Syllable, ...]
    noise_seed: int
    world: str = "tiny"
    side: str = "middle"
    size: str = "full"
    camera: str = "still"
    voice: str = "any"
    sound: str = "quiet"
    object: str = "none"
    stated: frozenset[str] = field(default_factory=lambda: frozenset(_LOOKS))

    @property
    def frames(self) -> int:
        """Frames of the clip."""
        return WORLDS[self.world].frames

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(s.onset + s.vowel for s in self.syllables)

    @property
    def caption(self) -> str:
        said = [f"{self.face} face", f"{self.hair} hair", f"{self.shirt} shirt", f"{self.wall} wall"]
        said.append(f"says {' '.join(self.words)}")
        for name, after in (("side", ""), ("size", ""), ("camera", " camera"), ("voice", " voice"), ("sound", "")):
            if name in self.stated:
                said.append(getattr(self, name) + after)
        return ", ".join(said)


def draw_puppet(seed: int, index: int, world: str = "tiny", like: Puppet | None = None, novel: bool = False) -> Puppet:
    """The puppet of clip `index` of a `seed`; both >= 0.

    Args:
        like: draw another puppet with this one's caption: what it leaves open is drawn anew.
        novel: allow the pairs of shirt and wall that training does not see.
    """
    rules = WORLDS[world]
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))

    def pick(names: tuple[str, ...], shares: tuple[float, ...] | None = None) -> str:
        return names[int(rng.integers(len(names)) if shares is None else rng.choice(len(names), p=shares))]

    least, most = rules.syllables
    count = least if least == most else int(rng.integers(least, most + 1))
    if like is not None:
        count = len(like.syllables)
    onset = rng.uniform(*rules.onset_seconds, count)
    vowel = rng.uniform(*rules.vowel_seconds, count)
    # Pauses before, between and after the syllables; a fixed minimum keeps syllables apart.
    slack = rules.frames / FPS - float(onset.sum() + vowel.sum()) - rules.pause * (count + 1)
    pauses = rules.pause + slack * rng.dirichlet(np.full(count + 1, rules.evenness))
    tone = rng.uniform(105, 210)
    syllables, time = [], 0.0
    for k in range(count):
        time += float(pauses[k])
        syllables.append(
            Syllable(
                onset=pick(rules.onsets),
                vowel=pick(VOWELS),
                start=time,
                onset_seconds=float(onset[k]),
                vowel_seconds=float(vowel[k]),
                pitch=float(rng.uniform(0.92, 1.08)),
                glide=float(rng.uniform(-0.12, 0.12)),
            )
        )
        time = syllables[-1].end
    drawn = {name: pick(one.values, one.shares) for name, one in rules.attributes.items()}
    if not novel and (drawn["shirt"], drawn["wall"]) in rules.novel_pairs:
        walls = rules.attributes["wall"].values
        drawn["wall"] = pick(tuple(wall for wall in walls if (drawn["shirt"], wall) not in rules.novel_pairs))
    noise_seed = int(rng.integers(2**31))
    sure = [one.stated in (0, 1) for one in rules.attributes.values()]
    chances = rng.uniform(size=len(sure)) if not all(sure) else np.zeros(len(sure))
    stated = frozenset(
        name for (name, one), chance in zip(rules.attributes.items(), chances, strict=True) if chance < one.stated
    )
    if like is not None:
        stated = like.stated
        drawn |= {name: getattr(like, name) for name in stated}
        syllables = [replace(s, onset=o.onset, vowel=o.vowel) for s, o in zip(syllables, like.syllables, strict=True)]
    voice = {"low": 105 + 0.3 * (tone - 105), "high": 210 - 0.3 * (210 - tone)}.get(drawn.get("voice", ""), tone)
    spoken = tuple(replace(s, pitch=float(voice * s.pitch)) for s in syllables)
    return Puppet(**drawn, syllables=spoken, noise_seed=noise_seed, world=world, stated=stated)


# ---- Audio ----


def _ramp(time: np.ndarray, start: float, end: float, rise: float, fall: float) -> np.ndarray:
    """0 outside [start, end], 1 inside; raised-cosine edges of `rise` and `fall` seconds within."""
    up = np.clip((time - start) / rise, 0, 1)
    down = np.clip((end - time) / fall, 0, 1)
    return (0.5 - 0.5 * np.cos(np.pi * up)) * (0.5 - 0.5 * np.cos(np.pi * down))


def _voice(time: np.ndarray, pitch: np.ndarray, formants: tuple[float, ...], widths: tuple[float, ...]) -> np.ndarray:
    """A harmonic tone of instantaneous `pitch`, its harmonics weighted by resonances at `formants` (Hz)."""
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    mean = float(pitch.mean())
    wave = np.zeros_like(time)
    for harmonic in range(1, int(4000 / mean)):
        frequency = harmonic * mean
        gain = sum(
            level / (1 + ((frequency - formant) / width) ** 2)
            for formant, width, level in zip(formants, widths, (1.0, 0.6, 0.25), strict=False)
        )
        wave += gain * np.sin(harmonic * phase)
    return wave


NASALS = {"m": (250, 1000, 2200), "n": (250, 1600, 2700)}  # formants in Hz
BURSTS = {"b": (1.0, 1.0, 1.0, 1.0), "d": (1.0, -2.0, 1.0)}  # filters of white noise: below and above about 3 kHz


def synthesise(puppet: Puppet) -> np.ndarray:
    """The puppet's speech with its background sound: fp32 [frames / FPS * SAMPLE_RATE], peak below 1."""
    samples = puppet.frames * SAMPLE_RATE // FPS
    wave = np.zeros(samples)
    rng = np.random.Generator(np.random.PCG64(puppet.noise_seed))
    for s in puppet.syllables:
        first, last = int(s.start * SAMPLE_RATE), min(samples, int(s.end * SAMPLE_RATE) + 1)
        time = np.arange(first, last) / SAMPLE_RATE
        opening = s.start + s.onset_seconds
        pitch = s.pitch * (1 + s.glide * (time - s.start) / (s.end - s.start))
        vowel = _voice(time, pitch, FORMANTS[s.vowel], (70, 110, 160))
        sound = 0.45 * vowel / np.sqrt(np.mean(vowel**2)) * 0.4 * _ramp(time, opening, s.end, 0.02, 0.05)
        if s.onset in NASALS:
            hum = _voice(time, pitch, NASALS[s.onset], (80, 60, 60))
            sound += 0.07 * hum / np.sqrt(np.mean(hum**2)) * _ramp(time, s.start, opening + 0.01, 0.015, 0.015)
        elif s.onset in BURSTS:
            burst = rng.standard_normal(len(time))
            if puppet.world != "tiny":  # b alone is as well heard with white noise
                burst = np.convolve(burst, BURSTS[s.onset], mode="same")
                burst /= burst.std()
            burst = burst * _ramp(time, opening - 0.018, opening + 0.006, 0.003, 0.02)
            prevoice = np.sin(2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE)
            sound += 0.10 * burst + 0.05 * prevoice * _ramp(time, opening - 0.05, opening, 0.01, 0.01)
        else:
            hiss = rng.standard_normal(len(time))
            hiss = np.convolve(hiss, (1, -2.2, 2.2, -1), mode="same")  # high-pass at about 4 kHz
            sound += 0.05 * hiss / hiss.std() * 1.6 * _ramp(time, s.start, opening + 0.01, 0.02, 0.02)
        wave[first:last] += sound
    if puppet.sound == "rain":
        drops = np.convolve(rng.standard_normal(samples), (1, -1), mode="same")
        wave += RAIN * drops / drops.std()
    elif puppet.sound == "engine":
        phase = 2 * np.pi * ENGINE_HERTZ * np.arange(samples) / SAMPLE_RATE + rng.uniform(0, 2 * np.pi)
        throb = sum(np.sin(k * phase) / k for k in range(1, 5))
        wave += ENGINE * throb / np.std(throb)
    return (0.8 * np.tanh(wave / 0.8)).astype(np.float32)


# ---- Frames ----


def mouth_track(puppet: Puppet) -> np.ndarray:
    """Mouth (half width, half height) at the middle of every frame, as shares of the puppet's frame: [F, 2]."""
    time = (np.arange(puppet.frames) + 0.5) / FPS
    width = np.full(puppet.frames, REST_WIDTH)
    height = np.zeros(puppet.frames)
    for s in puppet.syllables:
        opening = s.start + s.onset_seconds
        vowel_width, vowel_height = MOUTHS[s.vowel]
        amount = _ramp(time, opening - 0.01, s.end + 0.005, 0.03, 0.06)
        if s.onset not in BILABIALS:  # lips apart
            ahead = _ramp(time, s.start, opening + 0.01, 0.02, 0.02)
            height += APART * ahead * (1 - amount)
        width += (vowel_width - REST_WIDTH) * amount
        height += vowel_height * amount
    return np.stack([width, height], 1)


def camera_track(camera: str, frames: int) -> np.ndarray:
    """(shift to the right as a share of the scene, enlargement) of the camera at every frame: [F, 2]."""
    share = np.linspace(0, 1, frames)
    if camera == "pan":
        return np.stack([PAN * (2 * share - 1), np.ones(frames)], 1)
    return np.stack([np.zeros(frames), 1 + (ZOOM - 1) * share if camera == "zoom" else np.ones(frames)], 1)


@lru_cache(maxsize=8)
def pixel_grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres x, y as shares of the image: each [size, size]."""
    grid = (np.arange(size) + 0.5) / size
    y, x = np.meshgrid(grid, grid, indexing="ij")
    return x, y


def scene_points(size: int, view: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Place in the scene of every pixel centre for a camera (shift, enlargement): x, y, each [size, size]."""
    shift, zoom = view
    x, y = pixel_grid(size)
    return 0.5 + (x - 0.5) / zoom + shift, 0.5 + (y - 0.5) / zoom


def wall_shading(y: np.ndarray) -> np.ndarray:
    """Brightness factor of the wall at heights y (0 top, 1 bottom of the scene); lower parts are darker."""
    return 1.03 - 0.08 * y


def puppet_points(side: str, size: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the scene in the frame of a puppet that fills it."""
    scale = SCALES[size]
    return 0.5 + (x - CENTRES[side]) / scale, 1 - (1 - y) / scale


def _cover(distance: np.ndarray, pixel: float) -> np.ndarray:
    """Signed distance (negative inside) to coverage in [0,1], one pixel of anti-aliasing."""
    return np.clip(0.5 - distance / pixel, 0, 1)


def _ellipse(x: np.ndarray, y: np.ndarray, rx: float, ry: float) -> np.ndarray:
    k = np.sqrt((x / rx) ** 2 + (y / ry) ** 2)
    slope = np.sqrt((x / rx**2) ** 2 + (y / ry**2) ** 2)
    return k * (k - 1) / np.maximum(slope, 1e-6)


def _box(x: np.ndarray, y: np.ndarray, rx: float, ry: float, corner: float) -> np.ndarray:
    dx, dy = np.abs(x) - rx + corner, np.abs(y) - ry + corner
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - corner


def _head(face: str, x: np.ndarray, y: np.ndarray, grow: float = 0.0) -> np.ndarray:
    if face == "round":
        return _ellipse(x, y, 0.285 + grow, 0.285 + grow)
    if face == "square":
        return _box(x, y, 0.255 + grow, 0.285 + grow, 0.07)
    return _ellipse(x, y, 0.205 + grow, 0.335 + grow)


@lru_cache(maxsize=64)
def layers(
    face: str, side: str, size: str, thing: str, pixels: int, view: tuple[float, float]
) -> tuple[tuple[str, np.ndarray], ...]:
    """Layers of the picture from back to front, without the wall: (name of the colour, coverage [pixels, pixels] in [0,1]).

    Args:
        thing: background object, a member of `OBJECTS`.
        view: (shift, enlargement) of the camera, see `camera_track`.
    """
    sx, sy = scene_points(pixels, view)
    x, y = puppet_points(side, size, sx, sy)
    behind = 1 / (pixels * view[1])
    pixel = behind / SCALES[size]
    cx, cy = x - 0.5, y - 0.5
    painted = []
    ox, oy = sx - OBJECT_SIDE[side], sy - OBJECT_HEIGHT
    if thing == "clock":
        painted += [
            ("rim", _cover(_ellipse(ox, oy, 0.085, 0.085), behind)),
            ("dial", _cover(_ellipse(ox, oy, 0.06, 0.06), behind)),
        ]
    elif thing == "picture":
        painted += [
            ("frame", _cover(_box(ox, oy, 0.08, 0.1, 0.01), behind)),
            ("canvas", _cover(_box(ox, oy, 0.05, 0.07, 0.005), behind)),
        ]
    fringe = np.maximum(_head(face, cx, cy, 0.035), y - 0.33 - 0.35 * cx**2)
    painted += [
        ("shirt", _cover(_box(cx, y - 1.05, 0.40, 0.24, 0.15), pixel)),
        ("neck", _cover(_box(cx, y - 0.78, 0.075, 0.09, 0.03), pixel)),
        ("hair", _cover(np.maximum(_head(face, cx, cy, 0.035), y - 0.52), pixel)),
        ("skin", _cover(_head(face, cx, cy), pixel)),
        ("hair", _cover(fringe, pixel)),
    ]  # fmt: skip
    for aside in (-0.095, 0.095):
        painted.append(("white", _cover(_ellipse(cx - aside, y - 0.44, 0.047, 0.038), pixel)))
        painted.append(("pupil", _cover(_ellipse(cx - aside, y - 0.443, 0.022, 0.024), pixel)))
    return tuple(painted)


OBJECT_COLOURS = {"rim": (60, 60, 70), "dial": (250, 250, 245), "frame": (110, 70, 40), "canvas": (70, 120, 130)}
EYE_COLOURS = {"white": (255, 255, 255), "pupil": (30, 30, 40)}


def colours(puppet: Puppet) -> dict[str, np.ndarray]:
    """Colours of `layers`: name -> fp64 [3] in 0..255."""
    skin = np.array(SKINS[puppet.skin], float)
    own = {"shirt": SHIRTS[puppet.shirt], "hair": HAIR[puppet.hair], "skin": skin, "neck": 0.86 * skin}
    return {name: np.array(value, float) for name, value in (own | EYE_COLOURS | OBJECT_COLOURS).items()}


def portrait(puppet: Puppet, size: int, view: tuple[float, float] = (0.0, 1.0)) -> np.ndarray:
    """The static part of a clip, as the camera sees it: fp64 [size,size,3] in 0..255."""
    _, y = scene_points(size, view)
    image = np.array(WALLS[puppet.wall], float) * wall_shading(y)[..., None]
    palette = colours(puppet)
    for name, mask in layers(puppet.face, puppet.side, puppet.size, puppet.object, size, view):
        image = image * (1 - mask[..., None]) + palette[name] * mask[..., None]
    return image


def _paint_mouth(frame: np.ndarray, puppet: Puppet, view: tuple[float, float], width: float, height: float) -> None:
    """Draw lips and the mouth's inside into a frame fp64 [size,size,3], in the window around the mouth."""
    size, (shift, zoom), scale = len(frame), view, SCALES[puppet.size]
    centre_x = CENTRES[puppet.side] + (MOUTH_CENTRE[0] - 0.5) * scale
    centre_y = 1 - (1 - MOUTH_CENTRE[1]) * scale
    seen = (0.5 + (centre_x - shift - 0.5) * zoom, 0.5 + (centre_y - 0.5) * zoom)
    half = 0.22 * scale * zoom
    low = [max(0, int((c - half) * size)) for c in seen]
    high = [min(size, int(np.ceil((c + half) * size))) for c in seen]
    gx = ((np.arange(low[0], high[0]) + 0.5) / size - seen[0]) / (scale * zoom)
    gy = ((np.arange(low[1], high[1]) + 0.5) / size - seen[1]) / (scale * zoom)
    y, x = np.meshgrid(gy, gx, indexing="ij")
    pixel = 1 / (size * scale * zoom)
    lips = _cover(_ellipse(x, y, width + LIPS[0], height + LIPS[1]), pixel)[..., None]
    inside = _cover(_ellipse(x, y, width, max(height, 0.002)), pixel)[..., None] * np.clip(height / 0.012, 0, 1)
    window = frame[low[1] : high[1], low[0] : high[0]]
    window[:] = window * (1 - lips) + np.array(LIP, float) * lips
    window[:] = window * (1 - inside) + np.array(MOUTH_INSIDE, float) * inside


def render(puppet: Puppet, size: int = 64, mouth: np.ndarray | None = None) -> np.ndarray:
    """The puppet's frames: uint8 [F,size,size,3].

    Args:
        mouth: another mouth track than the puppet's own, see `mouth_track`.
    """
    views = [tuple(map(float, row)) for row in camera_track(puppet.camera, puppet.frames)]
    stills = {view: portrait(puppet, size, view) for view in dict.fromkeys(views)}  # type: ignore[arg-type]
    frames = np.stack([stills[view] for view in views])
    for frame, view, (width, height) in zip(
        frames, views, mouth_track(puppet) if mouth is None else mouth, strict=True
    ):
        _paint_mouth(frame, puppet, view, float(width), float(height))  # type: ignore[arg-type]
    return np.clip(frames + 0.5, 0, 255).astype(np.uint8)


def parse_caption(caption: str) -> tuple[str, tuple[str, ...], dict[str, str]]:
    """World, syllables and stated attributes of a puppet's caption: ("scene", ("ma", "do"), {"face": "round", ...}).

    Raises:
        ValueError: the sentence has the form of no world.
    """
    world, stated = read_caption(caption)
    return world, tuple(stated.pop("words").split()), stated
