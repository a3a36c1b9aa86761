"""Contact sheets: an image with one row of thumbnails per clip and its caption."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_MARGIN = 6
_LINE = 14  # pixels per line of text


def draw_contact_sheet(
    clips: Sequence[Any],
    captions: Sequence[str],
    *,
    frames_per_clip: int = 6,
    columns: int = 1,
    height: int = 96,
    title: str = "",
) -> Any:
    """PIL image with a row of frames per clip and the caption below it.

        draw_contact_sheet([frames], ["a face"]).save("sheet.png")

    Args:
        clips: uint8 [F,H,W,3] each (array or tensor); of any sizes.
        captions: one per clip; long ones are cut to the row's width.
        frames_per_clip: frames shown, evenly spaced from the first to the last.
        columns: clips per row of the image.
        height: of a frame in pixels; the width follows from the aspect ratio.

    Raises:
        ValueError: no clips, or another number of captions.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not clips or len(clips) != len(captions):
        raise ValueError(f"need as many captions as clips and at least one, got {len(captions)} and {len(clips)}")
    font = ImageFont.load_default(11)
    rows = [_strip(np.asarray(clip), frames_per_clip, height) for clip in clips]
    cell_width = max(row.width for row in rows)
    cell_height = height + _LINE + _MARGIN
    top = _LINE + 2 * _MARGIN if title else _MARGIN
    lines = -(-len(rows) // columns)
    sheet = Image.new(
        "RGB", (columns * (cell_width + _MARGIN) + _MARGIN, top + lines * (cell_height + _MARGIN)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_MARGIN, _MARGIN), title, fill="black", font=font)
    for number, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        left = _MARGIN + number % columns * (cell_width + _MARGIN)
        upper = top + number // columns * (cell_height + _MARGIN)
        sheet.paste(row, (left, upper))
        draw.text((left, upper + height + 1), _fitting(caption, cell_width, font), fill=(60, 60, 60), font=font)
    return sheet


def _strip(clip: np.ndarray, count: int, height: int) -> Any:
    """Evenly spaced frames of a clip side by side."""
    from PIL import Image

    chosen = np.unique(np.linspace(0, len(clip) - 1, count).round().astype(int))
    width = max(1, round(height * clip.shape[2] / clip.shape[1]))
    strip = Image.new("RGB", (count * (width + 2) - 2, height), "white")
    # Small frames are enlarged without smoothing, to show their pixels.
    method = Image.Resampling.NEAREST if clip.shape[1] < height else Image.Resampling.BICUBIC
    for position, frame in enumerate(chosen):
        strip.paste(Image.fromarray(clip[frame]).resize((width, height), method), (position * (width + 2), 0))
    return strip


def _fitting(text: str, width: int, font: Any) -> str:
    """`text`, cut with an ellipsis to `width` pixels; what the font cannot show becomes "?"."""
    shown = "".join(c if c.isprintable() and ord(c) < 0x2000 else "?" for c in text)
    if font.getlength(shown) <= width:
        return shown
    while shown and font.getlength(shown + "...") > width:
        shown = shown[:-1]
    return shown + "..."
