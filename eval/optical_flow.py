"""Optical flow of a clip, computed once for all measurements that need it: Farneback's method of OpenCV.

    motion = motion_of(clip)
    motion.speed()          # fp32 [F-1,h,w], frame heights per second

Flow is measured on frames whose shorter side is at most `SHORT_SIDE`: mean motion hardly depends on the scale, and 1080p
would take 50 times as long.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

import numpy as np

from eval.clip_file import NotMeasured

if TYPE_CHECKING:
    from eval.clip_file import ClipFile

SHORT_SIDE = 144
STILL = 0.02
"""Frame heights per second below which a pixel counts as still: 0.12 pixels per frame at 144 pixels and 25 fps."""


@dataclass(frozen=True, eq=False)
class Motion:
    """Small grey frames and the flow between them.

    Attributes:
        luma: uint8 [F,h,w]; flow: fp16 [F-1,h,w,2] (x, y), pixels of `luma` from a frame to the next; fps: of the clip.
    """

    luma: np.ndarray
    flow: np.ndarray
    fps: float

    @cached_property
    def magnitude(self) -> np.ndarray:
        """Length of the flow in frame heights per second: fp16 [F-1,h,w]."""
        scale = self.fps / self.luma.shape[1]
        found = np.empty(self.flow.shape[:3], np.float16)
        for index, flow in enumerate(self.flow):
            found[index] = np.hypot(flow[..., 0].astype(np.float32), flow[..., 1]) * scale
        return found

    def change(self) -> np.ndarray:
        """Absolute change of the luma from frame to frame, 8-bit levels: uint8 [F-1,h,w]."""
        return np.maximum(self.luma[1:], self.luma[:-1]) - np.minimum(self.luma[1:], self.luma[:-1])


_last: "tuple[ReferenceType[Any], Motion] | None" = None


def motion_of(clip: "ClipFile") -> Motion:
    """Flow of a clip; that of the last clip is kept, for the next measurement of the same one.

    Raises:
        NotMeasured: fewer than three frames.
    """
    global _last
    if _last is None or _last[0]() is not clip.media:
        frames, fps = clip.frames, clip.fps
        if len(frames) < 3:
            raise NotMeasured(f"motion needs three frames, and the clip has {len(frames)}")
        luma = small_luma(frames)
        known = _last[1] if _last is not None else None
        # The same picture with another sound has the same flow.
        if known is None or known.fps != fps or not np.array_equal(known.luma, luma):
            _last = known = None  # before the next one takes memory
            known = Motion(luma, _flow(luma), fps)
        _last = (ref(clip.media), known)
    return _last[1]


def small_luma(frames: np.ndarray, short_side: int = SHORT_SIDE) -> np.ndarray:
    """BT.601 luma of frames uint8 [F,H,W,3], scaled down so that the shorter side is at most `short_side`: uint8 [F,h,w]."""
    import cv2

    height, width = frames.shape[1:3]
    scale = min(1.0, short_side / min(height, width))
    size = (round(width * scale), round(height * scale))
    found = np.empty((len(frames), size[1], size[0]), np.uint8)
    for index, frame in enumerate(frames):
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        found[index] = grey if scale == 1 else cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    return found


def _flow(luma: np.ndarray) -> np.ndarray:
    import cv2

    flow = np.zeros((len(luma) - 1, *luma.shape[1:], 2), np.float16)
    start = np.zeros((*luma.shape[1:], 2), np.float32)
    for index in range(len(flow)):
        if not np.array_equal(luma[index], luma[index + 1]):
            # Parameters of OpenCV's own example, and of AV-Align.
            flow[index] = cv2.calcOpticalFlowFarneback(luma[index], luma[index + 1], start, 0.5, 3, 15, 3, 5, 1.2, 0)
    return flow
