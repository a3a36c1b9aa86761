"""Face identity: alignment, cosines of planted faces, frames without a face, and ONNX and TorchScript networks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from decoded_clip import decoded_clip
from PIL import Image
from tiny_onnx import write_mean

from eval.clip_file import MeasurementError
from eval.faces import Face
from eval.metrics import face_identity
from eval.metrics.face_identity import TEMPLATE, aligned_face
from eval.metrics.registry import measurements
from magihuman.errors import UserError

cv2 = pytest.importorskip("cv2")
FACES = measurements()["face_identity"]
SKIN = {"anna": (200, 100, 50), "ben": (50, 100, 200)}
NO_SKIN = (0, 0, 0)


def frame_of(skin: tuple[int, int, int]) -> np.ndarray:
    return np.full((160, 200, 3), skin, np.uint8)


def find(frame: np.ndarray) -> list[Face]:
    """A face wherever the frame is not black."""
    if not frame.any():
        return []
    return [Face((40, 30, 100, 100), TEMPLATE + np.array([40, 30]))]


class ColourAngles(torch.nn.Module):
    """Mean colour of the image, as a vector."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))


@pytest.fixture(scope="module", params=["colour.pt", "colour.onnx"])
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faces") / request.param
    if path.suffix == ".pt":
        torch.jit.script(ColourAngles()).save(str(path))
        return path
    pytest.importorskip("onnxruntime")
    return write_mean(path, ["b", 3, 112, 112], [2, 3], ["b", 3])


@pytest.fixture
def model(weights: Path, monkeypatch: pytest.MonkeyPatch) -> face_identity._FaceModels:
    monkeypatch.setattr("eval.faces.face_detector", lambda path: find)
    return FACES.load(FACES.options(weights=str(weights), face_detector="yunet.onnx", frames=4, device="cpu"))


def cosine(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    x, y = ((np.array(colour) - 127.5) / 127.5 for colour in (a, b))
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


class TestAlignment:
    @pytest.mark.parametrize("turn", [0.0, 0.4, -1.2])
    def test_a_turned_and_scaled_face_comes_back(self, turn: float) -> None:
        """Five dots at the template's places, turned, doubled and moved, lie at the template's places again."""
        spin = 2 * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        places = (TEMPLATE - 56) @ spin.T + [150, 140]
        frame = np.zeros((300, 320, 3), np.uint8)
        for x, y in places:
            cv2.circle(frame, (round(x), round(y)), 6, (255, 255, 255), -1)
        found = aligned_face(frame, Face((0, 0, 1, 1), places))
        assert found.shape == (112, 112, 3)
        for x, y in TEMPLATE:
            assert found[round(y), round(x)].min() > 200
        assert (found[..., 0] > 128).sum() == pytest.approx(5 * np.pi * 3**2, rel=0.25)


class TestMeasure:
    def test_the_same_person(self, model: face_identity._FaceModels) -> None:
        values = FACES.measure(decoded_clip(np.stack([frame_of(SKIN["anna"])] * 6)), model)
        assert str(values.pop("identity_to_image")).startswith("there is no image to compare with")
        assert values == {"faces_found": 1.0, "identity_to_first": pytest.approx(1.0)}

    def test_another_person_in_the_second_half(self, model: face_identity._FaceModels) -> None:
        frames = np.stack([frame_of(SKIN["anna"])] * 5 + [frame_of(SKIN["ben"])] * 5)
        values = FACES.measure(decoded_clip(frames), model)
        expected = (1 + 2 * cosine(SKIN["anna"], SKIN["ben"])) / 3  # frames 0, 3, 6 and 9
        assert values["identity_to_first"] == pytest.approx(expected, abs=1e-5)

    def test_with_the_given_image(self, model: face_identity._FaceModels, tmp_path: Path) -> None:
        Image.fromarray(frame_of(SKIN["ben"])).save(tmp_path / "ben.png")
        clip = decoded_clip(np.stack([frame_of(SKIN["anna"])] * 4), image=tmp_path / "ben.png")
        expected = cosine(SKIN["anna"], SKIN["ben"])
        assert FACES.measure(clip, model)["identity_to_image"] == pytest.approx(expected, abs=1e-5)

    def test_frames_without_a_face_are_counted_and_left_out(self, model: face_identity._FaceModels) -> None:
        frames = np.stack([frame_of(NO_SKIN)] + [frame_of(SKIN["anna"])] * 3)
        values = FACES.measure(decoded_clip(frames), model)
        assert (values["faces_found"], values["identity_to_first"]) == (0.75, pytest.approx(1.0))
        alone = FACES.measure(decoded_clip(np.stack([frame_of(NO_SKIN)] * 3 + [frame_of(SKIN["anna"])])), model)
        assert str(alone["identity_to_first"]) == "only one frame shows a face"

    def test_without_any_face_there_is_no_cosine(self, model: face_identity._FaceModels) -> None:
        values = FACES.measure(decoded_clip(np.stack([frame_of(NO_SKIN)] * 4)), model)
        assert values.pop("faces_found") == 0
        assert {key: str(value) for key, value in values.items()} == dict.fromkeys(
            ("identity_to_first", "identity_to_image"), "no frame shows a face"
        )

    def test_an_image_without_a_face_gives_no_cosine_with_it(
        self, model: face_identity._FaceModels, tmp_path: Path
    ) -> None:
        Image.fromarray(frame_of(NO_SKIN)).save(tmp_path / "wall.png")
        clip = decoded_clip(np.stack([frame_of(SKIN["anna"])] * 4), image=tmp_path / "wall.png")
        values = FACES.measure(clip, model)
        assert (values["faces_found"], values["identity_to_first"]) == (1.0, pytest.approx(1.0))
        assert str(values["identity_to_image"]) == "the image wall.png shows no face"

    def test_an_image_that_cannot_be_read_is_failed(self, model: face_identity._FaceModels, tmp_path: Path) -> None:
        (tmp_path / "ben.png").write_bytes(b"nonsense")
        clip = decoded_clip(np.stack([frame_of(SKIN["anna"])] * 4), image=tmp_path / "ben.png")
        with pytest.raises(MeasurementError, match=r"the image ben.png cannot be read"):
            FACES.measure(clip, model)

    def test_bytes_are_given_as_they_are(self, model: face_identity._FaceModels) -> None:
        given: list[np.ndarray] = []
        inner = model.embed
        model.embed = lambda images: given.append(images) or inner(images)
        for pixels in ("signed", "bytes"):
            model.options.pixels = pixels
            FACES.measure(decoded_clip(np.stack([frame_of((255, 0, 0))] * 2)), model)
        assert [(images.min(), images.max()) for images in given] == [(-1, 1), (0, 255)]
        assert given[1][0, :, 50, 50].tolist() == [255, 0, 0]  # RGB


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"x")

    def lacks(**given: str) -> str:
        return str(FACES.missing(FACES.options(**given)))

    assert lacks().endswith("; face_identity.weights=FILE")
    assert lacks(weights=str(tmp_path / "w.pt")).endswith("; face_identity.face_detector=FILE")


def test_identity_is_of_both_files(tmp_path: Path) -> None:
    for name in "wd":
        (tmp_path / name).write_bytes(name.encode())

    def of(**given: object) -> object:
        return FACES.identity(FACES.options(weights=str(tmp_path / "w"), face_detector=str(tmp_path / "d"), **given))

    first = of()
    assert of(device="cpu") == first != of(frames=3)
    (tmp_path / "d").write_bytes(b"other")
    assert of() != first


def test_one_frame_is_too_few() -> None:
    with pytest.raises(UserError, match=r"face_identity.frames=1 must be 2 or more"):
        FACES.options(frames=1)
