"""Words of the tiny world's captions with the colours that they name, and the form of a caption.

Puppets (`data.tiny.puppets`) are rendered from these tables, and prompts of tiny models are checked against `CAPTION`.
"""

EXAMPLE = "round face, ginger hair, blue shirt, green wall, says ma bi so"

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
ONSETS = ("b", "m", "s")
VOWELS = ("a", "e", "i", "o", "u")

CAPTION = (
    f"({'|'.join(FACES)}) face, ({'|'.join(HAIR)}) hair, ({'|'.join(SHIRTS)}) shirt, ({'|'.join(WALLS)}) wall, "
    f"says( [{''.join(ONSETS)}][{''.join(VOWELS)}])+"
)
"""Regular expression that matches whole captions."""
