"""What this device reaches now in one large product and one large copy: the roof that measured rates stand below."""

import torch

from inference.benchmark.timers import time_call, undisturbed

_SIDE = {"cuda": 8192, "cpu": 1024}
_COPIED = {"cuda": 1 << 31, "cpu": 1 << 27}  # bytes


def measure_roof(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """10^12 FLOP/s of a square product in `dtype`, and 10^12 bytes per second of a copy, reads and
    writes together; the best of several, or by the processor's time."""
    side = _SIDE[device.type]
    generator = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    product = time_call(lambda: a @ b, device)
    source = torch.randn(_COPIED[device.type] // 4, generator=generator, device=device)
    target = torch.empty_like(source)
    copied = time_call(lambda: target.copy_(source), device)
    return {
        "side": side,
        "tflops": float(f"{2 * side**3 / min(product['min'], undisturbed(product)) / 1e12:.4g}"),
        "copy_tbps": float(
            f"{2 * _COPIED[device.type] / min(copied['min'], undisturbed(copied)) / 1e12:.4g}"
        ),
    }
