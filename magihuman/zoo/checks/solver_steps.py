"""Solvers driven by stored velocities and noise, and the super-resolution noise table."""

import math

import torch

from magihuman.flow.sigmas import zero_snr_table
from magihuman.flow.solvers import SDE, FlowUniPC, ReNoise, Solver
from magihuman.zoo.checks import Result, VectorCase, compare

TOLERANCE = 1e-5


def check_unipc(case: VectorCase) -> list[Result]:
    """Predictor-corrector: grid, every sample, and every sample between corrector and predictor."""
    solver = FlowUniPC(case.meta["steps"], case.meta["shift"])
    results, corrected = _trajectory(case, solver)
    if "corrected_samples" in case.tensors:
        stored = case.tensors["corrected_samples"]
        results.append(compare("corrected_samples", torch.stack(corrected), stored, TOLERANCE))
    return results


def check_renoise(case: VectorCase) -> list[Result]:
    """The sampler that the release calls step_ddim."""
    return _trajectory(case, ReNoise(case.meta["steps"], case.meta["shift"]))[0]


def check_sde(case: VectorCase) -> list[Result]:
    """The stochastic solver with a stored angle per step."""
    theta = case.tensors["theta"].tolist()
    return _trajectory(case, SDE(case.meta["steps"], case.meta["shift"], theta))[0]


def _trajectory(case: VectorCase, solver: Solver) -> tuple[list[Result], list[torch.Tensor]]:
    results = [compare("sigmas", solver.sigmas, case.tensors["sigmas"], TOLERANCE)]
    if "timesteps" in case.tensors:
        results.append(compare("timesteps", solver.timesteps, case.tensors["timesteps"]))
    noise = case.tensors.get("noise")
    samples, corrected = [case.tensors["x0"]], []
    for i, velocity in enumerate(case.tensors["velocity"]):
        drawn = None if noise is None else noise[i]
        samples.append(solver.step(velocity, i, samples[-1], drawn))
        if isinstance(solver, FlowUniPC) and solver.corrected is not None:
            corrected.append(solver.corrected)
    results.append(compare("latents", torch.stack(samples), case.tensors["latents"], TOLERANCE))
    return results, corrected


def check_sr_sigma_table(case: VectorCase) -> list[Result]:
    """Signal amplitudes, and the two numbers that the super-resolution stage takes from them."""
    table = zero_snr_table()
    amplitude = table[220].item()
    return [
        compare("sigmas", table, case.tensors["sigmas"], 1e-6),
        Result("sigma_220", abs(amplitude - float(case.meta["sigma_220"])), 1e-6),
        Result("sqrt_1m", abs(math.sqrt(1 - amplitude**2) - float(case.meta["sqrt_1m"])), 1e-6),
    ]
