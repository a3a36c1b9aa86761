"""Forward-mode differentiation through functions whose reverse-mode gradient is hand-written.

with torch.no_grad(), forward_ad.dual_level():
    video_v, audio_v = denoiser(forward_ad.make_dual(video, direction), audio, text)
    derivative = forward_ad.unpack_dual(video_v).tangent
"""

from typing import Any

import torch
from torch.autograd import forward_ad


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`, or where an argument has a forward-mode tangent its `forward`, whose operators torch differentiates.

    Not a `jvp` method of the functions: torch.compile does not trace functions that define one.
    """
    tensors = (value for value in arguments if isinstance(value, torch.Tensor))
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        return function.forward(*arguments)
    return function.apply(*arguments)
