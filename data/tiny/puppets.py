"""Puppets, the clips of the tiny world: synthetic cartoon faces that speak syllables.

A puppet is rendered from signed distances (any size, anti-aliased) and speaks by formant synthesis; one articulation
drives mouth and audio. Everything is a pure function of (seed, index), so any clip can be made again. After the mp4
files are written, they are treated like real videos.

    python -m data.tiny output=clips clips=200

The caption states face shape, hair, shirt, wall and syllables. It does not state skin tone, pitch and timing (skin tone
measures the diversity of a model's samples).
"""

from dataclasses import dataclass

import numpy as np

from magihuman.codecs.tiny_captions import EXAMPLE, FACES, HAIR, ONSETS, SHIRTS, VOWELS, WALLS

FPS = 25
FRAMES = 25
SAMPLE_RATE = 16000
SYLLABLES = 3

SKINS = {"light": (250, 215, 190), "tan": (215, 160, 115), "dark": (135, 88, 62)}

# First three formants in Hz, and the mouth (half width, half height) as shares of the frame.
FORMANTS = {
    "a": (820, 1250, 2600),
    "e": (480, 1950, 2600),
    "i": (280, 2450, 3100),
    "o": (500, 850, 2450),
    "u": (310, 700, 2300),
}
MOUTHS = {"a": (0.125, 0.115), "e": (0.145, 0.080), "i": (0.150, 0.052), "o": (0.085, 0.100), "u": (0.060, 0.065)}
REST_WIDTH = 0.105
LIP = (185, 50, 65)
LIPS = (0.022, 0.024)  # breadth of the lips beside and above the mouth's inside
MOUTH_INSIDE = (70, 8, 28)
MOUTH_CENTRE = (0.5, 0.63)


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
    """All attributes that determine a clip."""

    face: str
    hair: str
    shirt: str
    wall: str
    skin: str
    syllables: tuple[Syllable, ...]
    noise_seed: int

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(s.onset + s.vowel for s in self.syllables)

    @property
    def caption(self) -> str:
        appearance = f"{self.face} face, {self.hair} hair, {self.shirt} shirt, {self.wall} wall"
        return f"{appearance}, says {' '.join(self.words)}"


def draw_puppet(seed: int, index: int) -> Puppet:
    """The puppet of clip `index` of a `seed`; both >= 0."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))

    def pick(names: tuple[str, ...]) -> str:
        return names[int(rng.integers(len(names)))]

    seconds = FRAMES / FPS
    onset = rng.uniform(0.07, 0.11, SYLLABLES)
    vowel = rng.uniform(0.13, 0.19, SYLLABLES)
    # Pauses before, between and after the syllables; a fixed minimum keeps syllables apart.
    slack = seconds - float(onset.sum() + vowel.sum()) - 0.02 * (SYLLABLES + 1)
    pauses = 0.02 + slack * rng.dirichlet(np.full(SYLLABLES + 1, 3.0))
    voice = rng.uniform(105, 210)
    syllables, time = [], 0.0
    for k in range(SYLLABLES):
        time += float(pauses[k])
        syllables.append(
            Syllable(
                onset=pick(ONSETS),
                vowel=pick(VOWELS),
                start=time,
                onset_seconds=float(onset[k]),
                vowel_seconds=float(vowel[k]),
                pitch=float(voice * rng.uniform(0.92, 1.08)),
                glide=float(rng.uniform(-0.12, 0.12)),
            )
        )
        time = syllables[-1].end
    return Puppet(
        face=pick(FACES),
        hair=pick(tuple(HAIR)),
        shirt=pick(tuple(SHIRTS)),
        wall=pick(tuple(WALLS)),
        skin=pick(tuple(SKINS)),
        syllables=tuple(syllables),
        noise_seed=int(rng.integers(2**31)),
    )


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


def synthesise(puppet: Puppet) -> np.ndarray:
    """The puppet's speech: fp32 [FRAMES / FPS * SAMPLE_RATE], peak below 1."""
    samples = FRAMES * SAMPLE_RATE // FPS
    wave = np.zeros(samples)
    rng = np.random.Generator(np.random.PCG64(puppet.noise_seed))
    for s in puppet.syllables:
        first, last = int(s.start * SAMPLE_RATE), min(samples, int(s.end * SAMPLE_RATE) + 1)
        time = np.arange(first, last) / SAMPLE_RATE
        opening = s.start + s.onset_seconds
        pitch = s.pitch * (1 + s.glide * (time - s.start) / (s.end - s.start))
        vowel = _voice(time, pitch, FORMANTS[s.vowel], (70, 110, 160))
        sound = 0.45 * vowel / np.sqrt(np.mean(vowel**2)) * 0.4 * _ramp(time, opening, s.end, 0.02, 0.05)
        if s.onset == "m":
            hum = _voice(time, pitch, (250, 1000, 2200), (80, 60, 60))
            sound += 0.07 * hum / np.sqrt(np.mean(hum**2)) * _ramp(time, s.start, opening + 0.01, 0.015, 0.015)
        elif s.onset == "b":
            burst = rng.standard_normal(len(time)) * _ramp(time, opening - 0.018, opening + 0.006, 0.003, 0.02)
            prevoice = np.sin(2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE)
            sound += 0.10 * burst + 0.05 * prevoice * _ramp(time, opening - 0.05, opening, 0.01, 0.01)
        else:
            hiss = rng.standard_normal(len(time))
            hiss = np.convolve(hiss, (1, -2.2, 2.2, -1), mode="same")  # high-pass at about 4 kHz
            sound += 0.05 * hiss / hiss.std() * 1.6 * _ramp(time, s.start, opening + 0.01, 0.02, 0.02)
        wave[first:last] += sound
    return (0.8 * np.tanh(wave / 0.8)).astype(np.float32)


# ---- Frames ----


def mouth_track(puppet: Puppet) -> np.ndarray:
    """Mouth (half width, half height) at the middle of every frame, as shares of the frame: [FRAMES, 2]."""
    time = (np.arange(FRAMES) + 0.5) / FPS
    width = np.full(FRAMES, REST_WIDTH)
    height = np.zeros(FRAMES)
    for s in puppet.syllables:
        opening = s.start + s.onset_seconds
        vowel_width, vowel_height = MOUTHS[s.vowel]
        amount = _ramp(time, opening - 0.01, s.end + 0.005, 0.03, 0.06)
        if s.onset == "s":  # teeth nearly closed, lips apart
            hiss = _ramp(time, s.start, opening + 0.01, 0.02, 0.02)
            height += 0.018 * hiss * (1 - amount)
        width += (vowel_width - REST_WIDTH) * amount
        height += vowel_height * amount
    return np.stack([width, height], 1)


def _cover(distance: np.ndarray, pixel: float) -> np.ndarray:
    """Signed distance (negative inside) to coverage in [0,1], one pixel of anti-aliasing."""
    return np.clip(0.5 - distance / pixel, 0, 1)[..., None]


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


def portrait(puppet: Puppet, size: int) -> np.ndarray:
    """The static part of a clip: fp64 [size,size,3] in 0..255."""
    pixel = 1 / size
    grid = (np.arange(size) + 0.5) / size
    y, x = np.meshgrid(grid, grid, indexing="ij")
    skin = np.array(SKINS[puppet.skin], float)
    hair = np.array(HAIR[puppet.hair], float)
    image = np.array(WALLS[puppet.wall], float) * (1.03 - 0.08 * y[..., None])

    def paint(mask: np.ndarray, colour: np.ndarray | tuple[int, int, int]) -> None:
        nonlocal image
        image = image * (1 - mask) + np.asarray(colour, float) * mask

    cx, cy = x - 0.5, y - 0.5
    paint(_cover(_box(cx, y - 1.05, 0.40, 0.24, 0.15), pixel), SHIRTS[puppet.shirt])
    paint(_cover(_box(cx, y - 0.78, 0.075, 0.09, 0.03), pixel), skin * 0.86)
    paint(_cover(np.maximum(_head(puppet.face, cx, cy, 0.035), y - 0.52), pixel), hair)
    paint(_cover(_head(puppet.face, cx, cy), pixel), skin)
    fringe = np.maximum(_head(puppet.face, cx, cy, 0.035), y - 0.33 - 0.35 * cx**2)
    paint(_cover(fringe, pixel), hair)
    for side in (-0.095, 0.095):
        paint(_cover(_ellipse(cx - side, y - 0.44, 0.047, 0.038), pixel), (255, 255, 255))
        paint(_cover(_ellipse(cx - side, y - 0.443, 0.022, 0.024), pixel), (30, 30, 40))
    return image


def render(puppet: Puppet, size: int = 64, mouth: np.ndarray | None = None) -> np.ndarray:
    """The puppet's frames: uint8 [FRAMES,size,size,3].

    Args:
        mouth: another mouth track than the puppet's own, see `mouth_track`.
    """
    pixel = 1 / size
    still = portrait(puppet, size)
    half = 0.22  # only this window around the mouth is drawn per frame
    low = [int((c - half) * size) for c in MOUTH_CENTRE]
    high = [int(np.ceil((c + half) * size)) for c in MOUTH_CENTRE]
    gx = (np.arange(low[0], high[0]) + 0.5) / size - MOUTH_CENTRE[0]
    gy = (np.arange(low[1], high[1]) + 0.5) / size - MOUTH_CENTRE[1]
    y, x = np.meshgrid(gy, gx, indexing="ij")
    frames = np.repeat(still[None], FRAMES, 0)
    for frame, (width, height) in zip(frames, mouth_track(puppet) if mouth is None else mouth, strict=True):
        window = frame[low[1] : high[1], low[0] : high[0]]
        lips = _cover(_ellipse(x, y, width + LIPS[0], height + LIPS[1]), pixel)
        inside = _cover(_ellipse(x, y, width, max(height, 0.002)), pixel) * np.clip(height / 0.012, 0, 1)
        window[:] = window * (1 - lips) + np.array(LIP, float) * lips
        window[:] = window * (1 - inside) + np.array(MOUTH_INSIDE, float) * inside
    return np.clip(frames + 0.5, 0, 255).astype(np.uint8)


def parse_caption(caption: str) -> dict[str, str | tuple[str, ...]]:
    """The attributes that a tiny-world caption states: face, hair, shirt, wall, and `words` (the syllables).

    Raises:
        ValueError: the sentence does not have the tiny world's form.
    """
    try:
        face, hair, shirt, wall, says = (part.split() for part in caption.split(","))
        kinds = (face[1], hair[1], shirt[1], wall[1], says[0])
        if kinds != ("face", "hair", "shirt", "wall", "says"):
            raise ValueError
        return {"face": face[0], "hair": hair[0], "shirt": shirt[0], "wall": wall[0], "words": tuple(says[1:])}
    except (ValueError, IndexError):
        raise ValueError(f"not a tiny-world caption: {caption!r}; expected the form {EXAMPLE!r}") from None
