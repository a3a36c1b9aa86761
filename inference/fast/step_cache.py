"""Step cache: in some steps of a long trajectory the middle layers' change of the residual stream is forecast.

The forecast is the line through the last two changes that were computed (TaylorSeer of order 1, Liu et al. 2025, arXiv
2503.06923). Which steps use it is decided beforehand from their number: a decision from the data (TeaCache, arXiv
2411.19108) would make the host wait for the device in every step.
"""

from collections.abc import Hashable

import torch
from torch import Tensor

SHORTEST = 12
"""Steps from which anything is forecast: few-step students change too much between theirs."""


def reused_steps(steps: int) -> tuple[bool, ...]:
    """Which steps of a trajectory forecast: every second one after the first eighth, but none of the last two.

    The first steps decide what is where, the last ones the detail.
    """
    start = steps // 8
    return tuple(steps >= SHORTEST and start <= i < steps - 2 and (i - start) % 2 == 1 for i in range(steps))


class StepCache:
    """The middle layers' last two changes for every pass of a trajectory; with guidance a step has two passes."""

    def __init__(self) -> None:
        self._plan: tuple[bool, ...] = ()
        self._steps: dict[Hashable, int] = {}
        self._changes: dict[Hashable, list[tuple[int, Tensor]]] = {}
        self._key: Hashable = None

    def begin(self, steps: int) -> None:
        """A trajectory starts; nothing of the one before is kept."""
        self._plan = reused_steps(steps)
        self._steps.clear()
        self._changes.clear()

    def enter(self, key: Hashable) -> None:
        """A forward pass starts, the next step of the pass that has this key in all steps."""
        self._key = key
        self._steps[key] = self._steps.get(key, -1) + 1

    def change(self) -> Tensor | None:
        """Forecast to add to the residual stream instead of running the middle layers; None to run them."""
        step, known = self._steps.get(self._key, 0), self._changes.get(self._key, [])
        if step >= len(self._plan) or not self._plan[step] or len(known) < 2:
            return None
        (before, older), (last, newer) = known
        return torch.lerp(older, newer, (step - before) / (last - before))

    def keep(self, entered: Tensor, left: Tensor) -> None:
        """Keep the middle layers' change of the residual stream, fp32 [L,H] before and after."""
        if any(self._plan):
            known = self._changes.setdefault(self._key, [])
            self._changes[self._key] = [*known[-1:], (self._steps[self._key], left - entered)]
