"""FID, FVD, FAD and KID: closed forms, torchmetrics, spread over simulated sets, and networks given as files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from decoded_clip import decoded_clip
from tiny_onnx import write_mean

from eval.clip_file import MeasurementError, NotMeasured
from eval.extractor import load_extractor
from eval.metrics.registry import SetMeasurement, measurements, rate_bound
from eval.set_distance import Distance, difference, frechet, kernel_distance
from magihuman.errors import UserError

FID, FVD, FAD = (measurements()[name] for name in ("fid", "fvd", "fad"))


def sets(
    rng: np.random.Generator, n: int, d: int, k: int = 1, shift: float = 0.0, alike: float = 0.0
) -> list[np.ndarray]:
    """n clips of k vectors; `alike`: deviation of the clips' own means."""
    means = alike * rng.standard_normal((n, 1, d)) + shift
    return list((means + rng.standard_normal((n, k, d))).astype(np.float32))


class TestFrechet:
    def test_of_two_gaussians_is_the_closed_form(self) -> None:
        """Commuting covariances: |m|^2 + sum (s1 - s2)^2. Samples are made to have exactly these moments."""
        rng = np.random.default_rng(0)
        white = rng.standard_normal((50, 3))
        white -= white.mean(0)
        white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
        x, y = white * [1, 2, 3] + [5, 0, 0], white * [2, 2, 1]
        assert frechet(list(x), list(y)).value == pytest.approx(25 + 1 + 0 + 4, rel=1e-9)

    def test_agrees_with_torchmetrics(self) -> None:
        from torchmetrics.image.fid import _compute_fid

        rng = np.random.default_rng(1)
        x, y = sets(rng, 60, 8, k=3), sets(rng, 90, 8, k=2, shift=0.3)
        rows = [torch.from_numpy(np.concatenate(s)).double() for s in (x, y)]
        expected = _compute_fid(rows[0].mean(0), rows[0].T.cov(), rows[1].mean(0), rows[1].T.cov())
        assert frechet(x, y).value == pytest.approx(float(expected), rel=1e-9)

    def test_of_equal_sets_is_zero_and_not_negative(self) -> None:
        x = sets(np.random.default_rng(2), 40, 6)
        assert 0 <= frechet(x, x).value < 1e-9

    def test_is_refused_with_no_more_samples_than_dimensions(self) -> None:
        rng = np.random.default_rng(3)
        measure = frechet(sets(rng, 4, 8, k=2), sets(rng, 40, 8))
        assert (measure.value, measure.status) == (None, "skipped")
        assert measure.reason.startswith("8 and 40 samples of 8 dimensions: ")
        assert frechet(sets(rng, 5, 8, k=2), sets(rng, 40, 8)).status == "ok"

    def test_interval_is_as_wide_as_the_spread_of_repeated_sets(self) -> None:
        """Clips are alike inside, so an interval from frames would be half as wide."""
        rng = np.random.default_rng(4)
        found = [frechet(sets(rng, 100, 4, 4, alike=1), sets(rng, 100, 4, 4, 0.7, alike=1)) for _ in range(100)]
        spread = 2 * 1.96 * np.std([m.value for m in found])
        assert np.mean([m.high - m.low for m in found]) == pytest.approx(spread, rel=0.15)


class TestKernelDistance:
    def test_agrees_with_torchmetrics_for_one_vector_per_clip(self) -> None:
        from torchmetrics.image.kid import poly_mmd

        rng = np.random.default_rng(5)
        x, y = sets(rng, 30, 8), sets(rng, 30, 8, shift=0.5)
        expected = poly_mmd(*(torch.from_numpy(np.concatenate(s)).double() for s in (x, y)))
        assert kernel_distance(x, y).value == pytest.approx(float(expected), rel=1e-9)

    def test_is_without_bias_where_frames_of_a_clip_are_alike(self) -> None:
        rng = np.random.default_rng(6)
        found = [kernel_distance(sets(rng, 12, 4, 6, alike=1), sets(rng, 12, 4, 6, alike=1)) for _ in range(200)]
        values = np.array([m.value for m in found])
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean()) < 3 * error
        # As if frames were clips, the same sets differ: the pairs that are left out are what makes the difference.
        flat = [
            kernel_distance(*(list(np.concatenate(sets(rng, 12, 4, 6, alike=1))) for _ in "xy")) for _ in range(300)
        ]
        assert np.mean([m.value for m in flat]) > 10 * error

    def test_interval_covers_the_true_distance(self) -> None:
        rng = np.random.default_rng(7)
        truth = kernel_distance(sets(rng, 1200, 3), sets(rng, 1200, 3, shift=0.6)).value
        found = [kernel_distance(sets(rng, 60, 3), sets(rng, 60, 3, shift=0.6)) for _ in range(200)]
        assert np.mean([m.low <= truth <= m.high for m in found]) > 0.9

    def test_parts_of_the_kernel_matrix_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rng = np.random.default_rng(8)
        x = [np.float32(rng.standard_normal((k, 5))) for k in (1, 4, 2, 3)]
        y = [np.float32(rng.standard_normal((k, 5))) for k in (3, 1, 5)]
        whole = kernel_distance(x, y)
        monkeypatch.setattr("eval.set_distance._CHUNK", 20)
        assert kernel_distance(x, y).value == pytest.approx(whole.value, rel=1e-12)
        assert kernel_distance(x, y).high == pytest.approx(whole.high, rel=1e-12)

    def test_pairs_of_one_prompt_are_left_out(self) -> None:
        """By the definition: means of kernels over all pairs of clips of two prompts, and the jackknife without each."""
        rng = np.random.default_rng(10)
        x, y = sets(rng, 9, 4), sets(rng, 5, 4, shift=0.5)
        of_x, of_y = list("aaabbccde"), list("abcdd")

        def mean(own: list[np.ndarray], others: list[np.ndarray], a: list[str], b: list[str], without: str) -> float:
            pairs = [
                (float(u[0].astype(float) @ v[0]) / 4 + 1) ** 3
                for u, p in zip(own, a, strict=True)
                for v, q in zip(others, b, strict=True)
                if p != q and without not in (p, q)
            ]
            return float(np.mean(pairs))

        def value(without: str = "") -> float:
            within = mean(x, x, of_x, of_x, without) + mean(y, y, of_y, of_y, without)
            return within - 2 * mean(x, y, of_x, of_y, without)

        found = kernel_distance(x, y, of_x, of_y)
        assert found.value == pytest.approx(value(), rel=1e-6)
        left_out = np.array([value(p) for p in "abcde"])
        error = np.sqrt(4 / 5 * np.square(left_out - left_out.mean()).sum())
        assert found.high - found.value == pytest.approx(3.1824 * error, rel=1e-4)  # t of 4 prompts of the reference
        assert sum(found.influence.values()) == pytest.approx(0, abs=1e-9)

    def test_needs_three_clips(self) -> None:
        x = sets(np.random.default_rng(9), 2, 4, k=9)
        assert (kernel_distance(x, x).value, kernel_distance(x, x).status) == (None, "skipped")
        x = sets(np.random.default_rng(9), 6, 4)
        assert kernel_distance(x, x, list("aaabbb"), list("aaabbb")).reason.startswith("2 and 2 prompts; 3 on each")


def of_prompts(
    rng: np.random.Generator, prompts: int, per: int, d: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], list[str], list[str]]:
    """Clips of two systems and reference clips, of 2 frames, all alike within a prompt; names of their prompts."""
    prompt, own, other = (rng.standard_normal((prompts, 1, 1, d)) for _ in range(3))

    def clips(mean: np.ndarray, count: int) -> list[np.ndarray]:
        noise = 0.6 * rng.standard_normal((prompts, count, 1, d)) + 0.5 * rng.standard_normal((prompts, count, 2, d))
        return list((mean + noise).reshape(prompts * count, 2, d))

    names = [str(number) for number in range(prompts)]
    made, base = clips(prompt + 0.5 * own + 0.3, per), clips(0.9 * (prompt + 0.5 * other) + 0.45, per)
    return made, base, clips(prompt, 1), [name for name in names for _ in range(per)], names


class TestGroups:
    def test_copies_of_every_clip_leave_the_interval(self) -> None:
        """Four equal clips of a prompt are one observation; as clips of their own they would halve the interval."""
        rng = np.random.default_rng(11)
        x, y = sets(rng, 30, 3), sets(rng, 30, 3, shift=0.4)
        names = [str(n) for n in range(30)]
        for distance in (frechet, kernel_distance):
            one = distance(x, y, names, names)
            four = distance([clip for clip in x for _ in range(4)], y, [n for n in names for _ in range(4)], names)
            assert four.high - four.low == pytest.approx(one.high - one.low, rel=0.05)

    def test_of_one_prompt_has_no_interval(self) -> None:
        x = sets(np.random.default_rng(12), 10, 3)
        found = frechet(x, x, ["a"] * 10, ["a"] * 10)
        assert (found.low, found.high) == (None, None)
        assert found.value is not None

    def test_difference_of_equal_sets_is_certain_and_of_other_groups_an_error(self) -> None:
        one = {"a": 0.25, "b": -0.5, "c": 0.25}
        assert difference(one, one) == (0, 0)
        error, half = difference({"a": 1.0, "b": -1.0}, {"a": 0.0, "b": 0.0})
        assert error == pytest.approx(2)  # sqrt(2 / 1 x (1 + 1))
        assert half == pytest.approx(2 * 12.7062, rel=1e-4)
        with pytest.raises(ValueError, match="no common error"):
            difference(one, {"a": 0.0, "b": 0.0})

    @pytest.mark.slow
    @pytest.mark.parametrize(("prompts", "per"), [(10, 4), (40, 4), (100, 1)])
    def test_intervals_cover(self, prompts: int, per: int) -> None:
        """Clips, references and two systems share prompts: at nominal 95 %, at least 92 % of intervals cover, but for chance.

        The truth is the mean over the repetitions: of the Fréchet distance at this number of samples, with its bias.
        """
        rng = np.random.default_rng(13)
        runs = 300
        for distance, d in ((frechet, 4), (kernel_distance, 32)):
            found: list[tuple[Distance, float, float]] = []
            for _ in range(runs):
                made, base, real, groups, names = of_prompts(rng, prompts, per, d)
                own, other = distance(made, real, groups, names), distance(base, real, groups, names)
                found.append((own, own.value - other.value, difference(own.influence, other.influence)[1]))
            values, changes = np.array([own.value for own, _, _ in found]), np.array([change for _, change, _ in found])
            covered = np.mean([own.low <= values.mean() <= own.high for own, _, _ in found])
            differing = np.mean([abs(change - changes.mean()) <= half for _, change, half in found])
            assert min(covered, differing) > 0.92 - 2 * np.sqrt(0.92 * 0.08 / runs), (distance, covered, differing)


class Mean(torch.nn.Module):
    """Means over all but batch and channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).mean(2)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("networks")
    torch.jit.script(Mean()).save(str(folder / "mean.pt"))
    write_mean(folder / "images.onnx", ["b", 3, "h", "w"], [2, 3], ["b", 3])
    write_mean(folder / "single.onnx", [1, 3, "h", "w"], [2, 3], [1, 3])
    write_mean(folder / "wave.onnx", ["b", "n"], [1], ["b"])
    (folder / "broken.onnx").write_bytes(b"nonsense")
    (folder / "broken.pt").write_bytes(b"nonsense")
    return {file.name: str(file) for file in folder.iterdir()}


class TestExtractors:
    @pytest.mark.parametrize("name", ["mean.pt", "images.onnx", "single.onnx"])
    def test_formats_agree(self, networks: dict[str, str], name: str) -> None:
        pytest.importorskip("onnxruntime")
        images = np.random.default_rng(0).random((3, 3, 4, 5), dtype=np.float32)
        found = load_extractor(Path(networks[name]), "cpu")(images)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, images.mean((2, 3)), rtol=1e-5)

    @pytest.mark.parametrize("name", ["broken.pt", "broken.onnx"])
    def test_damaged_files_are_one_line(self, networks: dict[str, str], name: str) -> None:
        pytest.importorskip("onnxruntime")
        with pytest.raises(UserError, match=f"{name} is no readable ONNX") as error:
            load_extractor(Path(networks[name]), "cpu")
        assert "\n" not in str(error.value)
        assert "internal miniz error" not in str(error.value)  # torch's guesses, cut off in a word

    @pytest.mark.parametrize("name", ["mean.pt", "images.onnx"])
    def test_wrong_input_is_one_line(self, networks: dict[str, str], name: str) -> None:
        pytest.importorskip("onnxruntime")
        with pytest.raises(MeasurementError, match=rf"{name} refuses an input \[2\]") as error:
            load_extractor(Path(networks[name]), "cpu")(np.zeros(2, np.float32))
        assert "\n" not in str(error.value)

    def test_want_of_memory_is_no_property_of_the_clip(self, networks: dict[str, str]) -> None:
        """A `MeasurementError` would be kept in the cache; anything else is tried again."""

        class Greedy(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.zeros(1 << 45)

        path = Path(networks["mean.pt"]).with_name("greedy.pt")
        torch.jit.script(Greedy()).save(str(path))
        with pytest.raises(MemoryError, match=r"greedy\.pt"):
            load_extractor(path, "cpu")(np.zeros((1, 3), np.float32))

    def test_nan_is_an_error(self, networks: dict[str, str]) -> None:
        with pytest.raises(MeasurementError, match=r"mean.pt gives NaN or infinity"):
            load_extractor(Path(networks["mean.pt"]), "cpu")(np.full((1, 3, 2, 2), np.nan))


def loaded(measurement: SetMeasurement, **options: object) -> object:
    return measurement.load(measurement.options(device="cpu", **options))


class TestFeatures:
    def test_frames_are_evenly_spaced_and_in_0_to_1(self, networks: dict[str, str]) -> None:
        frames = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.full((1, 6, 8, 3), [10, 20, 30], np.uint8)
        found = FID.features(decoded_clip(frames), loaded(FID, extractor=networks["mean.pt"], frames=3, size=4))
        np.testing.assert_allclose(found, np.outer([0, 4, 8], [10, 20, 30]) / 255, atol=1e-6)

    def test_a_clip_with_fewer_frames_gives_all_of_them(self, networks: dict[str, str]) -> None:
        found = FID.features(
            decoded_clip(np.zeros((2, 4, 4, 3), np.uint8)), loaded(FID, extractor=networks["mean.pt"], size=4)
        )
        assert found.shape == (2, 3)

    def test_windows_of_a_video(self, networks: dict[str, str]) -> None:
        frames = np.repeat(np.arange(10, dtype=np.uint8)[:, None, None, None], 3, 3) * np.ones((1, 4, 4, 1), np.uint8)
        model = loaded(FVD, extractor=networks["mean.pt"], window=4, size=4)
        np.testing.assert_allclose(
            FVD.features(decoded_clip(frames), model)[:, 0], np.array([1.5, 5.5]) / 255, atol=1e-6
        )
        with pytest.raises(NotMeasured, match=r"it has 3 frames, and fvd.window=4"):
            FVD.features(decoded_clip(frames[:3]), model)

    def test_windows_of_audio(self, networks: dict[str, str]) -> None:
        pytest.importorskip("onnxruntime")
        wave = np.repeat(np.float32([0.1, 0.2, 0.3]), [16000, 16000, 8000])
        model = loaded(FAD, extractor=networks["wave.onnx"])
        np.testing.assert_allclose(FAD.features(decoded_clip(wave=wave), model), [[0.1], [0.2]], rtol=1e-4)
        short = FAD.features(decoded_clip(wave=wave[:4000]), model)
        np.testing.assert_allclose(short, [[0.025]], rtol=1e-5)

    def test_without_a_network_it_is_unavailable(self) -> None:
        assert str(FID.missing(FID.options())).endswith("; fid.extractor=FILE")

    def test_identity_holds_what_values_depend_on(self, networks: dict[str, str], tmp_path: Path) -> None:
        other = tmp_path / "mean.pt"
        other.write_bytes(Path(networks["mean.pt"]).read_bytes())
        identities = [
            FID.identity(FID.options(extractor=networks["mean.pt"])),
            FID.identity(FID.options(extractor=str(other), device="cpu")),
            FID.identity(FID.options(extractor=str(other), frames=4)),
        ]
        assert identities[0] == identities[1] != identities[2]
        other.write_bytes(other.read_bytes() + b"x")
        assert FID.identity(FID.options(extractor=str(other))) != identities[0]

    def test_values_are_measures_by_key(self) -> None:
        rng = np.random.default_rng(0)
        found = FVD.compare(sets(rng, 20, 4), sets(rng, 20, 4), *[[str(n) for n in range(20)]] * 2)
        assert {key: m.status for key, m in found.items()} == {"fvd": "ok", "kvd": "ok"}
        assert {metric.key for metric in FVD.metrics} == set(found)


def test_videos_read_at_a_set_rate_do_not_depend_on_the_files() -> None:
    own, fixed = (rate_bound({"fvd": {"identity": {"fps": fps}}}) for fps in (None, 8.0))
    assert {"fvd", "kvd", "warping_error"} <= own
    assert own - fixed == {"fvd", "kvd"}
    assert "fid" not in own


@pytest.mark.parametrize(
    ("measurement", "wrong"),
    [(FID, {"frames": 0}), (FID, {"size": 0}), (FVD, {"window": 0}), (FVD, {"fps": 0.0}), (FAD, {"seconds": -1.0})],
)
def test_impossible_settings_are_one_line(measurement: SetMeasurement, wrong: dict[str, float]) -> None:
    ((setting, value),) = wrong.items()
    with pytest.raises(
        UserError, match=rf"^{measurement.name}.{setting}={value} is impossible; give a positive number"
    ):
        measurement.options(**wrong)
