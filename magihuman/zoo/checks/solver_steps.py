"""Solvers driven by stored velocities and noise, and the super-resolution noise table."""

import math

import torch

from magihuman.flow.sigmas import zero_snr_table
from magihuman.flow.solvers import SDE, FlowUniPC, ReNoise, Solver
from magihuman.zoo.checks import Result, VectorCase, compare

TOLERANCE = 1e-5


def check_unipc(case: VectorCase) -> list[Result]:
    """Predictor-corrector: grid, every sample, and every sample between corrector and predictor."""
    case.meta.require(constructor_shift=1.0)
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
    """Signal amplitudes, their ends, and the two numbers that a noise index takes from them."""
    table, stated = zero_snr_table(), case.meta
    results = [compare("sigmas", table, case.tensors["sigmas"], 1e-6)]
    for name in [key for key in stated if key.startswith("sigma_")]:
        amplitude = table[int(name.removeprefix("sigma_"))].item()
        results.append(Result(name, abs(amplitude - float(stated[name])), 1e-6))
        results.append(Result("sqrt_1m", abs(math.sqrt(1 - amplitude**2) - float(stated["sqrt_1m"])), 1e-6))
    for name, value in (("first", table[0]), ("last", table[-1])):
        results.append(Result(name, abs(value.item() - float(stated[name])), 1e-6))
    return results
