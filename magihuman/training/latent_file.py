"""Latents that a diffusion model made, with the frames that a teacher decodes them to: what a decoder will meet.

They come from one safetensors file (`python -m inference.sample_latents` writes it): video [N,C,T,h,w] fp16 and frames
[N,3,F,H,W] uint8. Clips are read from the disk one by one.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from magihuman.errors import UserError


class SampledLatents:
    """Random access to the clips of such a file.

    Args:
        path: of the file. channels: C of the latents that are wanted; codec: theirs, where the file says its own.

    Raises:
        UserError: it is missing, or holds something else.
    """

    def __init__(self, path: str | Path, channels: int, codec: str | None = None) -> None:
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise UserError(
                f"recipe.sampled={path} is not a file; make it with `python -m inference.sample_latents`"
            )
        try:
            file = safe_open(path, "pt")
            self._parts = {name: file.get_slice(name) for name in ("video", "frames")}
            found = (file.metadata() or {}).get("codec", codec)
        except (SafetensorError, OSError) as error:
            raise UserError(f"recipe.sampled={path} cannot be read ({error}); make it again") from error
        if codec not in (None, found):
            raise UserError(
                f"recipe.sampled={path} holds latents of {found!r}, not of {codec!r}; make it again"
            )
        self.shape, self.frames = (self._parts[name].get_shape() for name in ("video", "frames"))
        if self.shape[1] != channels or self.frames[0] != self.shape[0]:
            raise UserError(
                f"recipe.sampled={path} holds latents {self.shape} and frames {self.frames}; this training needs "
                f"{channels} channels and frames for each"
            )

    def __len__(self) -> int:
        return int(self.shape[0])

    def fits(self, latents: Sequence[int], frames: Sequence[int]) -> bool:
        """Whether the clips have these shapes, [C,T,h,w] and [3,F,H,W]."""
        return list(latents) == self.shape[1:] and list(frames) == self.frames[1:]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """A clip: latents fp32 [C,T,h,w], frames uint8 [3,F,H,W]."""
        return self._parts["video"][number].float(), self._parts["frames"][number]

    def read(self, place: float) -> tuple[Tensor, Tensor]:
        """The clip at `place` in [0, 1)."""
        return self[int(place * len(self))]
