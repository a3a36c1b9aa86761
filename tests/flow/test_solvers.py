"""Solvers on fields whose answers are known in closed form."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.flow.solvers import SDE, SOLVERS, Euler, FlowUniPC, ReNoise, Solver, make_solver, sde_theta
from magihuman.zoo.verify import verify

MEAN, SPREAD = 2.0, 0.5


def gaussian_velocity(x: Tensor, sigma: float) -> Tensor:
    """Exact E[noise - x0 | x] for data that is normal with MEAN and SPREAD."""
    variance = ((1 - sigma) * SPREAD) ** 2 + sigma**2
    centred = x - (1 - sigma) * MEAN
    return sigma / variance * centred - (MEAN + (1 - sigma) * SPREAD**2 / variance * centred)


def gaussian_flow(x: Tensor, sigma: float) -> Tensor:
    """Where the exact flow carries x from sigma to 0: a map of quantiles to quantiles."""
    return MEAN + SPREAD * (x - (1 - sigma) * MEAN) / math.hypot((1 - sigma) * SPREAD, sigma)


def run(solver: Solver, x: Tensor, field: Callable[[Tensor, float], Tensor] = gaussian_velocity) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    solver.reset()
    for i in range(solver.steps):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype) if solver.stochastic else None
        x = solver.step(field(x, solver.sigmas[i].item()), i, x, noise)
    return x


def start(count: int = 64) -> Tensor:
    return torch.randn(count, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("unipc", 2)])
def test_error_falls_with_the_order(name: str, order: int) -> None:
    x = start()
    exact = gaussian_flow(x, make_solver(name, 8, 1.0).sigmas[0].item())
    errors = [(run(make_solver(name, steps, 1.0), x) - exact).abs().max().item() for steps in (64, 128, 256)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)
    assert errors[-1] < (1e-2 if order == 1 else 1e-4)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_a_constant_data_estimate_is_reached_exactly(name: str) -> None:
    target = torch.tensor([[1.0], [-2.0]])

    def to_target(x: Tensor, sigma: float) -> Tensor:
        return (x - target) / sigma

    for steps in (1, 2, 3, 7):
        torch.testing.assert_close(
            run(make_solver(name, steps), torch.randn(2, 1), to_target), target, rtol=1e-5, atol=1e-5
        )


def test_renoising_a_consistency_map_keeps_the_distribution() -> None:
    def to_end_of_flow(x: Tensor, sigma: float) -> Tensor:
        return (x - gaussian_flow(x, sigma)) / sigma

    for steps in (1, 4, 32):
        x = run(ReNoise(steps), start(20000), to_end_of_flow)
        assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
        assert x.std().item() == pytest.approx(SPREAD, rel=0.02)


def test_sde_lies_between_euler_and_renoise() -> None:
    x = start()
    torch.testing.assert_close(run(SDE(6, 5.0, [0.0] * 6), x), run(Euler(6, 5.0), x))
    torch.testing.assert_close(run(SDE(6, 5.0, [1.0] * 6), x), run(ReNoise(6, 5.0), x))


def test_released_theta_rule() -> None:
    assert [sde_theta(i, 8) for i in range(8)] == [0, 1, 0, 1, 0, 1, 1, 0]
    assert [sde_theta(i, 9) for i in range(9)] == [
        0,
        1,
        0,
        1,
        0,
        1,
        1,
        0,
        0,
    ]  # three quarters are 6 steps, rounded down


@pytest.mark.parametrize("name", ["renoise", "sde"])
def test_the_last_step_needs_no_noise_and_ends_at_the_data_estimate(name: str) -> None:
    solver, x, v = make_solver(name, 4), torch.randn(3), torch.randn(3)
    torch.testing.assert_close(solver.step(v, 3, x), x - solver.sigmas[3].item() * v)


def test_last_step_of_unipc_is_the_data_estimate() -> None:
    solver, x = FlowUniPC(1), torch.randn(3)
    v = torch.randn(3)
    assert torch.equal(solver.step(v, 0, x), x - solver.sigmas[0].item() * v)


def test_unipc_forgets_on_reset_and_refuses_disorder() -> None:
    solver, x = FlowUniPC(5), start(4)
    first = run(solver, x)
    assert torch.equal(run(solver, x), first)
    with pytest.raises(ValueError, match="reset"):
        solver.step(x, 0, x)
    solver.reset()
    with pytest.raises(ValueError, match="expected step 0"):
        solver.step(x, 1, x)


def test_refusals() -> None:
    with pytest.raises(UserError, match="unipc, renoise, sde, euler"):
        make_solver("heun", 4)
    with pytest.raises(UserError, match="3 values of theta for 4 steps"):
        SDE(4, 5.0, [0.0] * 3)
    with pytest.raises(ValueError, match="needs noise"):
        ReNoise(4).step(torch.zeros(1), 0, torch.zeros(1))


def test_released_vectors(golden: Path) -> None:
    rows = [row for kind in ("unipc_", "ddim_", "sde_", "sr_sigma") for row in verify(golden, only=kind)]
    assert len({row.case for row in rows}) == 8
    assert [row for row in rows if row.status != "pass"] == []


def test_guidance_switches_above_the_threshold() -> None:
    guidance = Guidance()
    assert [guidance("video", t) for t in (999, 501, 500, 0)] == [5, 5, 2, 2]
    assert guidance("audio", 0) == 5
    assert guidance.needed
    assert not Guidance(1.0, 1.0, audio=1.0).needed
    assert Guidance(1.0, 1.0, audio=2.0).needed
    levels = torch.tensor([0.5009, 0.5011])  # truncated: timesteps 500 and 501
    assert guidance.at("video", levels, levels).tolist() == [[[[[2]]]], [[[[5]]]]]
    assert guidance.at("audio", levels, levels).tolist() == [[[5]], [[5]]]
    assert Guidance.from_dict(guidance.to_dict()) == guidance
    with pytest.raises(ValueError, match="video or audio"):
        guidance("text", 1)
    with pytest.raises(UserError, match="scale"):
        Guidance.from_dict({"scale": 3})
