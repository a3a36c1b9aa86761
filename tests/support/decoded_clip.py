"""A clip whose frames and audio are given, without a file."""

from pathlib import Path
from typing import Any

import numpy as np

from eval.clip_file import ClipFile
from magihuman.media.reading import MediaInfo


def decoded_clip(
    frames: np.ndarray | None = None, wave: np.ndarray | None = None, fps: float = 25.0, **known: Any
) -> ClipFile:
    """A clip of frames uint8 [F,H,W,3] and audio fp32 [N] at 16 kHz; `known`: prompt and so on."""
    clip = ClipFile(Path("clip.mp4"), **known)
    shape = (1, 0, 0) if frames is None else frames.shape
    kind = "audio" if frames is None else "video"
    rate = 0 if wave is None else 16000
    clip.media.__dict__["info"] = MediaInfo(kind, shape[2], shape[1], fps, shape[0] / fps, rate, min(rate, 1))
    if frames is not None:
        clip.media.__dict__["frames"] = frames
    if wave is not None:
        clip.media.waves[16000] = wave
    return clip
