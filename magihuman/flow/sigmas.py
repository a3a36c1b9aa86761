"""Noise levels sigma (0 data, 1 noise): priors for training, grids for sampling, noise table of super-resolution.

    sigma_video, sigma_audio = SigmaPrior("shifted", shift=5.0).sample(batch=8)     # training, [8] each
    sigmas = sigma_grid(steps=8, shift=5.0)                                         # sampling, [9], down to 0

The shift moves levels towards noise, see `shift_sigma`.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from magihuman.errors import UserError
from magihuman.schema import PlainConfig

KINDS = ("shifted", "logit_normal", "uniform")
COUPLINGS = ("shared", "independent")

_TRAIN_STEPS = 1000


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """Timestep shift s u / (1 + (s - 1) u), which moves noise levels towards 1 for shift s > 1."""
    return shift * u / (1 + (shift - 1) * u)


def sigma_grid(steps: int, shift: float) -> Tensor:
    """Noise levels of the released sampler (SPEC 3.1): fp32 [steps + 1], from just under 1 to exactly 0.

    Raises:
        UserError: for fewer than one step or a shift that is not positive.
    """
    return _grid(steps, shift).to(torch.float32)


def grid_timesteps(steps: int, shift: float) -> Tensor:
    """Integer timesteps of the grid, int64 [steps]: 1000 sigma, truncated before sigma is rounded to fp32."""
    return (_grid(steps, shift)[:-1] * _TRAIN_STEPS).to(torch.int64)


def _grid(steps: int, shift: float) -> Tensor:
    if steps < 1:
        raise UserError(f"a sampling grid needs at least one step, not {steps}")
    if not shift > 0:
        raise UserError(f"the shift of a sampling grid must be positive, not {shift}")
    # The solver is built with shift 1, whose first sigma is 0.999 rounded to fp32, not 1.
    first = torch.tensor(1 - 1 / _TRAIN_STEPS, dtype=torch.float32).double()
    u = first * (1 - torch.arange(steps + 1, dtype=torch.float64) / steps)
    return shift_sigma(u, shift)


@dataclass(frozen=True)
class SigmaPrior(PlainConfig):
    """Distribution of training noise levels. It is stored in checkpoints, since a network without timestep input
    infers the level under this prior.

    Attributes:
        kind: "uniform"; "shifted", uniform with timestep shift; "logit_normal", logistic of a normal variable, then
            shifted.
        shift: see `shift_sigma`; 1 is none.
        low: u is uniform in [low, 1] before the shift, not in [0, 1]; not for logit_normal.
        mean, std: of the normal variable, logit_normal only.
        coupling: "shared", video and audio of a sample have one level; "independent", the audio of some samples has a
            level of its own.
        independent_fraction: share of those samples.

    Raises:
        UserError: at construction, for values that do not fit together.
    """

    kind: str = "shifted"
    shift: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    coupling: str = "shared"
    independent_fraction: float = 1.0
    low: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"sigma prior {self.kind!r} is unknown; choose from {', '.join(KINDS)}")
        if self.coupling not in COUPLINGS:
            raise UserError(f"sigma coupling {self.coupling!r} is unknown; choose from {', '.join(COUPLINGS)}")
        if not self.shift > 0 or not self.std > 0:
            raise UserError(f"sigma prior needs shift > 0 and std > 0, not {self.shift} and {self.std}")
        if self.kind == "uniform" and self.shift != 1:
            raise UserError("a uniform sigma prior has no shift; set kind to shifted, or shift to 1")
        if not 0 <= self.independent_fraction <= 1:
            raise UserError(f"independent_fraction must be within 0 and 1, not {self.independent_fraction}")
        if not 0 <= self.low <= 1 or (self.low and self.kind == "logit_normal"):
            raise UserError(
                f"low={self.low} of a {self.kind} sigma prior must be within 0 and 1, and 0 for logit_normal"
            )

    def sample(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Noise levels of video and of audio, fp32 [batch] each.

        The number of random values does not depend on the coupling, so that runs stay comparable.
        """
        video, own = self._draw(batch, generator), self._draw(batch, generator)
        apart = torch.rand(batch, generator=generator) < self.independent_fraction
        if self.coupling == "shared":
            return video, video.clone()
        return video, torch.where(apart, own, video)

    def _draw(self, batch: int, generator: torch.Generator | None) -> Tensor:
        if self.kind == "logit_normal":
            draw = torch.randn(batch, generator=generator)
            return shift_sigma(torch.sigmoid(self.mean + self.std * draw), self.shift)
        u = torch.rand(batch, generator=generator)
        return shift_sigma(self.low + (1 - self.low) * u, self.shift)


@dataclass(frozen=True)
class ScoreLevels:
    """Noise levels of the student's objective in a distillation: uniform, shifted, clamped to [low, high].

    Raises:
        UserError: at construction, unless 0 <= low < high <= 1 and shift > 0.
    """

    shift: float = 2.0
    low: float = 0.02
    high: float = 0.98

    def __post_init__(self) -> None:
        if not (0 <= self.low < self.high <= 1 and self.shift > 0):
            raise UserError(
                f"score levels need 0 <= low < high <= 1 and shift > 0, not {self.low}, {self.high}, {self.shift}"
            )

    def at(self, u: Tensor) -> Tensor:
        """Levels for uniform u in [0, 1)."""
        return shift_sigma(u, self.shift).clamp(self.low, self.high)


@cache
def zero_snr_table() -> Tensor:
    """Signal amplitudes of a zero-terminal-SNR diffusion schedule, fp32 [1000], cleanest first (SPEC 4.4).

    Super-resolution noises its input as z a + noise sqrt(1 - a^2) with a = table[220].
    """
    betas = torch.linspace(0.00085**0.5, 0.0120**0.5, _TRAIN_STEPS, dtype=torch.float64) ** 2
    amplitude = torch.cumprod(1 - betas, dim=0).to(torch.float32).sqrt()
    first, last = amplitude[0].clone(), amplitude[-1].clone()
    return (amplitude - last) * (first / (first - last))
