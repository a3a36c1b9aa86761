"""Buckets: groups of clips of equal length and size, with or without audio, so that a batch is one dense tensor.

A bucket's name is "<frames>x<height>x<width>", followed by "+a" if its clips have audio.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from magihuman.errors import UserError
from magihuman.media import images


@dataclass(frozen=True, order=True)
class Bucket:
    """Length in frames, height and width in pixels, and whether there is audio.

    str(Bucket(25, 64, 64, True)) == "25x64x64+a"
    """

    frames: int
    height: int
    width: int
    audio: bool

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}{'+a' if self.audio else ''}"

    @classmethod
    def parse(cls, name: str) -> "Bucket":
        frames, height, width = name.removesuffix("+a").split("x")
        return cls(int(frames), int(height), int(width), name.endswith("+a"))


def parse_sizes(texts: Sequence[str], stride: tuple[int, int], setting: str = "sizes") -> list[tuple[int, int]]:
    """Sizes (height, width) from texts such as "448x256" (width x height).

    Args:
        stride: (height, width) in pixels of one latent.
        setting: name of the option in error messages.

    Raises:
        UserError: not of that form, or not divisible by `stride`.
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
    """Check that `large` has a larger size of the same aspect ratio for each of `small`, and return it.

    Raises:
        UserError: it has not.
    """
    if len(large) != len(small):
        raise UserError(
            f"sr_sizes has {len(large)} sizes and sizes has {len(small)}; give one for each, in the same order"
        )
    for (height, width), (tall, wide) in zip(small, large, strict=True):
        names = f"sr_sizes={wide}x{tall} for {width}x{height}"
        if tall < height or wide < width:
            raise UserError(f"{names} is smaller; give the size of the second stage")
        if not images.same_aspect((height, width), (tall, wide)):
            raise UserError(f"{names} has another aspect ratio; choose one within {images.SAME_ASPECT:.0%} of it")
    if len(set(large)) < len(large):
        raise UserError(
            "sr_sizes names a size twice: a clip of it could belong to two of sizes; prepare each into its own folder"
        )
    if len(set(small)) < len(small):
        raise UserError(
            "sizes names a size twice: clips of a batch share both sizes; prepare each sr_sizes into its own folder"
        )
    return list(large)


def check_lengths(lengths: Sequence[int], stride: int) -> list[int]:
    """Lengths in frames, longest first.

    Args:
        stride: frames per latent of the video codec.

    Raises:
        UserError: a length is not stride * k + 1.
    """
    for length in lengths:
        if length < 1 or (length - 1) % stride:
            near = max(1, round((length - 1) / stride)) * stride + 1
            raise UserError(f"frames={length}: the video codec needs {stride}k+1 frames, for example {near}")
    return sorted(set(lengths), reverse=True)


def choose_size(
    height: int, width: int, sizes: Sequence[tuple[int, int]], max_crop: float, max_enlarge: float
) -> tuple[tuple[int, int] | None, str]:
    """The size with the nearest aspect ratio; among equal ones the largest that needs no upscaling.

    Args:
        max_crop: share of the area that cropping may remove.
        max_enlarge: largest factor of upscaling.

    Returns:
        (height, width) and "", or None and the reason why no size fits.
    """

    def cover(size: tuple[int, int]) -> float:
        return max(size[0] / height, size[1] / width)

    def cost(size: tuple[int, int]) -> tuple[float, bool, int]:
        return (
            round(images.aspect_difference(size, (height, width)), 6),
            cover(size) > 1,
            -size[0] * size[1] if cover(size) <= 1 else size[0] * size[1],
        )

    best = min(sizes, key=cost)
    lost = 1 - best[0] * best[1] / (height * width * cover(best) ** 2)
    if lost > max_crop:
        return None, (
            f"{width}x{height} would lose {lost:.0%} of its area to {best[1]}x{best[0]} "
            f"(max_crop={max_crop:g}); add a size of its aspect ratio"
        )
    if cover(best) > max_enlarge:
        return None, f"{width}x{height} would be enlarged {cover(best):.1f}x (max_enlarge={max_enlarge:g})"
    return best, ""


def cut(available: int, lengths: Sequence[int], max_windows: int | None) -> list[tuple[int, int]]:
    """Cut `available` frames into windows (first frame, length) without gap or overlap, long ones first.

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
