"""Whether two sizes are of one shape: of a picture and a bucket, of the first stage and the second."""

from math import log

SAME = 0.03
"""Aspects may differ by so much and count as the same: 1920x1088 and 448x256 differ by 0.8 %."""

Pixels = tuple[int, int]
"""(height, width)."""


def difference(a: Pixels, b: Pixels) -> float:
    """|log| of the ratio of both aspects: 0 for one shape, 0.01 for 1 % off."""
    return abs(log(a[1] / a[0] * b[0] / b[1]))


def same(a: Pixels, b: Pixels) -> bool:
    """Whether one fits the other without visible stretching."""
    return difference(a, b) <= SAME
