"""A setting that changes over the training."""

from dataclasses import dataclass

from magihuman.errors import UserError


@dataclass(frozen=True)
class Ramp:
    """`start` until the share `begin` of the training is done, then linearly to `end`, reached at share
    `finish`.

    Raises:
        UserError: unless 0 <= begin <= finish <= 1.
    """

    start: float
    end: float
    begin: float = 0.0
    finish: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.finish <= 1:
            raise UserError(
                f"a ramp needs 0 <= begin <= finish <= 1, not begin={self.begin}, finish={self.finish}"
            )

    def at(self, progress: float) -> float:
        """Value at `progress` in [0, 1] of the training."""
        if progress >= self.finish:
            return self.end
        share = max(0.0, progress - self.begin) / (self.finish - self.begin)
        return self.start + (self.end - self.start) * share


def value_at(setting: float | Ramp, progress: float) -> float:
    """A constant, or the ramp's value."""
    return setting.at(progress) if isinstance(setting, Ramp) else float(setting)
