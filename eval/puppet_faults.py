"""Faults of puppets' clips: wrong syllables, lips of another shape, missing eyes, another mouth.

    frames, wave = PUPPET_FAULTS["eyes"].plant(puppet, other, 0.5, np.random.default_rng(0))

A puppet is drawn and spoken anew with the fault; `other` is a puppet that lends its mouth or its voice. Faults of any clip
(`eval.faults`) are planted into the drawn puppet. A mirrored puppet is no fault: it is drawn symmetric.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from data.tiny.puppets import (
    FACES,
    FPS,
    HAIR,
    MOUTHS,
    ONSETS,
    SAMPLE_RATE,
    SHIRTS,
    SKINS,
    VOWELS,
    WALLS,
    Puppet,
    mouth_track,
    render,
    synthesise,
)
from eval.faults import FAULTS, Applied, Fault
from eval.puppet_scores import BILABIALS
from eval.puppet_vision import eye_regions

Plant = Callable[[Puppet, Puppet, float, np.random.Generator], Applied]
"""(puppet, another one, strength, rng) -> frames uint8 [F,H,W,3] at 25 fps, wave fp32 [N] at 16 kHz."""

LOOKS = {"face": FACES, "hair": tuple(HAIR), "shirt": tuple(SHIRTS), "wall": tuple(WALLS)}


@dataclass(frozen=True)
class PuppetFault:
    """A fault with its strengths, and how it is planted into a puppet."""

    fault: Fault
    plant: Plant


def drawn(puppet: Puppet) -> Applied:
    """Frames and wave without a fault."""
    return render(puppet), synthesise(puppet)


def _common(fault: Fault) -> PuppetFault:
    """A fault of any clip, planted into the drawn puppet."""
    apply = fault.apply
    assert apply is not None

    def plant(puppet: Puppet, other: Puppet, strength: float, rng: np.random.Generator) -> Applied:
        frames, wave = drawn(puppet)
        return apply(frames, FPS, wave, SAMPLE_RATE, strength, rng)

    return PuppetFault(fault, plant)


def _another(names: tuple[str, ...], than: str, rng: np.random.Generator) -> str:
    return str(rng.choice([name for name in names if name != than]))


def _respoken(puppet: Puppet, other: Puppet, strength: float, rng: np.random.Generator, part: str) -> Applied:
    """The first `strength` syllables are spoken with another onset or vowel; the frames stay."""
    names = ONSETS if part == "onset" else VOWELS
    wrong = [
        replace(s, **{part: _another(names, getattr(s, part), rng)})  # type: ignore[arg-type]
        for s in puppet.syllables[: int(strength)]
    ]
    spoken = replace(puppet, syllables=(*wrong, *puppet.syllables[int(strength) :]))
    return render(puppet), synthesise(spoken)


def _rounded(puppet: Puppet, other: Puppet, strength: float, rng: np.random.Generator) -> Applied:
    """The open mouth nearer to a circle of its area: width and height keep their product."""
    width, height = mouth_track(puppet).T
    seen = np.maximum(height, 0.002)  # as it is drawn
    factor = np.where(height > 0.01, (seen / width) ** (strength / 2), 1)
    return render(puppet, mouth=np.stack([width * factor, height / factor], 1)), synthesise(puppet)


def _open_lips(puppet: Puppet, other: Puppet, strength: float, rng: np.random.Generator) -> Applied:
    """The mouth opens with m and b already, as wide as a share of the vowel."""
    mouth, time = mouth_track(puppet), (np.arange(puppet.frames) + 0.5) / FPS
    for syllable in puppet.syllables:
        if syllable.onset in BILABIALS:
            width, height = MOUTHS[syllable.vowel]
            within = (time >= syllable.start - 0.02) & (time <= syllable.start + syllable.onset_seconds + 0.02)
            mouth[within, 0] = width
            mouth[within, 1] = np.maximum(mouth[within, 1], strength * height)
    return render(puppet, mouth=mouth), synthesise(puppet)


def _without_eyes(puppet: Puppet, other: Puppet, strength: float, rng: np.random.Generator) -> Applied:
    """Skin over both eyes, with this opacity."""
    frames, wave = drawn(puppet)
    over = eye_regions(frames.shape[1]).any(0)
    painted = (1 - strength) * frames[:, over] + strength * np.array(SKINS[puppet.skin], float)
    frames[:, over] = np.rint(painted).astype(np.uint8)
    return frames, wave


def _other_looks(puppet: Puppet, other: Puppet, strength: float, rng: np.random.Generator) -> Applied:
    """So many of face, hair, shirt and wall are others than in the caption."""
    wrong = rng.permutation(list(LOOKS))[: int(strength)]
    changed = {name: _another(LOOKS[name], getattr(puppet, name), rng) for name in wrong}
    return render(replace(puppet, **changed)), synthesise(puppet)  # type: ignore[arg-type]


_OWN = (
    PuppetFault(
        Fault("consonants", "wrong consonants", "of 3 syllables", (1, 2, 3), None, "audio"),
        partial(_respoken, part="onset"),
    ),
    PuppetFault(
        Fault("vowels", "wrong vowels", "of 3 syllables", (1, 2, 3), None, "audio"), partial(_respoken, part="vowel")
    ),
    PuppetFault(
        Fault(
            "lip_shape",
            "wrong lip shapes of equal area",
            "share of the way to a circle",
            (0.25, 0.5, 1),
            None,
            "frames",
        ),
        _rounded,
    ),
    PuppetFault(
        Fault("open_lips", "lips open at m and b", "share of the vowel's opening", (0.25, 0.5, 1), None, "frames"),
        _open_lips,
    ),
    PuppetFault(
        Fault("eyes", "missing eyes", "opacity of skin over them", (0.25, 0.5, 1), None, "frames"), _without_eyes
    ),
    PuppetFault(Fault("looks", "other looks than prompted", "of 4", (1, 2, 4), None, "frames"), _other_looks),
    PuppetFault(
        Fault("other_mouth", "another puppet's mouth", "", (1,), None, "frames"),
        lambda puppet, other, strength, rng: (render(puppet, mouth=mouth_track(other)), synthesise(puppet)),
    ),
    PuppetFault(
        Fault("other_voice", "another puppet's voice", "", (1,), None, "audio"),
        lambda puppet, other, strength, rng: (render(puppet), synthesise(other)),
    ),
)
# Of eval.faults those that a second of a cartoon can show.
_COMMON = (
    "mirror", "hiss", "hum", "delay", "freeze", "judder", "slow", "desaturate", "overexpose", "blur", "pixel_noise",
    "flicker", "volume", "clip_audio", "mute", "muffle", "pitch",
)  # fmt: skip
PUPPET_FAULTS = {found.fault.name: found for found in (*_OWN, *(_common(FAULTS[name]) for name in _COMMON))}
