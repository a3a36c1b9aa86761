"""Grids of SPEC 3.1, training priors, and the table of SPEC 4.4."""

import math

import pytest
import torch

from magihuman.errors import UserError
from magihuman.flow.sigmas import ScoreLevels, SigmaPrior, grid_timesteps, shift_sigma, sigma_grid, zero_snr_table

EIGHT = [0.99979985, 0.97200602, 0.93726546, 0.89260185, 0.83305538, 0.74969983, 0.62468737, 0.41638881, 0]
THIRTY_TWO = [
    *(999, 993, 986, 979, 972, 964, 955, 946, 937, 927, 916, 904, 892, 879, 865, 849),
    *(833, 814, 795, 773, 749, 723, 694, 661, 624, 583, 535, 480, 416, 340, 249, 138),
]


def test_released_grids() -> None:
    torch.testing.assert_close(sigma_grid(8, 5.0), torch.tensor(EIGHT), rtol=0, atol=1e-7)
    assert grid_timesteps(8, 5.0).tolist() == [999, 972, 937, 892, 833, 749, 624, 416]
    assert grid_timesteps(5, 5.0).tolist() == [999, 952, 882, 768, 555]
    assert grid_timesteps(32, 5.0).tolist() == THIRTY_TWO
    assert grid_timesteps(6, 5.0)[-1] == 499


@pytest.mark.parametrize(("steps", "shift"), [(0, 5.0), (4, 0.0), (4, -1.0)])
def test_impossible_grids_are_refused(steps: int, shift: float) -> None:
    with pytest.raises(UserError):
        sigma_grid(steps, shift)


def draw(prior: SigmaPrior, count: int = 20000) -> tuple[torch.Tensor, torch.Tensor]:
    return prior.sample(count, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("prior", "median"),
    [
        (SigmaPrior("uniform"), 0.5),
        (SigmaPrior("shifted", shift=5.0), 5 / 6),
        (SigmaPrior("logit_normal", mean=0.6), 1 / (1 + math.exp(-0.6))),
        (SigmaPrior("logit_normal", mean=0.0, shift=3.0), 0.75),
    ],
)
def test_medians_are_where_the_formula_puts_them(prior: SigmaPrior, median: float) -> None:
    video, audio = draw(prior)
    assert video.median().item() == pytest.approx(median, abs=0.01)
    assert video.min() >= 0
    assert video.max() <= 1
    assert torch.equal(video, audio)


def test_shifted_prior_and_grid_are_one_family() -> None:
    u = torch.linspace(0, 1, 11)
    quantiles = draw(SigmaPrior("shifted", shift=5.0))[0].quantile(u)
    torch.testing.assert_close(quantiles, shift_sigma(u, 5.0), rtol=0, atol=0.02)


@pytest.mark.parametrize("fraction", [0.0, 0.6, 1.0])
def test_independent_levels_for_a_share_of_the_samples(fraction: float) -> None:
    video, audio = draw(SigmaPrior("uniform", coupling="independent", independent_fraction=fraction))
    assert (video != audio).float().mean().item() == pytest.approx(fraction, abs=0.02)
    apart = video != audio
    if apart.any():
        assert abs(torch.corrcoef(torch.stack([video[apart], audio[apart]]))[0, 1].item()) < 0.03
    assert audio.mean().item() == pytest.approx(0.5, abs=0.01)


def test_video_levels_do_not_depend_on_the_coupling() -> None:
    shared = draw(SigmaPrior("logit_normal"), 50)
    independent = draw(SigmaPrior("logit_normal", coupling="independent"), 50)
    assert torch.equal(shared[0], independent[0])


def test_every_coupling_leaves_the_generator_at_the_same_place() -> None:
    states = []
    for coupling in ("shared", "independent"):
        generator = torch.Generator().manual_seed(0)
        SigmaPrior("shifted", shift=3.0, coupling=coupling, independent_fraction=0.5).sample(3, generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_score_levels_are_shifted_and_clamped_at_both_ends() -> None:
    levels = ScoreLevels(shift=2.0, low=0.1, high=0.9)
    u = torch.tensor([0.0, 0.02, 0.25, 0.5, 0.9, 0.999])
    torch.testing.assert_close(levels.at(u), torch.tensor([0.1, 0.1, 0.4, 2 / 3, 0.9, 0.9]))


def test_prior_round_trip_and_refusals() -> None:
    prior = SigmaPrior("logit_normal", mean=0.6, coupling="independent", independent_fraction=0.6)
    assert SigmaPrior.from_dict(prior.to_dict()) == prior
    for values, message in (
        ({"kind": "normal"}, "choose from shifted"),
        ({"coupling": "both"}, "choose from shared"),
        ({"kind": "uniform", "shift": 2.0}, "no shift"),
        ({"std": 0.0}, "std > 0"),
        ({"independent_fraction": 1.5}, "within 0 and 1"),
        ({"low": 1.5}, r"low=1\.5 of a shifted sigma prior must be within 0 and 1"),
        ({"low": 0.5, "kind": "logit_normal"}, "0 for logit_normal"),
        ({"sigma": 1.0}, "sigma"),
    ):
        with pytest.raises(UserError, match=message):
            SigmaPrior.from_dict(values)


def test_super_resolution_table() -> None:
    table = zero_snr_table()
    assert table.shape == (1000,)
    assert table[220].item() == pytest.approx(0.8389104008674622, abs=1e-7)
    assert table[0].item() == pytest.approx(0.9995748996734619, abs=1e-7)
    assert table[-1].item() == 0
    assert table.diff().max() < 0
