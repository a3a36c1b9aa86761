"""What must hold before and after a clip is made, each with a message that says what to change."""

from collections.abc import Sequence
from typing import Any

import torch

from inference.settings import Settings
from magihuman.errors import UserError
from magihuman.io.export import ExportConfig
from magihuman.models.config import PackConfig
from magihuman.models.latent_contract import Contract


def require_role(config: ExportConfig, name: object, first: bool) -> None:
    """Raises UserError for a checkpoint of the other stage.

    A second stage says so in its provenance. All others of ours are first stages, unless they have a second's
    coordinates: such a checkpoint may serve as either.
    """
    released = str(config.provenance.get("released", ""))
    second = released.endswith("_sr") or config.provenance.get("stage") == "second"
    known = second or bool(released) or config.pack.coords_style == "v2"
    if first == second and known:
        use = (
            "second stage; give it as sr="
            if second
            else "first stage; one for the second, as tiny/sr, is wanted"
        )
        raise UserError(f"{name} is {released or 'a checkpoint'}, for the {use}")


def require_decoder(decoder: Any, contract: Contract) -> None:
    """Raises UserError for a decoder of other latents than the codecs'."""
    found = decoder.channels, tuple(decoder.stride)
    wanted = contract.video_channels, tuple(contract.video_stride)
    if found != wanted:
        raise UserError(
            f"the decoder takes {found[0]} channels at strides {found[1]}, the codecs have {wanted}"
        )


def require_positions(
    pack: PackConfig, text: Sequence[torch.Tensor], negative: Sequence[torch.Tensor] | None, audio: int
) -> None:
    """Raises UserError for a single token, for which coordinates v1 have no place (SPEC 2.1)."""
    if pack.coords_style != "v1":
        return
    if any(len(features) < 2 for features in text):
        raise UserError("the second stage needs a prompt of at least two tokens; say more")
    if any(len(features) < 2 for features in negative or ()):
        raise UserError(
            "the second stage needs a negative prompt of at least two tokens; give one, or sr_cfg=1"
        )
    if audio < 2:
        raise UserError("the second stage needs at least two audio latents; make a longer clip")


def require_finite(video: torch.Tensor, audio: torch.Tensor, settings: Settings) -> None:
    """Raises UserError for latents that hold NaN or infinity."""
    if not (video.isfinite().all() and audio.isfinite().all()):
        raise UserError(
            f"the network's output is not finite at solver={settings.solver}, steps={settings.steps}; "
            "its training diverged, or the guidance is far too strong"
        )
