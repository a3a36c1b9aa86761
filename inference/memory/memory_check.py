"""Memory check of a command before weights are loaded: do its clips fit into the GPU?"""

from typing import TYPE_CHECKING

import torch

from magihuman.codecs.bundle import bundle_spec
from magihuman.codecs.causal_decoder_config import CausalDecoderConfig
from magihuman.codecs.costs import USUAL_TEXT
from magihuman.zoo.memory_plan import ClipRequest, peak, require_memory

if TYPE_CHECKING:
    from inference.loading import Source
    from inference.settings import Settings


def request_for(source: "Source", settings: "Settings", batch: int) -> ClipRequest:
    """A batch of such clips as a request of the memory planner."""
    contract, second = source.config.contract, settings.sr
    ours = source.decoder
    student = CausalDecoderConfig.from_dict(ours.network) if ours is not None and ours.layout == "causal" else None
    return ClipRequest(
        base=source.config.model,
        patch=source.config.pack.patch_size,
        stride=contract.video_stride,
        released=bundle_spec(source.config.codecs).published,
        frames=settings.frames,
        audio=settings.audio,
        height=settings.height,
        width=settings.width,
        text=USUAL_TEXT,  # the true number is known when the text encoder is loaded; it matters little
        batch=batch,
        guided=settings.guidance.needed,
        cfg_passes=settings.cfg_passes,
        second=source.second.model if source.second is not None and second is not None else None,
        enlarged=settings.size if second is not None else (0, 0),
        sr_guided=second is not None and second.guidance != 1,
        turbo=source.turbo is not None and student is None,
        student=student,
        tile=source.options.tile,
        compute=source.dtype.itemsize,
        memory=source.options.memory,
        weights=source.options.weights,
    )


def check_fits(source: "Source", settings: "list[Settings]", batch: int) -> None:
    """Refuse clips that the GPU cannot hold; nothing on the CPU.

    Args:
        batch: how many clips are computed at once.

    Raises:
        UserError: one line with the computed need and the settings that help.
    """
    if source.device.type != "cuda" or not settings:
        return
    available = torch.cuda.get_device_properties(source.device).total_memory
    worst = max((request_for(source, each, batch) for each in dict.fromkeys(settings)), key=peak)
    require_memory(worst, available)
