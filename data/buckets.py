"""Buckets: clips of one length and size (and with or without sound), so that a batch is one dense tensor.

A bucket's name is "<frames>x<height>x<width>", with "+a" behind it when its clips have sound.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from magihuman.errors import UserError
from magihuman.media import images


@dataclass(frozen=True, order=True)
class Bucket:
    """Pixel frames, height and width of a clip, and whether it has sound."""

    frames: int
    height: int
    width: int
    sound: bool

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}{'+a' if self.sound else ''}"

    @classmethod
    def parse(cls, name: str) -> "Bucket":
        frames, height, width = name.removesuffix("+a").split("x")
        return cls(int(frames), int(height), int(width), name.endswith("+a"))


def parse_sizes(
    texts: Sequence[str], stride: tuple[int, int], setting: str = "sizes"
) -> list[tuple[int, int]]:
    """ "448x256" (width x height, as people write it) -> (256, 448); `setting` is what messages call it.

    Raises:
        UserError: not of that form, or not divisible by the codec's `stride`.
    """
    sizes = []
    for text in texts:
        width, _, height = text.lower().partition("x")
        if not (width.isdigit() and height.isdigit()):
            raise UserError(f"{setting}={text!r} should look like 448x256 (width x height)")
        size = (int(height), int(width))
        if any(side == 0 or side % unit for side, unit in zip(size, stride, strict=True)):
            raise UserError(
                f"{setting}={text}: the codec needs height divisible by {stride[0]} and width by {stride[1]}"
            )
        sizes.append(size)
    return sizes


def pair_sizes(small: Sequence[tuple[int, int]], large: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """`large`, after a look at whether it holds a larger size of the same shape for each of `small`.

    Raises:
        UserError: it does not.
    """
    if len(large) != len(small):
        raise UserError(
            f"sr_sizes has {len(large)} sizes and sizes has {len(small)}; give one for each, in the same order"
        )
    for (height, width), (tall, wide) in zip(small, large, strict=True):
        names = f"sr_sizes={wide}x{tall} for {width}x{height}"
        if tall < height or wide < width:
            raise UserError(f"{names} is smaller; give the size of the second stage")
        if not images.same((height, width), (tall, wide)):
            raise UserError(f"{names} has another shape; choose one within {images.SAME:.0%} of it")
    if len(set(large)) < len(large):
        raise UserError("sr_sizes names a size twice; a clip could not tell which of two sizes it belongs to")
    if len(set(small)) < len(small):
        raise UserError(
            "sizes names a size twice: clips of a batch share both sizes; prepare each sr_sizes into its own folder"
        )
    return list(large)


def check_lengths(lengths: Sequence[int], stride: int) -> list[int]:
    """Lengths in pixel frames, longest first.

    Raises:
        UserError: a length is not stride*k+1.
    """
    for length in lengths:
        if length < 1 or (length - 1) % stride:
            near = max(1, round((length - 1) / stride)) * stride + 1
            raise UserError(f"frames={length}: this codec needs {stride}k+1 frames, for example {near}")
    return sorted(set(lengths), reverse=True)


def choose_size(
    height: int, width: int, sizes: Sequence[tuple[int, int]], max_crop: float, max_enlarge: float
) -> tuple[tuple[int, int] | None, str]:
    """The size whose aspect is nearest, and among equals the largest that the picture fills.

    Args:
        max_crop: share of the picture that cropping may cost.
        max_enlarge: how much a picture may be scaled up.

    Returns:
        (height, width) and "", or None and the reason why no size fits.
    """

    def cover(size: tuple[int, int]) -> float:
        return max(size[0] / height, size[1] / width)

    def cost(size: tuple[int, int]) -> tuple[float, bool, int]:
        return (
            round(images.difference(size, (height, width)), 6),
            cover(size) > 1,
            -size[0] * size[1] if cover(size) <= 1 else size[0] * size[1],
        )

    best = min(sizes, key=cost)
    lost = 1 - best[0] * best[1] / (height * width * cover(best) ** 2)
    if lost > max_crop:
        return None, (
            f"{width}x{height} would lose {lost:.0%} of its area to {best[1]}x{best[0]} "
            f"(max_crop={max_crop:g}); add a size of its shape"
        )
    if cover(best) > max_enlarge:
        return None, f"{width}x{height} would be enlarged {cover(best):.1f}x (max_enlarge={max_enlarge:g})"
    return best, ""


def cut(available: int, lengths: Sequence[int], max_windows: int | None) -> list[tuple[int, int]]:
    """Windows (first frame, frames) over `available` frames: longest first, one after the other, no overlap.

    Args:
        lengths: longest first.
    """
    windows: list[tuple[int, int]] = []
    first = 0
    while max_windows is None or len(windows) < max_windows:
        length = next((length for length in lengths if first + length <= available), None)
        if length is None:
            break
        windows.append((first, length))
        first += length
    return windows
