"""Hyperparameters of the causal decoder, and its stride, parameters, FLOPs and state size; without torch."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any, Literal

from magihuman.errors import UserError
from magihuman.schema import check_limits

RGB = 3
REACH = 2
"""Past frames that a convolution over time sees."""
POSITIONS = 8192
"""Latent positions decoded at once: one latent frame of 1080p."""
LONGEST_CHUNK = 8


@dataclass(frozen=True)
class DecoderStage:
    """Residual blocks at one resolution, then upsampling.

    Attributes:
        width: channels.
        blocks: residual blocks.
        kind: of the two convolutions of a block: `full` 3x3x3 both; `split` 1x3x3 and 3x1x1, then 1x3x3.
        up: (time, space) upsampling after the blocks; (1, 1) in the last stage only.
    """

    width: int
    blocks: int
    kind: Literal["full", "split"]
    up: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class CausalDecoderConfig:
    """Hyperparameters of a `causal_decoder.CausalDecoder`.

    Attributes:
        latent_channels: C.
        stages: from the latents' resolution to the pixels'.
        patch: (time, space) pixels per position of the last stage.

    Raises:
        UserError: impossible sizes.
    """

    latent_channels: int
    stages: tuple[DecoderStage, ...]
    patch: tuple[int, int] = (1, 2)

    def __post_init__(self) -> None:
        if not self.stages or self.latent_channels < 1:
            raise UserError("a student decoder needs latent_channels of at least 1 and at least one stage")
        for number, stage in enumerate(self.stages):
            numbers = (stage.width, stage.blocks, *stage.up)
            if stage.kind not in ("full", "split") or len(stage.up) != 2 or min(numbers) < 1:
                raise UserError(
                    f"student decoder: stage {number} is {asdict(stage)}; kind is full or split, up is two "
                    "numbers, and all numbers are at least 1"
                )
            last = number == len(self.stages) - 1
            if last != (tuple(stage.up) == (1, 1)):
                raise UserError(
                    f"student decoder: stage {number} upsamples by {list(stage.up)}; the last stage does not "
                    "upsample (patch does it), all others do"
                )
        if len(self.patch) != 2 or min(self.patch) < 1:
            raise UserError(f"student decoder: patch {list(self.patch)} must be two numbers of at least 1")

    @property
    def stride(self) -> tuple[int, int, int]:
        """(frames, rows, columns) of pixels per latent."""
        time = prod(stage.up[0] for stage in self.stages) * self.patch[0]
        space = prod(stage.up[1] for stage in self.stages) * self.patch[1]
        return time, space, space

    @staticmethod
    def chunk(positions: int) -> int:
        """Default number of latent frames of that many positions decoded at once."""
        return min(LONGEST_CHUNK, max(1, POSITIONS // positions))

    def grids(self) -> list[tuple[int, int]]:
        """Per stage: (frames per latent frame, positions per latent position)."""
        grids = [(1, 1)]
        for stage in self.stages[:-1]:
            time, area = grids[-1]
            grids.append((time * stage.up[0], area * stage.up[1] ** 2))
        return grids

    def state_size(self) -> int:
        """Elements of the streaming state per latent position."""
        return sum(REACH * into * area for into, _, taps, (_, area) in self.layers() if taps in (3, 27))

    def widest(self) -> int:
        """Elements of the largest activation per latent frame and latent position."""
        return max(stage.width * time * area for stage, (time, area) in zip(self.stages, self.grids(), strict=True))

    def layers(self) -> Iterator[tuple[int, int, int, tuple[int, int]]]:
        """Every convolution and linear map: (channels in, channels out, kernel taps, its stage's `grids` entry)."""
        yield self.latent_channels, self.stages[0].width, 27, (1, 1)
        for stage, after, grid in zip(self.stages, [*self.stages[1:], None], self.grids(), strict=True):
            for _ in range(stage.blocks):
                for taps in (27, 27) if stage.kind == "full" else (9, 3, 9):
                    yield stage.width, stage.width, taps, grid
            if after is not None:
                yield stage.width, after.width * stage.up[0] * stage.up[1] ** 2, 1, grid
        yield self.stages[-1].width, RGB * self.patch[0] * self.patch[1] ** 2, 9, self.grids()[-1]

    def parameter_count(self) -> int:
        """Number of weights and biases."""
        return sum(out * (into * taps + 1) for into, out, taps, _ in self.layers())

    def flops(self, frames: int, height: int, width: int) -> int:
        """FLOPs of the convolutions for latents [T,h,w]; the first latent of a clip takes fewer."""
        return sum(
            2 * into * out * taps * (time * (frames - 1) + 1) * area * height * width
            for into, out, taps, (time, area) in self.layers()
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "latent_channels": self.latent_channels,
            "stages": [{**asdict(stage), "up": list(stage.up)} for stage in self.stages],
            "patch": list(self.patch),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CausalDecoderConfig":
        """Raises UserError for unknown, missing or impossible settings."""
        check_limits(values, "student decoder")
        try:
            stages = tuple(
                DecoderStage(**{**stage, "up": tuple(stage.get("up", (1, 1)))}) for stage in values["stages"]
            )
            given = {**values, "stages": stages}
            if "patch" in given:
                given["patch"] = tuple(given["patch"])
            return cls(**given)
        except (KeyError, TypeError) as error:
            known = ", ".join(field.name for field in fields(cls))
            raise UserError(f"these are not the settings of a student decoder ({known}): {error}") from error
