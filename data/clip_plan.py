"""Plan of the clips to cut from every media file, in their final order, and the reasons for rejected files.

A plan is a pure function of the probed files, their captions and the settings. So runs over the same folder write the
same shards for any number of processes and after any interruptions.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from data.buckets import choose_size, cut
from data.captions import CaptionError, Tables, caption_of
from data.scan import MediaFile


@dataclass(frozen=True)
class Rules:
    """Which files are accepted and how they are cut.

    Attributes:
        sizes: (height, width) choices; lengths: in frames, longest first; fps: of the latents.
        large: for each of `sizes` the size of the second stage, or empty. The larger size decides whether a file fits.
        captions_required: whether a file without a caption is rejected.
        silent, images: whether clips without audio, and still images, are accepted.
        max_crop, max_enlarge: see `data.buckets.choose_size`.
        max_windows: clips per file, None: all.
    """

    sizes: Sequence[tuple[int, int]]
    lengths: Sequence[int]
    fps: float
    captions_required: bool
    silent: bool
    images: bool
    max_crop: float
    max_enlarge: float
    max_windows: int | None
    large: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class PlannedClip:
    """One clip to encode.

    Attributes:
        key: unique name: words of the file's name, a hash of its path, the window's number.
        start: seconds into the file; frames, height, width: length in frames and size in pixels.
        still: whether the file is a still image.
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
    large: tuple[int, int] | None = None


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


def source_of(key: str) -> str:
    """The part of a key that all clips of one file share."""
    return key.rpartition("_")[0] or key


def available_frames(seconds: float, fps: float) -> int:
    """Number of frames at `fps` in a video of `seconds`: those whose midpoint lies inside it."""
    return max(0, ceil(seconds * fps - 0.5 - 1e-6))


def make_plan(files: Sequence[MediaFile], tables: Tables, duplicates: Mapping[str, str], rules: Rules) -> ClipPlan:
    """Plan the clips of `files`, in this order.

    Args:
        duplicates: relative path -> relative path of an earlier file with the same content, to be rejected.
    """
    clips: list[PlannedClip] = []
    rejected: dict[str, str] = {}
    for found in files:
        try:
            new = _clips_of(found, tables, duplicates, rules)
        except _Rejected as rejection:
            rejected[found.relative] = str(rejection)
        else:
            clips.extend(new)
    return ClipPlan(clips, rejected)


class _Rejected(Exception):
    pass


def _clips_of(found: MediaFile, tables: Tables, duplicates: Mapping[str, str], rules: Rules) -> list[PlannedClip]:
    info = found.info
    if info is None:
        raise _Rejected(found.problem)
    if info.kind == "audio":
        raise _Rejected("has audio but no video")
    if found.relative in duplicates:
        raise _Rejected(f"same content as {duplicates[found.relative]} (duplicates=keep takes both)")
    if info.kind == "image" and not rules.images:
        raise _Rejected("is a still image (images=true takes it)")
    if info.kind == "video" and not info.has_audio and not rules.silent:
        raise _Rejected("has no audio (silent=true takes it)")
    try:
        caption = caption_of(Path(found.path), tables)
    except CaptionError as error:
        raise _Rejected(str(error)) from error
    if not caption and rules.captions_required:
        raise _Rejected("has no caption: put a .txt next to it or a row into a table (captions=optional takes it)")
    if info.seconds > found.size:
        raise _Rejected(f"claims to last {info.seconds:.0f} s in {found.size} bytes")
    choices = rules.large or rules.sizes
    best, why = choose_size(info.height, info.width, choices, rules.max_crop, rules.max_enlarge)
    if best is None:
        raise _Rejected(why)
    size = rules.sizes[list(choices).index(best)]
    still = info.kind == "image"
    if still:
        windows = [(0, 1)]
    else:
        available = available_frames(info.seconds, rules.fps)
        windows = cut(available, rules.lengths, rules.max_windows)
        if not windows:
            raise _Rejected(
                f"is too short: {info.seconds:.2f} s are {available} frames at {rules.fps:g} fps, "
                f"the shortest length is {min(rules.lengths)}"
            )
    return [
        PlannedClip(
            key=key_of(found.relative, number), path=found.path, relative=found.relative, caption=caption,
            start=first / rules.fps, frames=frames, height=size[0], width=size[1], still=still,
            large=best if rules.large else None,
        )
        for number, (first, frames) in enumerate(windows)
    ]  # fmt: skip
