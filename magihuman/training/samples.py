"""Contact sheets: clips as rows of small frames with their prompts."""

from collections.abc import Sequence
from typing import Any

import torch

COLUMNS = 8
MARGIN = 14


def contact_sheet(clips: Sequence[torch.Tensor], titles: Sequence[str], columns: int = COLUMNS) -> Any:
    """A picture with one clip per row.

    Args:
        clips: uint8 [F,H,W,3] each, all of one height and width.
        titles: written above the rows.
        columns: frames shown per clip, evenly spaced over it.

    Returns:
        A PIL image.
    """
    from PIL import Image, ImageDraw

    height, width = clips[0].shape[1:3]
    sheet = Image.new("RGB", (columns * width, len(clips) * (height + MARGIN)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (clip, title) in enumerate(zip(clips, titles, strict=True)):
        top = row * (height + MARGIN)
        pen.text((2, top + 1), title, fill="black")
        shown = torch.linspace(0, len(clip) - 1, columns).round().long()
        for column, frame in enumerate(clip[shown]):
            sheet.paste(Image.fromarray(frame.numpy()), (column * width, top + MARGIN))
    return sheet
