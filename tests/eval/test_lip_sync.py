"""Lip sync by SyncNet: MFCC against python_speech_features, closed forms of LSE-D and LSE-C, the network's layout, faces."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from decoded_clip import decoded_clip

from eval.clip_file import MeasurementError, NotMeasured
from eval.faces import Face, longest_track, overlap
from eval.metrics import lip_sync
from eval.metrics.registry import measurements
from eval.mfcc import mfcc
from eval.syncnet import SyncNet, load_syncnet, sync_scores
from magihuman.errors import UserError

LIP_SYNC = measurements()["lip_sync"]
BASELINE = json.loads((Path(__file__).parent / "mfcc_baseline.json").read_text())


class TestMfcc:
    """The baseline holds values of python_speech_features 0.6 for 16-bit samples."""

    @pytest.fixture(scope="class")
    def chirp(self) -> np.ndarray:
        n = np.arange(2000)
        return np.round(6000 * np.sin(2 * np.pi * (200 + 0.4 * n) * n / 16000) + 900 * np.sin(n * n * 0.37)) / 32768

    def test_is_that_of_python_speech_features(self, chirp: np.ndarray) -> None:
        np.testing.assert_allclose(mfcc(chirp), BASELINE["chirp"], atol=2e-6)

    def test_silence_has_finite_values(self, chirp: np.ndarray) -> None:
        found = mfcc(np.concatenate([np.zeros(500), chirp[:300]]))
        np.testing.assert_allclose(found, BASELINE["silence_first"], atol=2e-6)

    def test_has_one_hundred_rows_per_second(self) -> None:
        assert [len(mfcc(np.ones(n))) for n in (1, 400, 401, 560, 561, 16000)] == [1, 1, 2, 2, 3, 99]


class TestScores:
    """Orthonormal embeddings: 0 apart where they match, sqrt(2) where not, 1 from the zeros beyond the ends."""

    def expected(self, n: int, delay: int, most: int = 15) -> tuple[float, float]:
        def mean(shift: int) -> float:
            beyond = abs(shift)
            matching = n - beyond if shift == delay else 0
            return (beyond + (n - beyond - matching) * 2**0.5) / n

        means = [mean(shift) for shift in range(-most, most + 1)]
        return min(means), float(np.median(means)) - min(means)

    @pytest.mark.parametrize("delay", [0, 1, 5, -3, 15])
    def test_of_planted_embeddings(self, delay: int) -> None:
        n = 60
        lips = torch.eye(n + 30)[15 : 15 + n]
        speech = torch.eye(n + 30)[15 - delay : 15 - delay + n]
        distance, confidence = self.expected(n, delay)
        scores = sync_scores(lips, speech)
        assert scores.offset == -delay
        assert scores.distance == pytest.approx(distance, abs=1e-4)
        assert scores.confidence == pytest.approx(confidence, abs=1e-4)

    def test_of_unrelated_embeddings_has_no_lead(self) -> None:
        generator = torch.Generator().manual_seed(0)
        lips, speech = torch.randn(2, 100, 512, generator=generator)
        matched, other = sync_scores(lips, lips), sync_scores(lips, speech)
        assert matched.distance < 1e-3
        # The ends that are filled with zeros give offsets far from 0 a lead of their own, as in syncnet_python.
        assert other.confidence < 0.1 * matched.confidence


@pytest.fixture(scope="module")
def network() -> SyncNet:
    torch.manual_seed(0)
    made = SyncNet().eval()
    for module in made.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    return made


@pytest.fixture(scope="module")
def weights(network: SyncNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "syncnet_v2.model"
    torch.save({k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}, path)
    return path


class TestNetwork:
    def test_tensors_are_named_and_shaped_as_published(self, network: SyncNet) -> None:
        shapes = {name: tuple(value.shape) for name, value in network.state_dict().items() if value.ndim > 1}
        assert shapes == {
            "netcnnaud.0.weight": (64, 1, 3, 3), "netcnnaud.4.weight": (192, 64, 3, 3),
            "netcnnaud.8.weight": (384, 192, 3, 3), "netcnnaud.11.weight": (256, 384, 3, 3),
            "netcnnaud.14.weight": (256, 256, 3, 3), "netcnnaud.18.weight": (512, 256, 5, 4),
            "netfcaud.0.weight": (512, 512), "netfcaud.3.weight": (1024, 512),
            "netfclip.0.weight": (512, 512), "netfclip.3.weight": (1024, 512),
            "netcnnlip.0.weight": (96, 3, 5, 7, 7), "netcnnlip.4.weight": (256, 96, 1, 5, 5),
            "netcnnlip.8.weight": (256, 256, 1, 3, 3), "netcnnlip.11.weight": (256, 256, 1, 3, 3),
            "netcnnlip.14.weight": (256, 256, 1, 3, 3), "netcnnlip.18.weight": (512, 256, 1, 6, 6),
        }  # fmt: skip

    def test_windows_of_lips_equal_windows_alone(self, network: SyncNet, monkeypatch: pytest.MonkeyPatch) -> None:
        crops = np.random.default_rng(0).integers(0, 256, (8, 224, 224, 3), dtype=np.uint8)
        monkeypatch.setattr("eval.syncnet._CHUNK", 3)
        found = network.of_lips(crops)
        assert found.shape == (4, 1024)
        for window in (0, 3):
            images = crops[window : window + 5, ..., ::-1].copy()  # BGR
            video = torch.from_numpy(images).permute(3, 0, 1, 2)[None].float()
            with torch.inference_mode():
                alone = network.netfclip(network.netcnnlip(video).flatten(1))
            torch.testing.assert_close(found[window], alone[0], rtol=1e-4, atol=1e-4)

    def test_windows_of_speech_start_a_frame_apart(self, network: SyncNet) -> None:
        rows = np.random.default_rng(0).standard_normal((31, 13))
        found = network.of_speech(rows)
        assert found.shape == (3, 1024)
        with torch.inference_mode():
            second = torch.from_numpy(rows[4:24].T.copy()).float()[None, None]
            alone = network.netfcaud(network.netcnnaud(second).flatten(1))
        torch.testing.assert_close(found[1], alone[0], rtol=1e-4, atol=1e-5)

    def test_weights_are_read(self, network: SyncNet, weights: Path) -> None:
        loaded = load_syncnet(weights, "cpu")
        assert not loaded.training
        assert torch.equal(loaded.netcnnlip[18].weight, network.netcnnlip[18].weight)

    def test_other_files_are_refused_by_name(self, weights: Path, tmp_path: Path) -> None:
        state = torch.load(weights, weights_only=True)
        state["netfclip.3.weight"] = state["netfclip.3.weight"][:512]
        torch.save(state, tmp_path / "short.model")
        with pytest.raises(UserError, match=r"no SyncNet: netfclip.3.weight is \(512, 512\), wanted \(1024, 512\)"):
            load_syncnet(tmp_path / "short.model")
        torch.save({"a": torch.zeros(1)}, tmp_path / "other.model")
        with pytest.raises(UserError, match=r"netcnnaud.0.weight is missing, wanted \(64, 1, 3, 3\)"):
            load_syncnet(tmp_path / "other.model")
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "training.model")
        with pytest.raises(UserError, match=r"netcnnaud.0.weight is missing"):
            load_syncnet(tmp_path / "training.model")

    def test_nothing_in_a_file_is_executed(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple[object, ...]:
                return Path.touch, (tmp_path / "executed",)

        torch.save({"a": Trap()}, tmp_path / "trap.model")
        with pytest.raises(UserError, match=r"trap.model is no PyTorch file of tensors"):
            load_syncnet(tmp_path / "trap.model")
        assert not (tmp_path / "executed").exists()

    def test_a_text_is_refused_in_a_line_of_our_own(self, tmp_path: Path) -> None:
        """Torch's text is a page on how to load the file unsafely."""
        (tmp_path / "notes.md").write_text("# Notes\n\nsome words\n")
        whole = r"^\S+notes\.md is no PyTorch file of tensors; give syncnet_v2\.model of github\.com/joonson/syncnet_python$"
        with pytest.raises(UserError, match=whole):
            load_syncnet(tmp_path / "notes.md")


def face(left: float, top: float = 50.0, size: float = 40.0) -> Face:
    return Face((left, top, size, size), np.zeros((5, 2)))


class TestTracks:
    def test_overlap(self) -> None:
        assert overlap(face(0), face(0)) == 1
        assert overlap(face(0), face(20)) == pytest.approx(1 / 3)
        assert overlap(face(0), face(41)) == 0

    def test_the_face_that_is_seen_longest(self) -> None:
        """One person from frame 2 on, unseen in frames 4 and 5; another, larger, in three frames."""
        own = {number: face(100 + 2 * number) for number in (2, 3, 6, 7, 8)}
        other = {number: face(10, 0, 80) for number in (0, 1, 2)}
        found = [[f[n] for f in (other, own) if n in f] for n in range(9)]
        start, boxes = longest_track(found)
        assert start == 2
        np.testing.assert_allclose(boxes[:, 0], 100 + 2 * np.arange(2, 9))

    def test_two_faces_never_share_a_track(self) -> None:
        _, boxes = longest_track([[face(0), face(5)], [face(0), face(5)]])
        assert len(boxes) == 2

    def test_a_second_unseen_ends_a_track(self) -> None:
        assert len(longest_track([[face(0)]] + [[]] * 25 + [[face(0)]])[1]) == 1
        assert len(longest_track([[face(0)]] + [[]] * 24 + [[face(0)]])[1]) == 26

    def test_no_face(self) -> None:
        assert longest_track([[], []])[1].shape == (0, 4)


class TestCrops:
    def test_is_the_square_of_the_reference(self) -> None:
        """Box of 100 with its middle at (160, 120): x from 90 to 230, y from 70 to 210."""
        frame = np.zeros((240, 320, 3), np.uint8)
        frame[70:210, 90:230] = 255
        crops = lip_sync.face_crops(frame[None], np.array([[110.0, 70.0, 100.0, 100.0]]))
        assert crops.shape == (1, 224, 224, 3)
        assert crops.min() == 255
        wider = lip_sync.face_crops(frame[None], np.array([[109.0, 70.0, 102.0, 100.0]]))
        assert wider.min() == 0

    def test_beside_the_frame_it_is_grey(self) -> None:
        crops = lip_sync.face_crops(np.full((1, 60, 60, 3), 255, np.uint8), np.array([[0.0, 0.0, 60.0, 60.0]]))
        assert set(np.unique(crops[0, 112])) >= {110, 255}

    def test_single_jumps_of_the_box_are_left_out(self) -> None:
        boxes = np.tile([110.0, 70.0, 100.0, 100.0], (15, 1))
        boxes[7] += 60
        frames = np.random.default_rng(0).integers(0, 255, (1, 240, 320, 3), dtype=np.uint8).repeat(15, 0)
        crops = lip_sync.face_crops(frames, boxes)
        assert (crops == crops[0]).all()

    def test_fixed_parts(self) -> None:
        frames = np.zeros((2, 100, 300, 3), np.uint8)
        frames[:, :, 100:200] = 255
        assert lip_sync.fixed_crop(frames, "centre").min() == 255
        assert lip_sync.fixed_crop(frames, "120,10,50,50").min() == 255
        assert lip_sync.fixed_crop(frames, "90,10,50,50").min() == 0
        with pytest.raises(MeasurementError, match=r"crop=280,0,50,50 is not inside the frame of 300x100"):
            lip_sync.fixed_crop(frames, "280,0,50,50")


def talking(frames: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, 64, 64, 3), dtype=np.uint8)


def sound(seconds: float = 1.2) -> np.ndarray:
    return np.float32(0.1 * np.random.default_rng(1).standard_normal(round(16000 * seconds)))


class TestMeasure:
    @pytest.fixture
    def planted(self, network: SyncNet, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
        """A network whose embeddings are planted: frame i and its speech are alike; `late` is the sound's delay in frames."""
        state = {"late": 0}
        monkeypatch.setattr(network, "of_lips", lambda crops: torch.eye(80)[20 : 20 + len(crops) - 4])
        monkeypatch.setattr(
            network, "of_speech", lambda rows: torch.eye(80)[20 - state["late"] :][: (len(rows) - 20) // 4 + 1]
        )
        return state

    @pytest.mark.parametrize("late", [0, 2, -3])
    def test_offset_is_in_milliseconds_and_negative_for_late_sound(
        self, network: SyncNet, planted: dict[str, int], late: int
    ) -> None:
        planted["late"] = late
        model = lip_sync._LipSync(network, None, "centre")
        values = LIP_SYNC.measure(decoded_clip(talking(), sound()), model)
        assert values["lip_sync_offset"] == -40 * late
        assert set(values) == {metric.key for metric in LIP_SYNC.metrics}
        assert values["lse_d"] == pytest.approx(abs(late) / 25, abs=1e-4)  # 25 windows; beyond the ends are zeros

    def test_at_the_end_of_the_search_there_is_no_offset(self, network: SyncNet, planted: dict[str, int]) -> None:
        planted["late"] = 15
        model = lip_sync._LipSync(network, None, "centre")
        values = LIP_SYNC.measure(decoded_clip(talking(), sound()), model)
        assert str(values["lip_sync_offset"]) == "the best offset is the end of the search"

    def test_the_real_network_runs_on_a_face_that_is_found_later(self, weights: Path) -> None:
        model = LIP_SYNC.load(LIP_SYNC.options(weights=str(weights), crop="centre", device="cpu"))
        model.network.of_lips, inner = (
            (lambda crops: (seen.append(len(crops)), inner(crops[:6]))[1]),
            model.network.of_lips,
        )
        seen: list[int] = []
        found = iter([[]] * 4 + [[face(10, 10)]] * 26)
        model.find = lambda frame: next(found)
        values = LIP_SYNC.measure(decoded_clip(talking(), sound()), model)
        assert seen == [25]  # 26 frames of the track, one less window than there are
        assert np.isfinite([values["lse_d"], values["lse_c"]]).all()

    @pytest.mark.parametrize(
        ("frames", "wave", "reason"),
        [
            (talking(), np.zeros(19200, np.float32), "the audio is silent"),
            (talking()[:1].repeat(30, 0), sound(), "the face does not move"),
            (talking(5), sound(0.2), "5 frames with sound are too few for windows of 5"),
        ],
    )
    def test_what_does_not_apply_is_skipped(
        self, network: SyncNet, frames: np.ndarray, wave: np.ndarray, reason: str
    ) -> None:
        with pytest.raises(NotMeasured, match=reason):
            LIP_SYNC.measure(decoded_clip(frames, wave), lip_sync._LipSync(network, None, "centre"))

    def test_without_a_face_it_is_skipped(self, network: SyncNet) -> None:
        with pytest.raises(NotMeasured, match="no face is seen for 25 frames; the longest for 0"):
            LIP_SYNC.measure(decoded_clip(talking(), sound()), lip_sync._LipSync(network, lambda frame: [], None))


class TestOptions:
    def test_what_is_missing_is_named(self, weights: Path, tmp_path: Path) -> None:
        pytest.importorskip("cv2")

        def lacks(**given: str) -> str:
            return str(LIP_SYNC.missing(LIP_SYNC.options(**given)))

        assert lacks().endswith("; lip_sync.weights=FILE")
        assert (
            lacks(weights=str(weights))
            == "no way to find the face; lip_sync.face_detector=FILE, or lip_sync.crop=centre"
        )
        assert lacks(weights=str(weights), crop="centre") == "None"
        assert "yunet.onnx is no file" in lacks(weights=str(weights), face_detector=str(tmp_path / "yunet.onnx"))

    @pytest.mark.parametrize("crop", ["center", "1,2,3", "1,2,0,4", "-1,0,5,5"])
    def test_wrong_crops_are_one_line(self, crop: str) -> None:
        with pytest.raises(UserError, match=rf"lip_sync.crop={crop} must be centre or"):
            LIP_SYNC.options(crop=crop)

    def test_crop_and_detector_exclude_each_other(self) -> None:
        with pytest.raises(UserError, match="exclude each other"):
            LIP_SYNC.options(crop="centre", face_detector="a.onnx")

    def test_identity_is_of_files_and_crop(self, weights: Path) -> None:
        centre = LIP_SYNC.identity(LIP_SYNC.options(weights=str(weights), crop="centre", device="cpu"))
        assert centre["weights"].startswith("sha256 ")
        assert centre != LIP_SYNC.identity(LIP_SYNC.options(weights=str(weights), crop="0,0,9,9"))

    def test_a_broken_detector_is_one_line(self, tmp_path: Path) -> None:
        pytest.importorskip("cv2")
        from eval.faces import face_detector

        (tmp_path / "broken.onnx").write_bytes(b"nonsense")
        with pytest.raises(UserError, match=r"broken.onnx is no face detector that OpenCV") as error:
            face_detector(tmp_path / "broken.onnx")
        assert "\n" not in str(error.value)
