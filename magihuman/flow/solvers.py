"""Solvers of the flow ODE dx/dsigma = v and its stochastic variants, independent of the network.

    solver, x = make_solver("unipc", steps=32), noise
    for i, sigma in enumerate(solver.sigmas[:-1]):
        x = solver.step(velocity(x, sigma), i, x)          # stochastic solvers take noise= too

All use the grid of `magihuman.flow.sigmas`. To add a solver, subclass `Solver`, implement `step`, and add a row to `SOLVERS`.
A step gets one velocity, so methods with several evaluations a step (Heun) do not fit; a solver with a state overrides `reset`.
Step coefficients are Python numbers computed at construction, so that a step needs no device synchronisation.
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from magihuman.errors import UserError
from magihuman.flow.sigmas import grid_timesteps, sigma_grid


class Solver:
    """Base class: grid of noise levels, and the interface `step`.

    Args:
        steps: K; shift: of the grid.

    Attributes:
        sigmas: fp32 [K+1]; timesteps: int64 [K]; both on the CPU.
        stochastic: whether `step` needs fresh noise. It is drawn for every step, including the last, where it has no
            weight.

    Raises:
        UserError: for fewer than one step or a shift that is not positive.
    """

    stochastic = False

    def __init__(self, steps: int, shift: float = 5.0) -> None:
        self.steps = steps
        self.sigmas = sigma_grid(steps, shift)
        self.timesteps = grid_timesteps(steps, shift)
        self._sigma: list[float] = self.sigmas.tolist()

    def step(self, velocity: Tensor, i: int, sample: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_{i+1} from x_i at sigma_i; velocity, sample, noise and the result are fp32 of one shape."""
        raise NotImplementedError

    def reset(self) -> None:
        """Clear the state of multistep solvers; call before a new trajectory."""


class Euler(Solver):
    """Euler's method, x_{i+1} = x_i + (sigma_{i+1} - sigma_i) v_i."""

    def step(self, velocity: Tensor, i: int, sample: Tensor, noise: Tensor | None = None) -> Tensor:
        return sample + (self._sigma[i + 1] - self._sigma[i]) * velocity


class ReNoise(Solver):
    """Re-noising sampler of few-step models (SPEC 3.3): data estimate, then fresh noise at the next level.

    x_{i+1} = sigma_{i+1} noise + (1 - sigma_{i+1}) (x_i - sigma_i v_i).

    Raises:
        ValueError: in `step`, without noise before the last step.
    """

    stochastic = True

    def step(self, velocity: Tensor, i: int, sample: Tensor, noise: Tensor | None = None) -> Tensor:
        after = self._sigma[i + 1]
        x0 = sample - self._sigma[i] * velocity
        return _weighted_noise(after, noise, i) + (1 - after) * x0


class SDE(Solver):
    """Stochastic sampler between Euler (theta 0) and re-noising (theta 1), per step (SPEC 3.4).

    Args:
        theta: one value per step; None for the released rule `sde_theta`.

    Raises:
        UserError: when the number of thetas is not the number of steps.
        ValueError: in `step`, without noise where it has weight.
    """

    stochastic = True

    def __init__(self, steps: int, shift: float = 5.0, theta: Sequence[float] | None = None) -> None:
        super().__init__(steps, shift)
        self.theta = [sde_theta(i, steps) for i in range(steps)] if theta is None else [float(t) for t in theta]
        if len(self.theta) != steps:
            raise UserError(f"{len(self.theta)} values of theta for {steps} steps; give one per step")

    def step(self, velocity: Tensor, i: int, sample: Tensor, noise: Tensor | None = None) -> Tensor:
        after, angle = self._sigma[i + 1], self.theta[i] * math.pi / 2
        kept = after * math.cos(angle)
        x0 = sample - self._sigma[i] * velocity
        return (1 - after + kept) * x0 + kept * velocity + _weighted_noise(after * math.sin(angle), noise, i)


def sde_theta(i: int, steps: int) -> float:
    """theta_i of the release: 1 at odd steps of the first three quarters, then at steps divisible by 3; else 0."""
    if i < int(0.75 * steps):
        return float(i % 2 == 1)
    return float(i % 3 == 0)


def _weighted_noise(weight: float, noise: Tensor | None, i: int) -> Tensor | float:
    if weight == 0:
        return 0.0
    if noise is None:
        raise ValueError(f"step {i} of a stochastic solver needs noise of the sample's shape")
    return weight * noise


class FlowUniPC(Solver):
    """UniPC, unified predictor-corrector multistep solver of order 2 (Zhao et al. 2023, arXiv 2302.04867; SPEC 3.2).

    B(h) = expm1(-h), data prediction, order 1 in the first and last step. Keeps the last two data estimates and the last
    corrected sample.

    Attributes:
        corrected: sample of the last step after the corrector, before the predictor.

    Raises:
        ValueError: in `step`, when steps are not taken in order from 0 after `reset`.
    """

    def __init__(self, steps: int, shift: float = 5.0) -> None:
        super().__init__(steps, shift)
        self._lambda = [math.log1p(-s) - math.log(s) if s > 0 else math.inf for s in self._sigma]
        self.reset()

    def reset(self) -> None:
        self._estimates: list[Tensor] = []  # m_{i-2}, m_{i-1}
        self.corrected: Tensor | None = None
        self._next = 0

    def step(self, velocity: Tensor, i: int, sample: Tensor, noise: Tensor | None = None) -> Tensor:
        if i != self._next:
            raise ValueError(f"UniPC expected step {self._next}, not {i}; call reset() before a new trajectory")
        estimate = sample - self._sigma[i] * velocity
        self.corrected = sample if i == 0 else self._correct(estimate, i)
        self._estimates = [*self._estimates[-1:], estimate]
        self._next = i + 1
        return self._predict(i)

    def _order(self, i: int) -> int:
        """Order of the predictor of step i; the last step needs none, since it ends at the data estimate."""
        return min(2, i + 1)

    def _correct(self, estimate: Tensor, i: int) -> Tensor:
        assert self.corrected is not None
        h = self._lambda[i] - self._lambda[i - 1]
        b = math.expm1(-h)
        weight = (1 - self._sigma[i]) * b
        previous = self._estimates[-1]
        base = self._sigma[i] / self._sigma[i - 1] * self.corrected - weight * previous
        if self._order(i - 1) == 1:
            return base - weight * 0.5 * (estimate - previous)
        r = (self._lambda[i - 2] - self._lambda[i - 1]) / h
        phi1 = b / -h - 1
        phi2 = phi1 / -h - 0.5
        b1, b2 = phi1 / b, 2 * phi2 / b
        c0 = (b1 - b2) / (1 - r)  # solves c0 + c1 = b1, r c0 + c1 = b2
        c1 = b1 - c0
        return base - weight * (c0 / r * (self._estimates[-2] - previous) + c1 * (estimate - previous))

    def _predict(self, i: int) -> Tensor:
        assert self.corrected is not None
        estimate = self._estimates[-1]
        if i + 1 == self.steps:
            return estimate  # sigma 0: the limit of the formula below
        h = self._lambda[i + 1] - self._lambda[i]
        weight = (1 - self._sigma[i + 1]) * math.expm1(-h)
        result = self._sigma[i + 1] / self._sigma[i] * self.corrected - weight * estimate
        if self._order(i) == 2:
            r = (self._lambda[i - 1] - self._lambda[i]) / h
            result = result - weight * 0.5 / r * (self._estimates[-2] - estimate)
        return result


SOLVERS: dict[str, Callable[[int, float], Solver]] = {
    "unipc": FlowUniPC,
    "renoise": ReNoise,
    "sde": SDE,
    "euler": Euler,
}


def make_solver(name: str, steps: int, shift: float = 5.0) -> Solver:
    """Solver by name.

    Raises:
        UserError: for an unknown name, listing the choices.
    """
    if name not in SOLVERS:
        raise UserError(f"solver {name!r} is unknown; choose from {', '.join(SOLVERS)}")
    return SOLVERS[name](steps, shift)
