"""Decoding a picture in overlapping tiles, for cards that cannot hold the whole one.

All tiles walk through the clip together, one chunk at a time, so that memory does not grow with its length.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from magihuman.errors import UserError

Streamer = Callable[[Tensor], Iterator[Tensor]]
"""Latents [B,C,T,h,w] -> frames [B,3,n,H,W] fp32, part by part."""

OVERLAP = 4  # a tile shares one part in so many with its neighbour
SMALLEST = 8  # latents a side


@dataclass(frozen=True)
class Span:
    """Latents [start, stop) of one axis, and what their pixels count for: [pixels] fp32, the spans' sum is 1."""

    start: int
    stop: int
    weight: Tensor


def spans(length: int, tile: int, overlap: int, stride: int) -> list[Span]:
    """The fewest equal spans of at most `tile` latents that cover `length`, neighbours sharing at least `overlap`.

    Towards a border inside the picture a span's weight falls linearly over the middle half of the overlap and is 0 in
    the outer quarter: there the zeros beyond the border, which the whole picture does not have, weigh the most.

    Args:
        stride: pixels per latent.

    Raises:
        ValueError: tile <= overlap.
    """
    if tile >= length:
        return [Span(0, length, torch.ones(length * stride))]
    if not 0 <= overlap < tile:
        raise ValueError(f"an overlap of {overlap} latents does not fit into tiles of {tile}")
    count = -(-(length - overlap) // (tile - overlap))
    # As many smaller ones, so that none overlaps more than needed.
    tile = -(-(length + (count - 1) * overlap) // count)
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    pixels = torch.arange(tile * stride) + 0.5
    margin, ramp = overlap * stride / 4, max(overlap * stride / 2, 1)
    rising = ((pixels - margin) / ramp).clamp(0, 1)
    weights = []
    for start in starts:
        weight = torch.ones(tile * stride)
        if start > 0:
            weight = torch.minimum(weight, rising)
        if start + tile < length:
            weight = torch.minimum(weight, rising.flip(0))
        weights.append(weight)
    total = torch.zeros(length * stride)
    for start, weight in zip(starts, weights, strict=True):
        total[start * stride : (start + tile) * stride] += weight
    return [
        Span(start, start + tile, weight / total[start * stride : (start + tile) * stride])
        for start, weight in zip(starts, weights, strict=True)
    ]


def latents_per_tile(tile: int | None, stride: tuple[int, int, int]) -> int | None:
    """The setting tile=, in pixels, as latents; None for the whole picture.

    Raises:
        UserError: too small, or no multiple of the decoder's stride.
    """
    if tile is None:
        return None
    space = stride[1]
    if tile < SMALLEST * space or tile % space:
        raise UserError(
            f"tile={tile} is impossible; give a multiple of {space} pixels, at least {SMALLEST * space}"
        )
    return tile // space


def stream_tiles(stream: Streamer, latents: Tensor, tile: int, stride: int) -> Iterator[Tensor]:
    """Decode [B,C,T,h,w] in tiles of `tile` latents a side; yields blended frames [B,3,n,H,W] fp32.

    Args:
        stream: decodes one tile; all tiles have one size, and it must cut equal sizes into equal parts.
        stride: pixels per latent.
    """
    height, width = latents.shape[3:]
    rows, columns = (spans(length, tile, tile // OVERLAP, stride) for length in (height, width))
    pairs = [(row, column) for row in rows for column in columns]
    streams = [stream(latents[..., r.start : r.stop, c.start : c.stop]) for r, c in pairs]
    weights = [r.weight[:, None] * c.weight[None, :] for r, c in pairs]  # [H_tile,W_tile]
    while True:
        whole: Tensor | None = None
        for (row, column), tiles, weight in zip(pairs, streams, weights, strict=True):
            part = next(tiles, None)
            if part is None:
                return
            if whole is None:
                whole = part.new_zeros(*part.shape[:3], height * stride, width * stride)
            high, wide = (slice(span.start * stride, span.stop * stride) for span in (row, column))
            whole[..., high, wide] += part * weight.to(part.device)
            del part  # a name for it, or for a view of `whole`, would keep it beside the next one
        assert whole is not None
        yield whole
