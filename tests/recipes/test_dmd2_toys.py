"""DMD-2 end to end on points with a known distribution, in the recipe's own loop; each test states the measured values."""

from pathlib import Path

import pytest
import torch
import toy_dmd2
from torch import Tensor
from toy_dmd2 import PRIOR, Field, Net, PointDMD2
from toy_mixture import Figures, Mixture, compare, ring

from magihuman.distill.fake_score_settings import FakeScoreSettings
from magihuman.flow.sigmas import ScoreLevels, SigmaPrior

RING = ring()
COUNT = 4000


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small products are slower with more
    yield
    torch.set_num_threads(threads)


def recipe(
    folder: Path, start: Net, field: Field, cycles: int, seed: int, *, shift: float, rates: tuple[float, float],
    sound: int = 0, steps: int = 4, first_steps: tuple[int, int] = (0, 0),
) -> PointDMD2:  # fmt: skip
    """The recipe with re-noising steps; `shift` of the levels of comparison; learning rates and first steps are of student
    and fake score."""
    context = toy_dmd2.make_context(folder, steps=cycles, seed=seed, lr=rates[0], ema_decay=0.95)
    fake_score = FakeScoreSettings(lr=rates[1], updates=5, warmup=10, first_step=first_steps[1])
    return PointDMD2(
        context, start, field, sound, steps=steps, first_step=first_steps[0], score=ScoreLevels(shift), fake_score=fake_score
    )  # fmt: skip


def figures(made: PointDMD2, role: str) -> Figures:
    return compare(made.points(role, COUNT), RING)


@pytest.fixture(scope="module")
def told() -> Net:
    """Knows the level; fitted to the ring, but not well."""
    return toy_dmd2.pretrained(RING.velocity, RING, blind=False, updates=800)


@pytest.fixture(scope="module")
def blind() -> Net:
    return toy_dmd2.pretrained(_blind, RING, blind=True, updates=800)


def _blind(x: Tensor, _sigma: Tensor) -> Tensor:
    return RING.blind_velocity(x, PRIOR)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_networks_that_know_the_level_learn_the_ring(told: Net, tmp_path: Path, seed: int) -> None:
    """Measured: distance .62 before, .14, .18, .19 after; 8 modes; imbalance up to .03; outliers up to .06."""
    made = recipe(tmp_path, told, RING.velocity, 150, seed, shift=2.0, rates=(1e-3, 2e-3))
    made.configure_model()
    before = figures(made, "student")
    made.run(150, 32)
    after = figures(made, "average")
    assert before.distance > 0.5
    assert before.modes < 8
    # Of every seed: 0.30 is also the gate of the two time scales, for the worst.
    assert after.distance <= min(0.30, 0.5 * before.distance), after
    assert after.modes == 8, after
    assert max(after.imbalance, after.outliers) <= 0.10, after


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_networks_that_are_not_told_learn_it_too(blind: Net, tmp_path: Path, seed: int) -> None:
    """Measured: distance .84 before, .29 and .28 after; 8 modes; outliers .13 and .14."""
    made = recipe(tmp_path, blind, _blind, 350, seed, shift=3.0, rates=(1e-3, 4e-3))
    made.configure_model()
    before = figures(made, "student")
    made.run(350, 24)
    after = figures(made, "average")
    assert after.distance <= min(0.35, 0.5 * before.distance), after
    assert after.modes >= 7, after
    assert after.outliers <= 0.20, after


def test_a_blind_fake_score_with_another_prior_teaches_nothing(blind: Net, tmp_path: Path) -> None:
    """The control: the fake score learns at other levels. Measured: .77 of .84, where these settings lead to .31 under the
    teacher's prior; .77 with the settings above, too."""
    made = recipe(tmp_path, blind, _blind, 150, 0, shift=2.0, rates=(2e-3, 4e-3))
    made.sigma = SigmaPrior(shift=1.0)
    made.configure_model()
    before = figures(made, "student")
    made.run(150, 32)
    after = figures(made, "average")
    assert after.distance >= 0.8 * before.distance, after
    assert after.modes <= 4, after


# A guided teacher: most of its mass is on four of the modes, all of which the student begins with.

GUIDED = Mixture(RING.means, torch.tensor([0.02] * 4 + [0.23] * 4), RING.deviations)


def wanted(points: Tensor) -> float:
    """Share of points at the guided teacher's modes; its own is .92."""
    return float((torch.cdist(points, GUIDED.means).argmin(1) >= 4).float().mean())


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_fake_score_on_final_samples_leads_to_a_guided_teacher(told: Net, tmp_path: Path, seed: int) -> None:
    """The student is trained on all of 8 steps, the fake score on data estimates of all of them or of the last. Measured, seeds
    0 and 1: distance .45 before; .39 and .41 after with all, .15 and .14 with the last; share at the wanted modes .73, .80 and
    .79, .89 and .88."""
    found = {}
    for first in (0, 7):
        made = recipe(
            tmp_path, told, GUIDED.velocity, 80, seed, shift=2.0, rates=(5e-4, 2e-3), steps=8, first_steps=(0, first)
        )  # fmt: skip
        made.configure_model()
        for name, role in (("before", "student"), (f"from {first}", "average")):
            if name != "before":
                made.run(80, 32)
            points = made.points(role, COUNT)
            found[name] = compare(points, GUIDED).distance, wanted(points)
    assert found["before"][0] > 0.4
    assert found["from 0"][0] >= 0.75 * found["before"][0], found
    assert found["from 7"][0] <= 0.5 * found["from 0"][0], found
    assert abs(found["from 7"][1] - 0.92) <= 0.06 < 0.09 <= abs(found["from 0"][1] - 0.92), found


# A point's sound is decided by its mode.


def _paired() -> Mixture:
    """Four modes of two numbers of video with two of audio, which take another order around their circle."""
    angle = torch.arange(4) * (torch.pi / 2)
    circle = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    means = torch.cat([circle, circle[[0, 2, 1, 3]]], 1)
    return Mixture(means, torch.tensor([1, 1, 2, 2]) / 6, torch.full((4,), 0.3))


PAIRED = _paired()
VIDEO, AUDIO = (
    Mixture(PAIRED.means[:, part], PAIRED.weights, PAIRED.deviations[part]) for part in (slice(2), slice(2, 4))
)


def _apart(x: Tensor, sigma: Tensor) -> Tensor:
    """Velocity of videos and sounds that know nothing of each other."""
    return torch.cat([VIDEO.velocity(x[:, :2], sigma), AUDIO.velocity(x[:, 2:], sigma)], 1)


def agreement(points: Tensor) -> float:
    """Share of points whose sound is of the video's mode."""
    video, audio = torch.cdist(points[:, :2], VIDEO.means), torch.cdist(points[:, 2:], AUDIO.means)
    return float((video.argmin(1) == audio.argmin(1)).float().mean())


@pytest.mark.slow
def test_a_joint_fake_score_keeps_sound_and_picture_together(tmp_path: Path) -> None:
    """Measured: agreement .88 before and .96 after; .65 where teacher and fake score see one modality each."""
    start = toy_dmd2.pretrained(PAIRED.velocity, PAIRED, blind=False, updates=800)
    found = {}
    for name, field in (("together", PAIRED.velocity), ("apart", _apart)):
        made = recipe(tmp_path, start, field, 200, 0, shift=2.0, rates=(2e-3, 4e-3), sound=2)
        made.configure_model()
        found["before"] = agreement(made.points("student", COUNT))
        made.run(200, 24)
        found[name] = agreement(made.points("average", COUNT))
    real, _ = PAIRED.draw(COUNT, torch.Generator().manual_seed(0))
    assert agreement(real) >= 0.98
    assert found["together"] >= max(0.95, found["before"] + 0.05), found
    assert found["apart"] <= found["before"] - 0.1, found
