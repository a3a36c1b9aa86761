"""Faster networks in tiers (optimisation levels): `prepare(denoiser, tier)` returns one that is called like the denoiser.

    reference      the network as written
    exact          bit-equal to it, with all that never changes made once
    fast           the same mathematics through other kernels, within a stated bound of fp32
    fp8, fp8_attention, cached      approximate; never chosen unless named

`TIERS` lists them; `Options` is what a tier is made of. The first import is free of torch.
"""

from typing import TYPE_CHECKING, Any

from inference.fast.tiers import TIERS, Options, check_tier, options_for

if TYPE_CHECKING:
    import torch

    from magihuman.models.denoiser import Denoiser

__all__ = ["TIERS", "Options", "check_tier", "options_for", "prepare", "require_kernel"]


def prepare(
    denoiser: "Denoiser",
    tier: str,
    *,
    device: "torch.device | str | None" = None,
    release: bool = False,
    **changes: Any,
) -> "Denoiser":
    """A denoiser that computes as a tier says, for inference.

    Args:
        denoiser: stays usable, and shares the memory of what keeps its form, unless `release` takes its layers.
        tier: a name of TIERS; "reference" returns the denoiser unchanged.
        device: where it will run, if that is not where its weights are now.
        release: take the layers away from `denoiser` one by one, so that no matrix is held twice.
        changes: fields of `Options` that shall differ from the tier's own.

    Raises:
        UserError: an unknown tier or option, or one that cannot run here, with the reason.
    """
    check_tier(tier)
    if tier == "reference" and not changes:
        return denoiser
    import torch

    from inference.fast.transformer import FastDenoiser
    from magihuman.errors import UserError

    if isinstance(denoiser, FastDenoiser):
        raise UserError(f"this network was prepared for tier={denoiser.tier}; load the checkpoint again")
    place = torch.device(device) if device is not None else denoiser.model.adapter.rope.bands.device
    options = options_for(tier, place.type, **changes)
    return FastDenoiser(denoiser, tier, options, place, release)


def require_kernel(tier: str, device: "torch.device", dtype: "torch.dtype") -> None:
    """Ask before weights are loaded whether the attention kernel that a tier names can run.

    Raises:
        UserError: it cannot, with the reason and what to use instead.
    """
    from inference.fast.attention_kernels import refusal
    from magihuman.errors import UserError

    name = options_for(tier, device.type).attention
    reason = None if name in ("auto", "reference") else refusal(name, device, dtype)
    if reason is not None:
        raise UserError(f"tier={tier} cannot run here: {reason}")
