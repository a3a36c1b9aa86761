"""Checks of this implementation against stored vectors, one small function per kind of case.

To add a kind: write `check(case) -> list[Result]` in a module here and name it in KINDS. A case whose file name
starts with none of the prefixes is reported as unsupported, as is one whose check raises `Unsupported`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

KINDS = {
    "dit_": "network:check_dit",
    "coords_": "packing:check_coords",
    "data_proxy": "packing:check_data_proxy",
    "local_ranges": "packing:check_local_ranges",
    "text_pad": "packing:check_text_pad",
    "unipc_": "solver_steps:check_unipc",
    "ddim_": "solver_steps:check_renoise",
    "sde_": "solver_steps:check_sde",
    "sr_sigma_table": "solver_steps:check_sr_sigma_table",
    "wan22_": "autoencoders:check_wan",
    "wan22_latent_stats": "autoencoders:check_wan_statistics",
    "oobleck_": "autoencoders:check_oobleck",
    "audio_encode_": "autoencoders:check_audio_encode",
    "audio_utils": "autoencoders:check_audio_utils",
    "turbo_vaed_": "autoencoders:check_turbo",
    "image_": "frames:check_image",
    "video_uint8": "frames:check_video_uint8",
    "sr_prepare": "frames:check_sr_prepare",
    "loop_": "loop:check_loop",
}
"""Prefix of a case's name -> module here and function."""


class Unsupported(Exception):
    """The implementation cannot run this case; the message says why."""


@dataclass(frozen=True)
class VectorCase:
    """One file of a vector folder: its name, its meta data and its tensors."""

    name: str
    meta: dict[str, Any]
    tensors: "dict[str, Tensor]"

    def group(self, prefix: str) -> "dict[str, Tensor]":
        """Tensors whose name starts with the prefix, without it."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


@dataclass(frozen=True)
class Result:
    """One comparison: name, error, and tolerance (0: equal bit for bit)."""

    what: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


Check = Callable[[VectorCase], list[Result]]


def kind_of(name: str) -> str | None:
    """Longest prefix in KINDS that the case's name starts with."""
    matching = [prefix for prefix in KINDS if name.startswith(prefix)]
    return max(matching, key=len) if matching else None


def checker(kind: str) -> Check:
    """The function that checks a kind."""
    module, function = KINDS[kind].split(":")
    return getattr(import_module(f"{__name__}.{module}"), function)


def compare(what: str, ours: "Tensor", theirs: "Tensor", tolerance: float = 0.0) -> Result:
    """Largest absolute difference; infinite where the shapes differ."""
    if ours.shape != theirs.shape:
        return Result(f"{what} (shape {list(ours.shape)}, expected {list(theirs.shape)})", float("inf"), tolerance)
    if not ours.numel():
        return Result(what, 0.0, tolerance)
    return Result(what, (ours.double() - theirs.double()).abs().max().item(), tolerance)


def compare_relative(what: str, ours: "Tensor", theirs: "Tensor", tolerance: float) -> Result:
    """Relative L2 distance."""
    distance = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    return Result(f"{what} (relative L2)", distance.item(), tolerance)
