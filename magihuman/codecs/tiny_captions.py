"""Words of the puppets' captions with the colours that they name, and the forms of captions.

Puppets (`data.tiny.puppets`) are rendered from these tables, and prompts of tiny models are checked against the form of
their world: `tiny`, puppets in the middle that say three syllables in a second, or `scene`, where the prompt also decides
place, size, camera, voice and background sound, and leaves some of them open.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

FACES = ("round", "square", "long")
HAIR = {
    "black": (35, 30, 40),
    "brown": (120, 72, 40),
    "ginger": (225, 105, 30),
    "blond": (245, 215, 110),
    "grey": (165, 165, 175),
}
SHIRTS = {
    "red": (205, 45, 50),
    "blue": (45, 85, 200),
    "green": (45, 150, 75),
    "yellow": (240, 200, 50),
    "purple": (135, 60, 165),
    "white": (240, 240, 240),
}
WALLS = {
    "blue": (150, 190, 235),
    "green": (165, 220, 170),
    "pink": (245, 180, 200),
    "yellow": (250, 235, 165),
    "orange": (245, 175, 110),
    "grey": (175, 180, 185),
}
SIDES = ("left", "middle", "right")
SIZES = ("near", "far")
CAMERAS = ("still", "pan", "zoom")
TONES = ("low", "high")
SOUNDS = ("quiet", "rain", "engine")
ONSETS = ("b", "m", "s")
SCENE_ONSETS = ("b", "d", "m", "n", "s")
VOWELS = ("a", "e", "i", "o", "u")


@dataclass(frozen=True)
class CaptionForm:
    """Form of the captions of one world.

    Attributes:
        example: a caption; pattern: regular expression with a named group per attribute that matches whole captions. The
            number of syllables tells the worlds apart: up to 3 in `tiny`, 4 to 6 in `scene`.
        frames: of a clip of this world; audio_floor: magnitudes that its audio codec takes for silence. The world `scene` has
            background sounds, which are quiet.
    """

    example: str
    pattern: str
    frames: int
    audio_floor: float


def _one_of(name: str, values: Iterable[str]) -> str:
    return f"(?P<{name}>{'|'.join(values)})"


_LOOKS = (
    f"{_one_of('face', FACES)} face, {_one_of('hair', HAIR)} hair, {_one_of('shirt', SHIRTS)} shirt, "
    f"{_one_of('wall', WALLS)} wall"
)
_PLACE = (
    f"(, {_one_of('side', SIDES)})?(, {_one_of('size', SIZES)})?(, {_one_of('camera', CAMERAS)} camera)?"
    f"(, {_one_of('voice', TONES)} voice)?(, {_one_of('sound', SOUNDS)})?"
)
_ORDER = (
    ".* face", ".* hair", ".* shirt", ".* wall", "says .*", "|".join(SIDES), "|".join(SIZES), ".* camera", ".* voice",
    "|".join(SOUNDS),
)  # fmt: skip
"""Parts of a caption in their order."""

FORMS = {
    "tiny": CaptionForm(
        "round face, ginger hair, blue shirt, green wall, says ma bi so",
        f"{_LOOKS}, says(?P<words>( [{''.join(ONSETS)}][{''.join(VOWELS)}]){{1,3}})",
        25,
        0.2,
    ),
    "scene": CaptionForm(
        "round face, ginger hair, blue shirt, green wall, says ma bi do ne, left, near, pan camera, low voice, rain",
        f"{_LOOKS}, says(?P<words>( [{''.join(SCENE_ONSETS)}][{''.join(VOWELS)}]){{4,6}}){_PLACE}",
        37,
        0.1,
    ),
}


def read_caption(caption: str) -> tuple[str, dict[str, str]]:
    """The world of a caption, and what it states: attribute -> value, and `words` (the syllables, with spaces).

    Raises:
        ValueError: the sentence has the form of no world.
    """
    for world, form in FORMS.items():
        if found := re.fullmatch(form.pattern, " ".join(caption.split())):
            return world, {name: value.strip() for name, value in found.groupdict().items() if value is not None}
    if fault := order_fault(caption, *FORMS):
        raise ValueError(f"not a puppet's caption: {caption!r}; {fault}")
    expected = " or ".join(f"{form.example!r} (world {world})" for world, form in FORMS.items())
    raise ValueError(f"not a puppet's caption: {caption!r}; expected words in the order of {expected}")


def order_fault(caption: str, *worlds: str) -> str | None:
    """Message naming the first misplaced part of a caption and the right order; None if no reordering gives a valid caption."""
    parts = [" ".join(part.split()) for part in caption.split(",")]
    right = sorted(parts, key=lambda part: next((i for i, form in enumerate(_ORDER) if re.fullmatch(form, part)), -1))
    forms = [FORMS[world].pattern for world in worlds if world in FORMS]
    if parts == right or not any(re.fullmatch(form, ", ".join(right)) for form in forms):
        return None
    first = next(part for part, other in zip(parts, right, strict=True) if part != other)
    return f"{first!r} is out of place, the right order is {', '.join(right)!r}"


def of_another_form(captions: Iterable[str], codecs: str) -> list[str]:
    """Those of the captions, empty ones left out, that have not the form of the world that `codecs` are of; codecs of no world
    have no form."""
    if codecs not in FORMS:
        return []
    return [text for text in captions if text and not re.fullmatch(FORMS[codecs].pattern, " ".join(text.split()))]
