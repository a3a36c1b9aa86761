"""The two objectives of DMD-2 against closed forms: divergence, fixed point, half precision, modalities, guidance."""

import json
from pathlib import Path

import pytest
import torch
import toy_dmd2
from torch import Tensor, nn
from toy_mixture import Mixture, gaussian, ring

from inference.sampling import sample
from magihuman.distill.discriminator import Discriminator, GanSettings
from magihuman.distill.fake_score_settings import FakeScoreSettings, first_steps
from magihuman.distill.objective import fake_score_loss, matching_gradient, surrogate_loss
from magihuman.distill.rollout import MicroBatch, Rollout
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance, combine
from magihuman.flow.path import add_noise, velocity_target, x0_from_velocity
from magihuman.flow.sampling import Conditioning, Pair, seeded
from magihuman.flow.sigmas import ScoreLevels, SigmaPrior, sigma_grid
from magihuman.io.export import ExportConfig
from magihuman.training.motion import motion_weight

EVERYWHERE = torch.ones(1, 1)


def unnormalised(x0: Tensor, noisy: Tensor, real: Tensor, fake: Tensor, sigma: Tensor) -> Tensor:
    """The matching gradient with its normaliser multiplied out again."""
    gradient, finite = matching_gradient(x0, noisy, real, fake, sigma, EVERYWHERE)
    assert finite.all()
    return gradient * (x0 - x0_from_velocity(noisy, real, sigma)).abs().mean(1, keepdim=True)


# An affine student of a Gaussian. The gradient is that of an integral of Kullback-Leibler divergences.


def gaussian_velocity(mean: Tensor, covariance: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
    """E[eps - x0 | y, s] for x0 ~ N(mean, covariance); y [B,D], s [B]."""
    eye, s = torch.eye(len(mean)), sigma[:, None, None]
    whole = (1 - s) ** 2 * covariance + s**2 * eye  # [B,D,D]
    offset = torch.linalg.solve(whole, (y - (1 - sigma[:, None]) * mean)[..., None])
    return ((s * eye - (1 - s) * covariance) @ offset)[..., 0] - mean


def divergence(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """KL(N || other N), [N]."""
    inverse, offset = torch.linalg.inv(other_covariance), mean - other_mean
    trace = (inverse @ covariance).diagonal(dim1=-2, dim2=-1).sum(-1)
    square = (offset[:, None] @ inverse @ offset[..., None])[:, 0, 0]
    return 0.5 * (trace + square + torch.logdet(other_covariance) - torch.logdet(covariance) - mean.shape[1])


def expected_gradient(matrix: Tensor, shift: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """d/d(A, b) of the mean over s of s^2 / (1 - s)^2 KL(p_student at s || p_data at s), divided by D."""
    sigma = ScoreLevels().at((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    matrix, shift = (x.double().clone().requires_grad_() for x in (matrix, shift))
    keep, s, eye = (1 - sigma)[:, None], sigma[:, None, None], torch.eye(len(mean), dtype=torch.float64)
    noisy = [
        (keep * m, (1 - s) ** 2 * c + s**2 * eye)
        for m, c in ((shift, matrix @ matrix.T), (mean.double(), covariance.double()))
    ]
    ((sigma / (1 - sigma)) ** 2 * divergence(*noisy[0], *noisy[1])).mean().backward()
    return torch.cat([matrix.grad.flatten(), shift.grad]) / len(mean)


def sampled_gradient(
    matrix: Tensor, shift: Tensor, fake_score: tuple[Tensor, Tensor], mean: Tensor, covariance: Tensor
) -> Tensor:
    """The same from 10^5 samples through the recipe's functions; the fake score is exact for N(fake score)."""
    draw = torch.Generator().manual_seed(3)
    matrix, shift = matrix.clone().requires_grad_(), shift.clone().requires_grad_()
    z, noise = torch.randn(2, 100_000, len(mean), generator=draw)
    sigma = ScoreLevels().at(torch.rand(len(z), generator=draw))
    x0 = z @ matrix.T + shift
    noisy = add_noise(x0, noise, sigma).detach()
    real = gaussian_velocity(mean, covariance, noisy, sigma)
    fake = gaussian_velocity(*fake_score, noisy, sigma)
    gradient = unnormalised(x0.detach(), noisy, real, fake, sigma)
    surrogate_loss(x0, gradient, EVERYWHERE).mean().backward()
    return torch.cat([matrix.grad.flatten(), shift.grad])


def test_the_gradient_is_that_of_the_divergence() -> None:
    draw = torch.Generator().manual_seed(2)
    matrix, root = torch.eye(3) + 0.4 * torch.randn(2, 3, 3, generator=draw)
    shift, mean = 0.3 * torch.randn(2, 3, generator=draw)
    truth = mean, root @ root.T
    expected = expected_gradient(matrix, shift, *truth).float()

    found = sampled_gradient(matrix, shift, (shift, matrix @ matrix.T), *truth)
    assert torch.cosine_similarity(found, expected, dim=0) >= 0.999
    assert (found - expected).norm() <= 0.02 * expected.norm()

    # A fake score of a student of some updates ago points elsewhere.
    older = 1.3 * matrix
    stale = sampled_gradient(matrix, shift, (shift - 0.3, older @ older.T), *truth)
    assert torch.cosine_similarity(stale, expected, dim=0) < 0.98


# At the fixed point nothing moves.


def velocities(kind: str, truth: Mixture, y: Tensor, sigma: Tensor, prior: SigmaPrior) -> Tensor:
    return truth.velocity(y, sigma) if kind == "told" else truth.blind_velocity(y, prior)


def noised(student: Mixture, count: int = 8_000) -> tuple[Tensor, ...]:
    """Student samples at levels of the prior: x0, noise, y, sigma."""
    draw = torch.Generator().manual_seed(5)
    x0, _ = student.draw(count, draw)
    noise = torch.randn(x0.shape, generator=draw)
    sigma, _ = toy_dmd2.PRIOR.sample(count, draw)
    return x0, noise, add_noise(x0, noise, sigma), sigma


def moved(truth: Mixture, by: float) -> Mixture:
    """The same, with its mean moved by so many of its standard deviations in the plane."""
    spread = truth.draw(20_000, torch.Generator().manual_seed(6))[0].std()
    return Mixture(truth.means + by * spread, truth.weights, truth.deviations)


def split(student: Mixture) -> Mixture:
    """The same distribution in other terms: every mode twice, with half its weight."""
    return Mixture(student.means.repeat(2, 1), student.weights.repeat(2) / 2, student.deviations)


@pytest.mark.parametrize("kind", ["told", "blind"])
@pytest.mark.parametrize("truth", [gaussian(), ring()], ids=["gaussian", "ring"])
def test_a_student_that_is_the_data_stays(kind: str, truth: Mixture) -> None:
    prior, sizes = toy_dmd2.PRIOR, []
    for student in (truth, moved(truth, 0.5)):
        x0, _, y, sigma = noised(student)
        real, fake = (velocities(kind, who, y, sigma, prior) for who in (truth, split(student)))
        gradient, finite = matching_gradient(x0, y, real, fake, sigma, EVERYWHERE)
        assert finite.all()
        sizes.append(gradient.mean(0).norm())
    assert sizes[1] > 0.1
    assert sizes[0] <= 0.05 * sizes[1]

    # E[eps - x0 | y] is the fake score: put its target in its place, and sampling error is what remains.
    deviations = []
    for student in (truth, moved(truth, 0.5)):
        x0, noise, y, sigma = noised(student)
        real = velocities(kind, truth, y, sigma, prior)
        gradient = unnormalised(x0, y, real, velocity_target(x0, noise), sigma)
        deviations.append(gradient.mean(0).abs() / (gradient.std(0) / len(gradient) ** 0.5))
    assert deviations[0].max() <= 3
    assert deviations[1].max() > 10


def test_a_blind_fake_score_with_another_prior_moves_even_the_data() -> None:
    truth, sizes = ring(), []
    x0, _, y, sigma = noised(truth)
    for prior in (toy_dmd2.PRIOR, SigmaPrior(shift=1.0)):
        real, fake = truth.blind_velocity(y, toy_dmd2.PRIOR), split(truth).blind_velocity(y, prior)
        sizes.append(matching_gradient(x0, y, real, fake, sigma, EVERYWHERE)[0].square().mean().sqrt())
    assert sizes[0] < 1e-4
    assert sizes[1] > 0.3


@pytest.mark.parametrize(("dimensions", "low", "high"), [(2, 0.5, 9.0), (128, 0.0, 0.1), (512, 0.0, 0.03)])
def test_what_a_blind_network_knows_depends_on_its_prior(dimensions, low, high) -> None:
    truth, draw = ring(dimensions), torch.Generator().manual_seed(7)
    x0, _ = truth.draw(256, draw)
    y = add_noise(x0, torch.randn(x0.shape, generator=draw), 0.8)
    five, one = (truth.blind_velocity(y, SigmaPrior(shift=shift), 200) for shift in (5.0, 1.0))
    assert low <= (five - one).norm() / truth.velocity(y, torch.full((256,), 0.8)).norm() <= high


def test_the_fake_score_has_the_teachers_prior_and_another_one_is_noted(tmp_path: Path) -> None:
    settings = toy_dmd2.make_context(tmp_path)
    for sigma in (None, toy_dmd2.PRIOR):
        made = toy_dmd2.DMD2(settings, sigma=sigma)
        assert (made.sigma, made.notes()) == (toy_dmd2.PRIOR, [])
    other = SigmaPrior(shift=1.0)
    made = toy_dmd2.DMD2(settings, sigma=other)
    assert made.sigma == made.export_config().sigma_prior == other
    (note,) = made.notes()
    assert "'shift': 1.0" in note
    assert f"is not the prior that {tmp_path} was trained with" in note
    assert "remove recipe.sigma" in note


def test_unknown_motion_weights_of_the_teacher_are_noted(tmp_path: Path) -> None:
    settings, file = toy_dmd2.make_context(tmp_path), tmp_path / "config.json"
    written = json.loads(file.read_text())
    for provenance, given, used, noted in (
        ({"motion_floor": 0.7}, None, 0.7, 0),
        ({}, None, 1.0, 1),
        ({}, 0.5, 0.5, 0),
    ):
        file.write_text(json.dumps({**written, "provenance": provenance}))
        made = toy_dmd2.DMD2(settings, fake_score=FakeScoreSettings(motion_floor=given))
        assert (made.motion_floor, len(made.notes())) == (used, noted)
        assert all("recipe.fake_score.motion_floor=F sets them" in note for note in made.notes())


def test_the_prior_of_published_weights_is_unknown_and_stays_so(tmp_path: Path) -> None:
    settings = toy_dmd2.make_context(tmp_path)
    file, own = tmp_path / "config.json", toy_dmd2.PRIOR.to_dict()
    # As conversions wrote it before version 0.3.0, and as they and what is trained from them do now.
    for made, prior in (
        ({"released": "base"}, own),
        ({"released": "base"}, None),
        ({"recipe": "recipes.lora.Lora"}, None),
    ):
        file.write_text(json.dumps({**json.loads(file.read_text()), "provenance": made, "sigma_prior": prior}))
        for sigma in (None, toy_dmd2.PRIOR):
            recipe = toy_dmd2.DMD2(settings, sigma=sigma, fake_score=FakeScoreSettings(motion_floor=1.0))
            assert recipe.sigma == (sigma or SigmaPrior("uniform"))
            (note,) = recipe.notes()
            assert f"noise levels that init={tmp_path} was trained with are unknown" in note
            exported = recipe.export_config()
            assert exported.sigma_prior is None
            assert ExportConfig.from_dict(exported.to_dict()) == exported
    file.write_text(json.dumps({**json.loads(file.read_text()), "sigma_prior": own}))
    assert toy_dmd2.DMD2(settings).export_config().sigma_prior == toy_dmd2.PRIOR  # the control: known


def test_a_fake_score_needs_the_motion_weights_of_its_teacher(tmp_path: Path) -> None:
    """Two clips that a noisy input cannot tell apart; E[w v | x] / E[w | x] minimises the weighted loss, not E[v | x]."""
    draw = torch.Generator().manual_seed(10)
    clips = torch.randn(2, 3, 4, 2, 2, generator=draw) * torch.tensor([[1.0, 0.1], [0.1, 1.0]]).view(2, 1, 1, 1, 2)
    noisy = 0.9 * torch.randn(1, 3, 4, 2, 2, generator=draw)
    noise = (noisy - 0.1 * clips) / 0.9
    probability = torch.exp(-0.5 * (noise.square() - noise.square().mean(0)).flatten(1).sum(1)).view(2, 1, 1, 1, 1)
    probability = probability / probability.sum()
    assert probability.min() > 0.05
    velocity, weight = noise - clips, motion_weight(clips, 0.4)
    plain = (probability * velocity).sum(0, keepdim=True)
    weighted = (probability * weight * velocity).sum(0) / (probability * weight).sum(0)

    def slope(at: Tensor, weights: Tensor | float) -> float:
        at = at.detach().expand(2, 3, 4, 2, 2).clone().requires_grad_()
        loss = fake_score_loss(at, clips, noise, torch.ones(1, 1, 1, 1, 1), weights)
        (loss * probability.flatten()).sum().backward()
        return float(at.grad.sum(0).abs().max())

    assert slope(weighted, weight) < 1e-6 < 1e-3 < slope(plain, weight)
    assert slope(plain, 1.0) < 1e-6 < 1e-3 < slope(weighted, 1.0)

    # The recipe takes the floor that the teacher's training recorded, unless it is given.
    file, settings = tmp_path / "config.json", toy_dmd2.make_context(tmp_path)
    assert toy_dmd2.DMD2(settings).motion_floor == 1
    file.write_text(json.dumps({**json.loads(file.read_text()), "provenance": {"motion_floor": 0.7}}))
    assert toy_dmd2.DMD2(settings).motion_floor == 0.7
    assert toy_dmd2.DMD2(settings, fake_score=FakeScoreSettings(motion_floor=0.5)).motion_floor == 0.5
    with pytest.raises(UserError, match=r"recipe.fake_score.motion_floor=1.5 should be in \[0, 1\]"):
        toy_dmd2.DMD2(settings, fake_score=FakeScoreSettings(motion_floor=1.5))


@pytest.mark.parametrize(("steps", "given", "found"), [
    (8, (None, None), (4, 7)), (4, (None, None), (2, 3)), (2, (None, None), (1, 1)), (1, (None, None), (0, 0)),
    (4, (0, None), (0, 3)), (8, (0, 0), (0, 0)), (2, (1, 0), (1, 0)),
])  # fmt: skip
def test_first_steps_follow_from_the_number_of_steps(steps, given, found) -> None:
    assert first_steps(steps, *given) == found


@pytest.mark.parametrize(("steps", "given", "said"), [
    (4, (4, None), "recipe.first_step=4 must be one of the steps 0 to 3 of recipe.steps=4; null derives it"),
    (2, (4, 7), "recipe.first_step=4 and recipe.fake_score.first_step=7 must be one of the steps 0 to 1"),
    (8, (0, -1), "recipe.fake_score.first_step=-1 must be"), (0, (None, None), "recipe.steps=0 must be at least 1"),
])  # fmt: skip
def test_a_step_that_the_student_does_not_have_is_refused(steps, given, said) -> None:
    with pytest.raises(UserError) as error:
        first_steps(steps, *given)
    assert said in str(error.value)


@pytest.mark.parametrize(("size", "dtype", "low", "high"), [
    (3e-3, torch.float32, 0.0, 1e-5), (3e-3, torch.bfloat16, 0.4, 1.0), (0.1, torch.bfloat16, 0.01, 0.1),
])  # fmt: skip
def test_a_small_gradient_survives_the_surrogate(size, dtype, low, high) -> None:
    x0, direction = torch.randn(2, 4, 50_000, generator=torch.Generator().manual_seed(8))
    gradient, x0 = size * direction, x0.requires_grad_()
    if dtype == torch.float32:
        loss = surrogate_loss(x0, gradient, EVERYWHERE)
    else:  # the control: what the same lines give in half precision
        inside = x0.to(dtype)
        loss = 0.5 * (inside - (inside - gradient.to(dtype)).detach()).float().square().mean(1)
    loss.sum().backward()
    error = (x0.grad * x0.shape[1] - gradient).norm() / gradient.norm()
    assert low <= error <= high


def test_velocities_in_half_precision_are_subtracted_in_full() -> None:
    draw = torch.Generator().manual_seed(8)
    real, x0, noise = torch.randn(3, 4, 5000, generator=draw)
    fake, sigma = (real + 0.01 * torch.randn(4, 5000, generator=draw)).bfloat16(), torch.full((4,), 0.5)
    real, noisy = real.bfloat16(), add_noise(x0, noise, 0.5)
    gradient, _ = matching_gradient(x0, noisy, real, fake, sigma, EVERYWHERE)
    exact, _ = matching_gradient(x0, noisy, real.double(), fake.double(), sigma, EVERYWHERE)
    assert gradient.dtype == torch.float32
    assert (gradient - exact).norm() <= 1e-6 * exact.norm()


def test_a_sample_without_a_finite_gradient_gets_none_and_is_counted() -> None:
    x0, noise, real, fake = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(9))
    sigma = torch.tensor([0.2, 0.5, 0.9])
    noisy = add_noise(x0, noise, sigma)
    clean, _ = matching_gradient(x0, noisy, real, fake, sigma, EVERYWHERE)
    fake[1, 4] = torch.nan
    gradient, finite = matching_gradient(x0, noisy, real, fake, sigma, EVERYWHERE)
    assert finite.tolist() == [True, False, True]
    assert torch.equal(gradient[1], torch.zeros(6))
    assert torch.equal(gradient[::2], clean[::2])
    x0[2, 0] = torch.inf  # its normaliser is infinite, which would make the gradient 0
    assert matching_gradient(x0, noisy, real, fake, sigma, EVERYWHERE)[1].tolist() == [True, False, False]


def test_the_gradient_of_an_exact_student_is_not_amplified_without_bound() -> None:
    x0, noise, away = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(9))
    sigma, real = torch.tensor([0.25, 0.5]), noise - x0
    noisy, fake = add_noise(x0, noise, sigma), real - 1e-4 * away
    gradient, _ = matching_gradient(x0, noisy, real, fake, sigma, EVERYWHERE)
    torch.testing.assert_close(gradient, sigma[:, None] * away, rtol=0.02, atol=0.02)  # over 1e-4, the smallest error


# What happens to one modality does not reach the other.


class Gains(nn.Module):
    """A velocity of its own gain per modality, so that their gradients can be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.video, self.audio = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-0.4))

    def forward(self, x: Pair, sigma: Tensor) -> Pair:
        return Pair(self.video * x.video, self.audio * x.audio)


class Fixed(MicroBatch):
    """A part whose draws are given, so that they stay when its shape changes."""

    noise: Pair

    def uniform(self) -> Tensor:
        return torch.tensor([0.3, 0.6])

    def normal(self) -> Pair:
        return self.noise


class PairDMD2(toy_dmd2.PointDMD2):
    """The recipe with networks of pairs, which are put in from outside."""

    def configure_model(self) -> None:
        self.networks = self.start

    def velocity(self, role: str, text: list[Tensor], x: Pair, sigma: Pair) -> Pair:
        return self.networks.role(role)(x, sigma.video)


def gradients(folder: Path, tiles: int = 1, teacher_video: float = 0.5, **weights: float) -> tuple[Tensor, Tensor]:
    """Gradients of the student's two gains in a student's turn, with video tokens repeated `tiles` times."""
    student = Gains()
    networks = toy_dmd2.Networks(
        lambda x, s: Pair(teacher_video * x.video, 0.6 * x.audio),
        lambda x, s: Pair(0.3 * x.video + 0.1, 0.2 * x.audio - 0.1), student, student,
    )  # fmt: skip
    made = PairDMD2(toy_dmd2.make_context(folder), networks, None, steps=2, **weights)
    made.configure_model()
    draw = torch.Generator().manual_seed(10)

    def latents() -> Pair:
        video = torch.randn(2, 3, 2, 2, 2, generator=draw).repeat(1, 1, tiles, 1, 1)
        return Pair(video, torch.randn(2, 5, 4, generator=draw))

    states = [latents(), latents()]
    part = Fixed([torch.zeros(2, 5)] * 2, Conditioning.nothing(states[0]), [], torch.arange(2))
    part.noise, part.rollout = latents(), Rollout(states, states, states[0], sigma_grid(2, 5.0))
    made.student_objective(part).backward()
    return student.video.grad, student.audio.grad


def test_many_video_tokens_do_not_drown_the_sound(tmp_path: Path) -> None:
    video, audio = gradients(tmp_path)
    assert min(abs(video), abs(audio)) > 1e-3
    many = gradients(tmp_path, tiles=86)
    assert abs(many[1] - audio) <= 1e-6 * abs(audio)
    assert abs(many[0] - video) <= 1e-5 * abs(video)  # a mean over more of the same

    heavy = gradients(tmp_path, audio_weight=3.0)
    torch.testing.assert_close(heavy[1], 3 * audio)
    assert torch.equal(heavy[0], video)
    swapped = gradients(tmp_path, video_weight=0.25, audio_weight=0.5)
    torch.testing.assert_close(torch.stack(swapped), torch.stack([0.25 * video, 0.5 * audio]))


def test_the_normaliser_of_the_sound_knows_nothing_of_the_video(tmp_path: Path) -> None:
    near, far = gradients(tmp_path), gradients(tmp_path, teacher_video=50.0)
    assert abs(far[0] - near[0]) > 0.1 * abs(near[0])
    assert torch.equal(far[1], near[1])


def test_one_mean_over_both_modalities_would_drown_it() -> None:
    draw = torch.Generator().manual_seed(11)
    shares = []
    for tiles in (1, 86):
        sizes = 20 * tiles, 20
        x0, noise, real, fake = (torch.randn(4, 1, sum(sizes), generator=draw)).unbind()
        sigma = torch.tensor([0.5])
        x0.requires_grad_()
        gradient, _ = matching_gradient(x0.detach(), add_noise(x0, noise, 0.5).detach(), real, fake, sigma, EVERYWHERE)
        surrogate_loss(x0, gradient, EVERYWHERE).sum().backward()
        shares.append(x0.grad[:, sizes[0] :].abs().sum())
    assert shares[1] < 0.05 * shares[0]


# One convention of guidance, the sampler's.


class Sides(nn.Module):
    """Velocity 1 with a text, 0 with the empty one: guided, it is the scale itself."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def layout_for(self, *_: object) -> None:
        return None

    def begin(self, steps: int) -> None:
        pass

    def forward(self, video: Tensor, audio: Tensor, text: list[Tensor], layout: object = None) -> tuple[Tensor, Tensor]:
        sides = torch.tensor([float(features.any()) for features in text])
        return sides.view(-1, 1, 1, 1, 1).expand_as(video), sides.view(-1, 1, 1).expand_as(audio)


class SidesDMD2(PairDMD2):
    def velocity(self, role: str, text: list[Tensor], x: Pair, sigma: Pair) -> Pair:
        assert role == "teacher"
        return Pair(*Sides()(x.video, x.audio, text))


def test_the_objective_is_guided_as_the_teacher_is_sampled(tmp_path, monkeypatch) -> None:
    guidance, seen = Guidance(video_high=5.0, video_low=2.0, threshold=500, audio=4.0), []

    def watched(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        seen.append(combine(positive, negative, scale).unique().item())
        return combine(positive, negative, scale)

    monkeypatch.setattr("inference.sampling.combine", watched)
    words, nothing = [torch.ones(2, 5)], [torch.zeros(2, 5)]
    shape = (3, 1, 2, 2), (2, 4)
    sample(Sides(), words, nothing, shape, 100, "euler", guidance, 5.0, seeded([0]))
    assert set(seen) == {5.0, 2.0, 4.0}
    in_the_sampler = torch.tensor(seen).view(100, 2)  # [steps, modalities]

    settings = {"steps": 8, "guidance": guidance}
    made = SidesDMD2(toy_dmd2.make_context(tmp_path), None, None, **settings)
    sigma = sigma_grid(100, 5.0)[:-1]
    x = Pair(torch.zeros(100, 3, 1, 2, 2), torch.zeros(100, 2, 4))
    guided, plain = made.teacher_velocity(x, words * 100, Pair(sigma, sigma))
    assert torch.equal(torch.stack([guided.video.mean((1, 2, 3, 4)), guided.audio.mean((1, 2))], 1), in_the_sampler)
    assert plain.video.unique().tolist() == plain.audio.unique().tolist() == [1.0]

    made.guidance = Guidance(1, 1, 500, 1)  # a scale of 1 is the conditional prediction
    for guided, plain in zip(*made.teacher_velocity(x, words * 100, Pair(sigma, sigma)), strict=True):
        assert torch.equal(guided, plain)


def test_the_other_convention_of_guidance_is_one_less() -> None:
    positive, negative = torch.randn(2, 7, generator=torch.Generator().manual_seed(12))
    torch.testing.assert_close(combine(positive, negative, 3.0 + 1), positive + 3.0 * (positive - negative))


# The GAN loss.


class Taps(nn.Module):
    """Two taps of features: the latents' tokens times a weight, and times twice of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Pair) -> list[tuple[Tensor, Tensor]]:
        video = x.video.flatten(2).transpose(1, 2)
        return [(self.weight * by * video, self.weight * by**2 * x.audio**by) for by in (1, 2)]


def discriminator() -> Discriminator:
    torch.manual_seed(4)
    made = Discriminator(4, 2, GanSettings(weight=0.1, slope=0.3, step=0.2))
    for head in made.heads.values():
        nn.init.normal_(head.query)
    return made


def test_a_head_pools_normalised_tokens_and_reads_the_level() -> None:
    head = discriminator().heads["video"]
    taps, sigma = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0.1, 0.5, 0.9])
    inputs = []
    for tokens, query in zip(taps, head.query, strict=True):
        x = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        share = torch.softmax((x * query).sum(-1) / 4**0.5, 1)
        inputs.append((share[..., None] * x).sum(1))
    angles = torch.stack([sigma * 2**k * torch.pi / 2 for k in range(8)], 1)
    torch.testing.assert_close(head(taps, sigma), head.read(torch.cat([*inputs, angles.sin(), angles.cos()], 1))[:, 0])


def test_the_gan_losses_have_their_closed_forms() -> None:
    draw = torch.Generator().manual_seed(2)
    x0, real, noise = (
        Pair(torch.randn(3, 4, 2, 2, 2, generator=draw), torch.randn(3, 5, 4, generator=draw)) for _ in range(3)
    )
    conditioning, sigma = Conditioning.nothing(real), torch.tensor([0.2, 0.5, 0.8])
    conditioning.mask.video[1, :, 0] = 0
    conditioning.mask.audio[2] = 0
    critic, features = discriminator(), Taps()

    torch.manual_seed(9)
    loss = critic.loss(features, x0, noise, sigma, conditioning)
    loss.backward()
    assert features.weight.grad is None  # the network whose features are read is not trained here
    torch.manual_seed(9)
    high, low = (
        conditioning.insert(Pair(*(add_noise(a, b, sigma) for a, b in zip(x, noise, strict=True)))) for x in (real, x0)
    )
    near = conditioning.insert(Pair(*(x + 0.2 * torch.randn_like(x) for x in high)))
    expected = 0.0
    for m, name in enumerate(("video", "audio")):
        a, b, c = (critic.heads[name]([tap[m] for tap in features(x)], sigma) for x in (high, low, near))
        slope = ((a - c) / 0.2).square().mean()
        expected += (1 + (-a).exp()).log().mean() + (1 + b.exp()).log().mean() + 0.3 * slope
    torch.testing.assert_close(loss, expected)

    logits = critic.score(features, low, sigma)
    torch.testing.assert_close(
        critic.student_loss(features, low, sigma), sum((1 + (-value).exp()).log().mean() for value in logits.values())
    )
    silent = Pair(low.video, low.audio[:, :0])
    assert critic.score(features, silent, sigma).keys() == {"video"}
