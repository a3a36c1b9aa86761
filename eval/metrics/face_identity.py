"""Whether the person stays the same: cosine of faces with the first face in the clip, and with that of the given image.

    python -m eval.score clips=DIR metrics=face_identity face_identity.weights=FILE face_identity.face_detector=FILE

Both networks are the user's. InsightFace's weights (ArcFace, buffalo) are for non-commercial research only; OpenCV's SFace
(opencv/opencv_zoo, Apache-2.0) takes pixels=bytes. Cosines of different networks cannot be compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from eval.clip_file import MeasurementError, NotMeasured
from eval.extractor import Extractor, load_extractor, missing_extractor
from eval.fingerprint import fingerprint
from eval.metrics.registry import Measurement, Metric, MissingDependency
from magihuman.cli import option
from magihuman.errors import UserError

if TYPE_CHECKING:
    from eval.clip_file import ClipFile
    from eval.faces import Face, FindFaces

SIZE = 112
# Where the eyes, the nose and the corners of the mouth lie in an image that ArcFace (arXiv:1801.07698) was trained with.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


@dataclass
class FaceOptions:
    """Settings of face_identity."""

    weights: str | None = option("ONNX or TorchScript file: fp32 [B,3,112,112] RGB, aligned faces -> [B,D]", None)
    pixels: Literal["signed", "bytes"] = option(
        "what it takes: signed: -1..1 (ArcFace); bytes: 0..255 (SFace)", "signed"
    )
    face_detector: str | None = option("ONNX file of YuNet, from github.com/opencv/opencv_zoo", None)
    frames: int = option("frames of each clip, evenly spaced", 16)
    device: str = option("auto, cpu, cuda or cuda:0", "auto")

    def __post_init__(self) -> None:
        if self.frames < 2:
            raise UserError(f"face_identity.frames={self.frames} must be 2 or more")


@dataclass
class _FaceModels:
    embed: Extractor
    find: "FindFaces"
    options: FaceOptions


def missing(options: FaceOptions) -> MissingDependency | None:
    """The embedding network, the detector, or a package for them."""
    from eval.faces import missing_detector

    return missing_extractor(
        options.weights, "face_identity.weights", "network of face embeddings (ONNX or TorchScript)"
    ) or missing_detector(options.face_detector, "face_identity.face_detector")


def load(options: FaceOptions) -> _FaceModels:
    """Both networks.

    Raises:
        UserError: a file cannot be loaded.
    """
    from eval.faces import face_detector

    embed = load_extractor(Path(str(options.weights)), options.device)
    return _FaceModels(embed, face_detector(Path(str(options.face_detector))), options)


def identity(options: FaceOptions) -> Mapping[str, Any]:
    """Both networks by their fingerprints, and the settings."""
    files = {name: Path(str(getattr(options, name))).expanduser() for name in ("weights", "face_detector")}
    return {**{k: fingerprint(v) for k, v in files.items()}, "pixels": options.pixels, "frames": options.frames}


def aligned_face(frame: np.ndarray, face: "Face") -> np.ndarray:
    """The face turned and scaled onto `TEMPLATE`, uint8 [112,112,3], from a frame uint8 [H,W,3].

    The similarity transform (turn, scale, shift) with the least squared distance of the five landmarks.
    """
    import cv2

    x, y = face.landmarks.T
    ones, zeros = np.ones(5), np.zeros(5)
    # u = a x - b y + c, v = b x + a y + d
    system = np.concatenate([np.stack([x, -y, ones, zeros], 1), np.stack([y, x, zeros, ones], 1)])
    (a, b, c, d), *_ = np.linalg.lstsq(system, TEMPLATE.T.ravel(), rcond=None)
    return np.asarray(cv2.warpAffine(frame, np.array([[a, -b, c], [b, a, d]]), (SIZE, SIZE)))


def _embeddings(model: _FaceModels, faces: list[np.ndarray]) -> np.ndarray:
    """Unit vectors fp64 [n,D] of aligned faces."""
    images = np.stack(faces).transpose(0, 3, 1, 2).astype(np.float32)
    found = model.embed((images - 127.5) / 127.5 if model.options.pixels == "signed" else images).astype(np.float64)
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    if not lengths.all():
        raise MeasurementError("the network gives the zero vector for a face")
    return found / lengths


def measure(clip: "ClipFile", model: _FaceModels) -> Mapping[str, float | NotMeasured]:
    """Mean cosines of the largest face of each frame, and the share of frames with a face.

    identity_to_first needs two frames with a face, identity_to_image a face in the clip's image; else they are a `NotMeasured`.

    Raises:
        MeasurementError: the image cannot be read.
    """
    frames = clip.frames
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(model.options.frames, len(frames))).round().astype(int))
    seen = [(frames[number], found[0]) for number in chosen if (found := model.find(frames[number]))]
    values: dict[str, float | NotMeasured] = {"faces_found": len(seen) / len(chosen)}
    if not seen:
        return values | dict.fromkeys(("identity_to_first", "identity_to_image"), NotMeasured("no frame shows a face"))
    embeddings = _embeddings(model, [aligned_face(frame, face) for frame, face in seen])
    if len(seen) > 1:
        values["identity_to_first"] = float((embeddings[1:] @ embeddings[0]).mean())
    else:
        values["identity_to_first"] = NotMeasured("only one frame shows a face")
    if clip.image is None:
        values["identity_to_image"] = NotMeasured(
            "there is no image to compare with; give a manifest with the column image"
        )
    elif found := model.find(image := _read_image(clip.image)):
        (given,) = _embeddings(model, [aligned_face(image, found[0])])
        values["identity_to_image"] = float((embeddings @ given).mean())
    else:
        values["identity_to_image"] = NotMeasured(f"the image {clip.image.name} shows no face")
    return values


def _read_image(path: Path) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise MeasurementError(f"the image {path.name} cannot be read: {error}") from error


MEASUREMENTS = (
    Measurement(
        "face_identity",
        (
            Metric("identity_to_first", "face: cosine with the first frame that shows one", direction="up", best=1.0),
            Metric("identity_to_image", "face: cosine with the given image's", direction="up", best=1.0),
            Metric("faces_found", "frames with a face", direction="up", best=1.0, share=True),
        ),
        measure,
        inputs=("frames",),
        optional=("image",),
        options=FaceOptions,
        missing=missing,
        load=load,
        identity=identity,
        costly=True,
        version=2,
    ),
)
