"""What becomes of every file: the clips to encode, in their final order, or the reason why there are none.

A plan is a pure function of what the files hold, their captions and the settings, so two runs over the same
folder make the same shards, whatever the number of processes and however often they were interrupted.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from data.buckets import choose_size, cut
from data.captions import CaptionError, Tables, caption_of
from data.scan import Found


@dataclass(frozen=True)
class Rules:
    """What is taken and how it is cut.

    Attributes:
        sizes: (height, width) choices; lengths: pixel frames, longest first; fps: of the codecs.
        large: for each of `sizes` the size of the second stage, or empty. Files are judged by the larger size.
        captions_required: whether a file without a caption is refused.
        silent, images: whether clips without sound, and still pictures, are taken.
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
        key: unique name: words of the file's name, a hash of its place, the window's number.
        start: seconds into the file; frames, height, width: pixel frames and size of the clip.
        still: whether the file is a still picture.
        large: (height, width) at which the clip is stored too, or None.
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
class Plan:
    """Clips in order, and for every file that gives none the reason (by its relative path)."""

    clips: list[PlannedClip]
    refused: dict[str, str]


def key_of(relative: str, window: int) -> str:
    """Unique, plain ASCII, without dots (webdataset cuts names at the first)."""
    stem = Path(relative).stem.encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:40] or "clip"
    place = hashlib.sha256(relative.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{words}-{place}_{window:04d}"


def source_of(key: str) -> str:
    """The part of a key that all windows of one file share."""
    return key.rpartition("_")[0] or key


def available_frames(seconds: float, fps: float) -> int:
    """How many pictures at `fps` a track of `seconds` gives: those whose middle it still shows."""
    return max(0, ceil(seconds * fps - 0.5 - 1e-6))


def make_plan(files: Sequence[Found], tables: Tables, repeats: Mapping[str, str], rules: Rules) -> Plan:
    """Decide on every file of `files` (in this order).

    Args:
        repeats: relative path -> relative path of an earlier file with the same contents, to be refused.
    """
    clips: list[PlannedClip] = []
    refused: dict[str, str] = {}
    for found in files:
        try:
            new = _clips_of(found, tables, repeats, rules)
        except _Refused as refusal:
            refused[found.relative] = str(refusal)
        else:
            clips.extend(new)
    return Plan(clips, refused)


class _Refused(Exception):
    pass


def _clips_of(found: Found, tables: Tables, repeats: Mapping[str, str], rules: Rules) -> list[PlannedClip]:
    info = found.info
    if info is None:
        raise _Refused(found.problem)
    if info.kind == "audio":
        raise _Refused("holds sound but no picture")
    if found.relative in repeats:
        raise _Refused(f"same contents as {repeats[found.relative]} (duplicates=keep takes both)")
    if info.kind == "image" and not rules.images:
        raise _Refused("is a still picture (images=true takes it)")
    if info.kind == "video" and not info.has_audio and not rules.silent:
        raise _Refused("has no sound (silent=true takes it)")
    try:
        caption = caption_of(Path(found.path), tables)
    except CaptionError as error:
        raise _Refused(str(error)) from error
    if not caption and rules.captions_required:
        raise _Refused(
            "has no caption: put a .txt beside it or a row into a table (captions=optional takes it)"
        )
    if info.seconds > found.size:
        raise _Refused(f"claims to last {info.seconds:.0f} s in {found.size} bytes")
    choices = rules.large or rules.sizes
    best, why = choose_size(info.height, info.width, choices, rules.max_crop, rules.max_enlarge)
    if best is None:
        raise _Refused(why)
    size = rules.sizes[list(choices).index(best)]
    still = info.kind == "image"
    if still:
        windows = [(0, 1)]
    else:
        available = available_frames(info.seconds, rules.fps)
        windows = cut(available, rules.lengths, rules.max_windows)
        if not windows:
            raise _Refused(
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
