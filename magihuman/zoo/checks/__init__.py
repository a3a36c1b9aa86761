"""Checks of this implementation against stored vectors, one small function per kind of case.

To add a kind: write `check(case) -> list[Result]` in a module here and name it in KINDS. A case whose file name
starts with none of the prefixes is reported as unsupported, as is one whose check raises `Unsupported`, and one that
states a parameter which its check does not read (`Parameters`).
"""

from collections.abc import Callable, Iterator, Mapping
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


NO_EFFECT = frozenset(
    [
        # Of the making of the vectors: random numbers are stored, errors were measured.
        *("seed", "generator_seed", "note", "dtype_notes", "errors", "bf16_vs_fp32"),
        # Not used by the released code (SPEC O8).
        *("spatial_rope_interpolation", "ref_audio_offset", "support_ref_audio", "txt_encoder_type", "activation_type"),
        *("tread_config", "checkpoint_qk_layernorm_rope", "enable_flops_recording", "exp_name"),
        # Files of other networks, and settings of what a case does not compute.
        *("audio_model_path", "txt_model_path", "vae_model_path", "use_sr_model", "sr_model_path", "use_turbo_vae"),
        *("student_config_path", "student_ckpt_path", "model_type", "sample_rate", "requires_grad", "in_channels"),
    ]
)
"""Parameters that decide no number of a case, and may be stated all the same."""


class Unsupported(Exception):
    """The implementation cannot run this case; the message says why."""


class Parameters(dict[str, Any]):
    """Parameters that a case states; remembers which of them were read, so that none is ignored unnoticed."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({key: _remembering(value) for key, value in values.items()})
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` where none is stated."""
        self._read.add(key)
        return super().get(key, default)

    def require(self, **values: Any) -> None:
        """Raises Unsupported for a parameter of another value than the only possible one, if it is stated."""
        for key, value in values.items():
            if self.get(key, value) != value:
                raise Unsupported(f"{key}={self[key]} is stated, and only {value} is possible")

    def unread(self) -> Iterator[str]:
        """Parameters that were not read, as `name=value`; without those of `NO_EFFECT`."""
        for key, value in self.items():
            if key in NO_EFFECT:
                continue
            if key not in self._read:
                yield f"{key}={value}"
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, Parameters) and key in self._read:
                    yield from part.unread()


def _remembering(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Parameters(value)
    return [_remembering(part) for part in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class VectorCase:
    """One file of a vector folder: its name, its parameters and its tensors."""

    name: str
    meta: Parameters
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


def agree(what: str, ours: object, stated: object) -> Result:
    """A stated parameter against what the stored tensors, or other parameters, say."""
    same = ours == stated
    return Result(what if same else f"{what}: {stated} is stated, not {ours}", float(not same), 0.0)


def compare_relative(what: str, ours: "Tensor", theirs: "Tensor", tolerance: float) -> Result:
    """Relative L2 distance."""
    distance = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    return Result(f"{what} (relative L2)", distance.item(), tolerance)
