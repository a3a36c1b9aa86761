"""What this device reaches now in one large product and one large copy: the roof that measured rates stand below."""

import torch

from inference.latency.clock import time_call

_SIDE = {"cuda": 8192, "cpu": 1024}
_COPIED = {"cuda": 1 << 31, "cpu": 1 << 27}  # bytes


def measure_roof(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The best of several: 10^12 FLOP/s of a square product in `dtype`, and 10^12 bytes per second of a copy, reads and
    writes together."""
    side = _SIDE[device.type]
    generator = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    product = time_call(lambda: a @ b, device)
    source = torch.randn(_COPIED[device.type] // 4, generator=generator, device=device)
    target = torch.empty_like(source)
    copied = time_call(lambda: target.copy_(source), device)
    return {
        "side": side,
        "tflops": round(2 * side**3 / product["min"] / 1e12, 4),
        "copy_tbps": round(2 * _COPIED[device.type] / copied["min"] / 1e12, 4),
    }
