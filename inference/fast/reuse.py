"""Step cache: in some steps of a long trajectory the middle layers' change of the residual stream is reused.

The idea is that of TeaCache (Liu et al. 2024, arXiv 2411.19108) and first-block caching, with the decision taken
beforehand from the number of steps: a decision from the data would make the host wait for the device in every step,
and the same request would not always cost the same.
"""

from collections.abc import Hashable

from torch import Tensor

SHORTEST = 12
"""Steps from which anything is reused: few-step students change too much between theirs."""


def reused_steps(steps: int) -> tuple[bool, ...]:
    """Which steps of a trajectory reuse: every second one between the first quarter and the last eighth.

    The first steps decide what is where, the last ones the detail.
    """
    start, stop = -(-steps // 4), steps - max(2, steps // 8)
    return tuple(steps >= SHORTEST and start <= i < stop and (i - start) % 2 == 1 for i in range(steps))


class StepCache:
    """The middle layers' last change for every pass of a trajectory: each side of the guidance may be a pass."""

    def __init__(self) -> None:
        self._plan: tuple[bool, ...] = ()
        self._steps: dict[Hashable, int] = {}
        self._changes: dict[Hashable, Tensor] = {}
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
        """What to add to the residual stream instead of running the middle layers now; None to run them."""
        step = self._steps.get(self._key, len(self._plan))
        return self._changes.get(self._key) if step < len(self._plan) and self._plan[step] else None

    def keep(self, entered: Tensor, left: Tensor) -> None:
        """Remember what the middle layers did to the residual stream, fp32 [L,H] before and after."""
        if any(self._plan):
            self._changes[self._key] = left - entered
