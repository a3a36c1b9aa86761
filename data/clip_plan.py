"""Plan of the clips to cut from every media file, in their final order, and the reasons for rejected files.

A plan is a pure function of the probed files, their captions and the settings. So runs over the same folder write the
same shards for any number of processes and after any interruptions.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from data.captions import Captions, NoCaption, Rejected
from data.options import PrepareOptions
from data.scan import MediaFile
from magihuman.codecs.bundle import bundle_spec
from magihuman.errors import UserError
from magihuman.media import images
from magihuman.media.container import LONGEST_VIDEO


@dataclass(frozen=True)
class ClipFormats:
    """Sizes and lengths that clips may have.

    Attributes:
        sizes: (height, width) in pixels; lengths: in frames, longest first; fps: of the latents.
        large: for each of `sizes` the size of the second stage, or empty. The larger size decides whether a file fits.
    """

    sizes: Sequence[tuple[int, int]]
    lengths: Sequence[int]
    fps: float
    large: Sequence[tuple[int, int]] = ()

    @classmethod
    def of(cls, options: PrepareOptions, codecs: Mapping[str, Any]) -> "ClipFormats":
        """Those of `options`, or the usual ones of the codecs (`data.encode.describe_codecs`).

        Raises:
            UserError: a size or length that cannot be encoded, or sizes that are no pairs.
        """
        try:
            lengths = [int(part) for part in str(options.frames or codecs["frames"]).split(",")]
        except ValueError as error:
            raise UserError(f"frames={options.frames!r} should be numbers such as 101,49,25") from error
        contract = codecs["contract"]
        time, tall, wide = contract["video_stride"]
        patch = 1 if options.pixels else bundle_spec(options.codecs).patch  # decoders know no tokens
        unit = patch * tall, patch * wide
        small = parse_sizes(options.sizes or f"{codecs['width']}x{codecs['height']}", unit)
        large = pair_sizes(small, parse_sizes(options.sr_sizes, unit, "sr_sizes")) if options.sr_sizes else ()
        return cls(small, check_lengths(lengths, time), contract["fps"], large)


@dataclass(frozen=True)
class PlannedClip:
    """One clip to encode.

    Attributes:
        key: unique name: words of the file's name, a hash of its path, the window's number.
        start: seconds into the file; frames, height, width: length in frames and size in pixels.
        still: whether the file is a still image; content: sha256 of the file.
        large: (height, width) of the second stage, at which the clip is stored too, or None.
    """

    key: str
    path: str
    relative: str
    caption: str
    start: float
    frames: int
    height: int
    width: int
    still: bool
    content: str
    large: tuple[int, int] | None = None

    @property
    def identity(self) -> str:
        """Hash of all that decides the sample, next to the options."""
        values = {**asdict(self), "path": ""}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ClipPlan:
    """Clips in order, and the reason for every rejected file by its relative path."""

    clips: list[PlannedClip]
    rejected: dict[str, str]


def key_of(relative: str, window: int) -> str:
    """Unique key of a clip in ASCII, without dots because webdataset splits names at the first one."""
    stem = Path(relative).stem.encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:40] or "clip"
    digest = hashlib.sha256(relative.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{words}-{digest}_{window:04d}"


def make_plan(
    files: Sequence[MediaFile], captions: Captions, options: PrepareOptions, formats: ClipFormats
) -> ClipPlan:
    """Plan the clips of `files`, in this order.

    Of files with the same bytes, the first one that can be used and has a caption is taken, or the first that can be used.
    """
    clips: dict[str, list[PlannedClip]] = {}
    rejected: dict[str, str] = {}
    original: dict[str, PlannedClip] = {}  # first clip of the file to take, by content
    for found in files:
        try:
            planned = clips[found.relative] = _clips_of(found, captions, options, formats)
        except Rejected as rejection:
            rejected[found.relative] = str(rejection)
            continue
        first = original.setdefault(found.content, planned[0])
        if planned[0].caption and not first.caption:
            original[found.content] = planned[0]
    if options.duplicates == "skip":
        for found in files:
            if found.relative in clips and original[found.content].relative != found.relative:
                first, (copy, *_) = original[found.content], clips.pop(found.relative)
                other = "" if copy.caption == first.caption else " with another caption"
                rejected[found.relative] = f"same content as {first.relative}{other} (duplicates=keep takes both)"
    return ClipPlan([clip for planned in clips.values() for clip in planned], rejected)


def _clips_of(found: MediaFile, captions: Captions, options: PrepareOptions, formats: ClipFormats) -> list[PlannedClip]:
    info = found.info
    if info is None:
        raise Rejected(found.problem)
    if info.kind == "audio":
        raise Rejected("has audio but no video")
    if info.kind == "image" and not options.images:
        raise Rejected("is a still image (images=true takes it)")
    if info.kind == "video" and not info.has_audio and not options.silent:
        raise Rejected("has no audio (silent=true takes it)")
    try:
        caption = captions.of(found.path)
    except NoCaption as missing:
        if options.captions == "required":
            raise Rejected(f"{missing} (captions=optional takes it)") from None
        caption = ""
    if info.seconds * 10 > found.size:  # H.264 of black at 1 fps takes 33 bytes a second
        raise Rejected(f"claims to last {info.seconds:.0f} s in {found.size} bytes")
    if info.seconds > LONGEST_VIDEO:
        raise Rejected(f"lasts {info.seconds:.0f} s, and {LONGEST_VIDEO:.0f} s is the most; cut it into parts")
    choices = formats.large or formats.sizes
    best = choose_size(info.height, info.width, choices, options.max_crop, options.max_enlarge)
    size = formats.sizes[list(choices).index(best)]
    still = info.kind == "image"
    if still:
        windows = [(0, 1)]
    else:
        available = max(0, ceil(info.seconds * formats.fps - 0.5 - 1e-6))  # frames whose midpoint lies inside it
        windows = cut(available, formats.lengths, options.max_windows)
        if not windows:
            raise Rejected(
                f"is too short: {info.seconds:.2f} s are {available} frames at {formats.fps:g} fps, "
                f"the shortest length is {min(formats.lengths)}"
            )
    return [
        PlannedClip(
            key=key_of(found.relative, number), path=found.path, relative=found.relative, caption=caption,
            start=first / formats.fps, frames=frames, height=size[0], width=size[1], still=still,
            content=found.content,
            large=best if formats.large else None,
        )
        for number, (first, frames) in enumerate(windows)
    ]  # fmt: skip


def parse_sizes(texts: str, unit: tuple[int, int], setting: str = "sizes") -> list[tuple[int, int]]:
    """Sizes (height, width) from a text such as "448x256,256x448" (width x height).

    Args:
        unit: (height, width) in pixels of one video token.
        setting: name of the option in error messages.

    Raises:
        UserError: not of that form, or not divisible by `unit`; names the nearest size that is.
    """
    sizes = []
    for text in texts.replace(" ", "").split(","):
        width, _, height = text.lower().partition("x")
        if not (width.isdigit() and height.isdigit()):
            raise UserError(f"{setting}={text!r} should look like 448x256 (width x height)")
        size = (int(height), int(width))
        tall, wide = (max(1, round(side / step)) * step for side, step in zip(size, unit, strict=True))
        if size != (tall, wide):
            raise UserError(
                f"{setting}={text} cannot be trained: height must be divisible by {unit[0]} and width by {unit[1]}; "
                f"the nearest size is {wide}x{tall}"
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
) -> tuple[int, int]:
    """The size (height, width) with the nearest aspect ratio; among equal ones the largest that needs no upscaling.

    Args:
        max_crop: share of the area that cropping may remove.
        max_enlarge: largest factor of upscaling.

    Raises:
        Rejected: no size fits.
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
        raise Rejected(
            f"{width}x{height} would lose {lost:.0%} of its area to {best[1]}x{best[0]} "
            f"(max_crop={max_crop:g}); add a size of its aspect ratio"
        )
    if cover(best) > max_enlarge:
        raise Rejected(f"{width}x{height} would be enlarged {cover(best):.1f}x (max_enlarge={max_enlarge:g})")
    return best


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
