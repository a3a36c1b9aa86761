"""LSE-D and LSE-C: how near SyncNet puts the lips and the speech at the best offset, and how clearly that offset is the best.

    python -m eval.score clips=DIR metrics=lip_sync lip_sync.weights=syncnet_v2.model lip_sync.face_detector=yunet.onnx
    python -m eval.score clips=DIR metrics=lip_sync lip_sync.weights=syncnet_v2.model lip_sync.crop=centre

Published values were measured with the faces of another detector (S3FD): compare values of one detector only.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.clip_file import SILENT_PEAK, MeasurementError, NotMeasured
from eval.fingerprint import fingerprint, missing_file
from eval.metrics.registry import Measurement, Metric, MissingDependency, missing_package
from magihuman.cli import option
from magihuman.errors import UserError

if TYPE_CHECKING:
    from eval.clip_file import ClipFile
    from eval.faces import FindFaces
    from eval.syncnet import SyncNet

SIZE = 224
_LEAST = 25  # frames of a track: 1 s
_SMOOTHED = 13  # frames of the median of a box
_MARGIN = 0.4  # of half a box, on each side; three times below, as the network was trained
_GREY = 110  # beside the frame
_STILL = 0.05  # 8-bit levels between frames


@dataclass
class LipSyncOptions:
    """Settings of lip_sync."""

    weights: str | None = option("syncnet_v2.model, from the page of github.com/joonson/syncnet_python", None)
    face_detector: str | None = option("ONNX file of YuNet, from github.com/opencv/opencv_zoo", None)
    crop: str | None = option("of close-ups, instead of a detector: centre, or left,top,width,height in pixels", None)
    device: str = option("auto, cpu, cuda or cuda:0", "auto")

    def __post_init__(self) -> None:
        if self.crop is not None and not re.fullmatch(r"centre|\d+,\d+,[1-9]\d*,[1-9]\d*", self.crop):
            raise UserError(f"lip_sync.crop={self.crop} must be centre or left,top,width,height, e.g. 400,100,300,300")
        if self.crop is not None and self.face_detector is not None:
            raise UserError("lip_sync.crop and lip_sync.face_detector exclude each other; give one")


@dataclass
class _LipSync:
    network: "SyncNet"
    find: "FindFaces | None"
    crop: str | None


def missing(options: LipSyncOptions) -> MissingDependency | None:
    """OpenCV, the weights, or a way to find the face."""
    from eval.faces import missing_detector

    lacks = missing_package("cv2", "opencv-python-headless") or missing_file(
        options.weights, "lip_sync.weights", "weights of SyncNet, syncnet_v2.model (github.com/joonson/syncnet_python)"
    )
    if lacks or options.crop is not None:
        return lacks
    if options.face_detector is None:
        return MissingDependency("no way to find the face", "lip_sync.face_detector=FILE, or lip_sync.crop=centre")
    return missing_detector(options.face_detector, "lip_sync.face_detector")


def load(options: LipSyncOptions) -> _LipSync:
    """The network and the detector.

    Raises:
        UserError: a file cannot be loaded.
    """
    from eval.faces import face_detector
    from eval.syncnet import load_syncnet

    find = face_detector(Path(options.face_detector)) if options.face_detector is not None else None
    return _LipSync(load_syncnet(Path(str(options.weights)), options.device), find, options.crop)


def identity(options: LipSyncOptions) -> Mapping[str, Any]:
    """Weights and detector by their fingerprints, and the crop."""
    detector = options.face_detector
    return {
        "weights": fingerprint(Path(str(options.weights)).expanduser()),
        "face_detector": detector and fingerprint(Path(detector).expanduser()),
        "crop": options.crop,
    }


def face_crops(frames: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Faces uint8 [n,224,224,3] from frames uint8 [n,H,W,3] and boxes [n,4] (left, top, width, height), smoothed over time.

    The square of syncnet_python's pipeline: 1.4 times the box's longer side, its mouth half in the middle.
    """
    import cv2
    from scipy.ndimage import median_filter

    middles = boxes[:, :2] + boxes[:, 2:] / 2
    raw = np.column_stack([middles, boxes[:, 2:].max(1) / 2])
    x, y, half = median_filter(raw, (_SMOOTHED, 1), mode="nearest").T
    crops = []
    for frame, reach, column, row in zip(frames, half, x, y, strict=True):
        edge = int(reach * (1 + 2 * _MARGIN)) + 1
        padded = np.pad(frame, ((edge, edge), (edge, edge), (0, 0)), constant_values=_GREY)
        top, bottom = int(row + edge - reach), int(row + edge + reach * (1 + 2 * _MARGIN))
        left, right = (int(column + edge + side * reach * (1 + _MARGIN)) for side in (-1, 1))
        crops.append(cv2.resize(padded[top:bottom, left:right], (SIZE, SIZE)))
    return np.stack(crops)


def fixed_crop(frames: np.ndarray, crop: str) -> np.ndarray:
    """The same part of every frame, uint8 [n,224,224,3]: centre, the largest square, or left,top,width,height.

    Raises:
        MeasurementError: the part is not inside the frame.
    """
    import cv2

    height, width = frames.shape[1:3]
    side = min(height, width)
    left, top, wide, high = (width - side) // 2, (height - side) // 2, side, side
    if crop != "centre":
        left, top, wide, high = map(int, crop.split(","))
    if left + wide > width or top + high > height:
        raise MeasurementError(f"lip_sync.crop={crop} is not inside the frame of {width}x{height}")
    return np.stack([cv2.resize(frame[top : top + high, left : left + wide], (SIZE, SIZE)) for frame in frames])


def measure(clip: "ClipFile", model: _LipSync) -> Mapping[str, float | NotMeasured]:
    """LSE-D, LSE-C and the offset of the sound, of the face that is seen longest; no offset at either end of the search.

    Raises:
        NotMeasured: silence, a face that stands still, no face for a second, or a clip of less than 0.24 s.
        MeasurementError: the crop is not inside the frame.
    """
    from eval.faces import longest_track
    from eval.mfcc import RATE, mfcc
    from eval.syncnet import FPS, MOST, WINDOW, sync_scores

    wave = clip.wave(RATE)
    if not len(wave) or np.abs(wave).max() < SILENT_PEAK:
        raise NotMeasured("the audio is silent")
    frames = clip.frames if abs(clip.fps - FPS) < 0.01 else clip.frames_at(FPS)
    if model.find is None:
        crops = fixed_crop(frames, str(model.crop))
    else:
        start, boxes = longest_track([model.find(frame) for frame in frames])
        if len(boxes) < min(_LEAST, len(frames)) or not len(boxes):
            raise NotMeasured(f"no face is seen for {_LEAST} frames; the longest for {len(boxes)}")
        frames, wave = frames[start : start + len(boxes)], wave[start * RATE // FPS :]
        crops = face_crops(frames, boxes)
    if len(crops) > 1 and np.abs(np.diff(crops.astype(np.int16), axis=0)).mean() < _STILL:
        raise NotMeasured("the face does not move")
    count = min(len(crops), len(wave) * FPS // RATE) - WINDOW  # one less than there are windows, as in syncnet_python
    if count < 1:
        raise NotMeasured(f"{len(crops)} frames with sound are too few for windows of {WINDOW}")
    lips = model.network.of_lips(crops[: count + WINDOW - 1])
    speech = model.network.of_speech(mfcc(wave))[:count]
    count = min(len(lips), len(speech))
    scores = sync_scores(lips[:count], speech[:count])
    found = abs(scores.offset) < MOST
    return {
        "lse_d": scores.distance,
        "lse_c": scores.confidence,
        "lip_sync_offset": 1000 / FPS * scores.offset
        if found
        else NotMeasured("the best offset is the end of the search"),
    }


MEASUREMENTS = (
    Measurement(
        "lip_sync",
        (
            Metric("lse_d", "lip sync by SyncNet: LSE-D", direction="down", best=0.0),
            Metric("lse_c", "lip sync by SyncNet: LSE-C", direction="up"),
            Metric("lip_sync_offset", "sound ahead of the lips, by SyncNet", "ms", "target", target=0.0),
        ),
        measure,
        inputs=("frames", "audio"),
        version=3,
        options=LipSyncOptions,
        missing=missing,
        load=load,
        identity=identity,
        costly=True,
    ),
)
