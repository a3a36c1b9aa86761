"""Tiers (optimisation levels): permitted deviation from the reference, and the options of each. Without torch.

Exactness: E0, bit-equal to the reference on the same device; E1, the same mathematics with other kernels, sum orders
or fewer roundings, within a stated bound of the fp32 reference; approximate, other mathematics, off by default and
named with every result.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from magihuman.errors import UserError

COMPILE = ("off", "auto", "static")
ATTENTION = ("reference", "auto", "plain", "sdpa", "cudnn", "flash2", "fa3", "fp8", "fp8_emulated")
FP8 = ("off", "shared", "all")


TIERS = {
    "reference": "E0",  # the network as it is written in magihuman.models.dit
    "exact": "E0",  # the reference's arithmetic, with all that never changes made once
    "fast": "E1",  # the same mathematics through other kernels: padded, compiled, experts in one product
    "fp8": "approximate",  # fast, with block products in 8-bit floats at fixed scales
    "fp8_attention": "approximate",  # fp8, and attention in 8-bit floats (FlashAttention-3, Hopper)
    "cached": "approximate",  # fast, with the middle layers' change forecast in some of many steps
}
"""Exactness of every tier."""


@dataclass(frozen=True)
class Options:
    """Options of a tier; each can be switched alone, to measure its gain.

    Attributes:
        planes: gate and linear rows of the up projection in two blocks instead of alternating.
        pad: feed-forward widths padded with zeros so that rows start where tensor cores want them.
        grouped: one product for the experts of a layer (`torch.nn.functional.grouped_mm`).
        sort: where layers share weights, rows of a batch lie sample by sample, so that attention permutes nothing.
        compile: "off"; "static", one compilation per geometry; "auto", the first geometry is static and a second one
            makes the number of tokens symbolic.
        graphs: a CUDA graph per geometry, for short sequences.
        attention: a name of ATTENTION; "reference" is the reference's own choice.
        fp8: which layers multiply in 8 bits: "off", "shared" (those without experts), "all".
        cache: the middle layers' change is forecast in some steps, see `inference.fast.step_cache`.
    """

    planes: bool = True
    pad: bool = False
    grouped: bool = False
    sort: bool = False
    compile: str = "off"
    graphs: bool = False
    attention: str = "reference"
    fp8: str = "off"
    cache: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("compile", COMPILE), ("attention", ATTENTION), ("fp8", FP8)):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)} is unknown; choose one of {', '.join(choices)}")


def check_tier(name: str) -> None:
    """Raises UserError for an unknown tier, listing the choices."""
    if name not in TIERS:
        raise UserError(f"tier={name} is unknown; choose one of {', '.join(TIERS)}")


def options_for(tier: str, device_type: str, **changes: Any) -> Options:
    """Options of a tier on a device of this type ("cuda" or "cpu"), with some of them changed.

    On the CPU the E1 tiers leave out what only pays on a GPU: compilation takes half a minute there, and the CPU's
    products do not care where rows start.

    Raises:
        UserError: an unknown tier, option or value.
    """
    check_tier(tier)
    known = [field.name for field in fields(Options)]
    if unknown := set(changes) - set(known):
        raise UserError(f"tier {tier} has no option {', '.join(sorted(unknown))}; the options are {', '.join(known)}")
    gpu = device_type == "cuda"
    # Bit by bit as the reference, which sorts the rows of the up projection on the CPU only.
    options = Options(planes=not gpu)
    if tier not in ("reference", "exact"):
        options = Options(
            pad=gpu, grouped=gpu, sort=True, compile="auto" if gpu else "off", graphs=gpu, attention="auto"
        )
    if tier in ("fp8", "fp8_attention"):
        options = replace(options, pad=True, fp8="shared")
    if tier == "fp8_attention":
        options = replace(options, attention="fp8" if gpu else "fp8_emulated")
    if tier == "cached":
        options = replace(options, cache=True, graphs=False)
    return replace(options, **changes)
