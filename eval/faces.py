"""Faces in frames by OpenCV's YuNet: boxes with five landmarks, the longest track, and crops.

find_faces = face_detector(Path("face_detection_yunet_2023mar.onnx"))
faces = find_faces(frame)          # Face(box, landmarks, score), the largest first
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.metrics.registry import MissingDependency, missing_package
from magihuman.errors import UserError

_LONGEST = 320  # pixels of a frame's longer side in the detector, which was trained for faces of 10 to 300
_SURE = 0.8  # score of a face
_GAP = 25  # frames without the face within a track: 1 s
_OVERLAP = 0.5  # of boxes of a track


@dataclass(frozen=True)
class Face:
    """A face in a frame, in pixels of it.

    Attributes:
        box: left, top, width, height.
        landmarks: fp64 [5,2], x and y: eye, other eye, nose, mouth corner, other corner, each pair from the image's left.
    """

    box: tuple[float, float, float, float]
    landmarks: np.ndarray
    score: float = 1.0


FindFaces = Callable[[np.ndarray], list[Face]]
"""Frame uint8 [H,W,3] RGB -> faces, the largest first."""


def missing_detector(path: str | None, option: str) -> MissingDependency | None:
    """What `face_detector` lacks: OpenCV, or the file."""
    from eval.fingerprint import missing_file

    return missing_package("cv2", "opencv-python-headless") or missing_file(
        path, option, "face detector, YuNet's ONNX file (opencv/opencv_zoo)"
    )


def face_detector(path: Path) -> FindFaces:
    """YuNet of an ONNX file, on the CPU.

    Raises:
        UserError: the file cannot be loaded.
    """
    import cv2

    try:
        detector = cv2.FaceDetectorYN.create(str(path.expanduser()), "", (320, 320), _SURE)
    except cv2.error as error:
        raise UserError(
            f"{path} is no face detector that OpenCV {cv2.__version__} can load: {_words(error)}"
        ) from error

    def find(frame: np.ndarray) -> list[Face]:
        scale = min(1.0, _LONGEST / max(frame.shape[:2]))
        size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
        detector.setInputSize(size)
        image = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)[..., ::-1]
        _, rows = detector.detect(np.ascontiguousarray(image))
        faces = [
            Face(tuple(row[:4] / scale), row[4:14].astype(float).reshape(5, 2) / scale, float(row[14]))
            for row in (() if rows is None else rows)
        ]
        return sorted(faces, key=lambda face: -face.box[2] * face.box[3])

    return find


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def overlap(a: Face, b: Face) -> float:
    """Intersection over union of two boxes, 0 to 1."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a.box, b.box
    width, height = min(ax + aw, bx + bw) - max(ax, bx), min(ay + ah, by + bh) - max(ay, by)
    shared = max(0.0, width) * max(0.0, height)
    return shared / (aw * ah + bw * bh - shared)


def longest_track(found: Sequence[Sequence[Face]]) -> tuple[int, np.ndarray]:
    """The face that is seen over the most frames: its first frame, and its boxes fp64 [n,4] in consecutive frames.

    A face belongs to a track where its box overlaps the track's last one by half, after at most a second unseen; boxes
    in between are interpolated.

    Args:
        found: faces of every frame.
    """
    tracks: list[list[tuple[int, Face]]] = []
    for number, faces in enumerate(found):
        open_tracks = [track for track in tracks if number - track[-1][0] <= _GAP]
        for face in faces:
            near = [track for track in open_tracks if overlap(track[-1][1], face) > _OVERLAP]
            if near:
                best = max(near, key=len)
                best.append((number, face))
                open_tracks = [track for track in open_tracks if track is not best]
            else:
                tracks.append([(number, face)])
    if not tracks:
        return 0, np.zeros((0, 4))
    track = max(tracks, key=lambda t: t[-1][0] - t[0][0])
    numbers, boxes = [number for number, _ in track], np.array([face.box for _, face in track], float)
    every = np.arange(numbers[0], numbers[-1] + 1)
    return numbers[0], np.stack([np.interp(every, numbers, column) for column in boxes.T], 1)
