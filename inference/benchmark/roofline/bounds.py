"""Times that cannot be beaten, and how near a measured one is: work divided by a device's limits."""

from dataclasses import dataclass, replace

from inference.benchmark.roofline.work import Work
from magihuman.models.gpu_specs import Gpu

PUBLISHED = {
    "256p": {"base": 1.6, "decode": 0.4, "total": 2.0},
    "540p": {"base": 1.6, "sr": 5.1, "decode": 1.3, "total": 8.0},
    "1080p": {"base": 1.6, "sr": 31.0, "decode": 5.8, "total": 38.4},
}
"""Seconds that the paper gives for a 5-second clip on one H100."""


@dataclass(frozen=True)
class Limits:
    """What a device can do at most: FLOP/s, bytes per second of its memory and of the link to the host."""

    name: str
    flops: float
    bandwidth: float
    link: float

    @classmethod
    def of(cls, device: Gpu, tflops: float | None = None, bandwidth: float | None = None) -> "Limits":
        """Those of the data sheet, or measured ones in their place (10^12 FLOP/s, 10^12 bytes per second)."""
        sheet = cls(device.name, device.bf16, device.bandwidth, device.link)
        name = sheet.name + (f" at {tflops:g} TFLOP/s" if tflops else "")
        return replace(
            sheet,
            name=name,
            flops=tflops * 1e12 if tflops else sheet.flops,
            bandwidth=bandwidth * 1e12 if bandwidth else sheet.bandwidth,
        )


@dataclass(frozen=True)
class Bound:
    """The least time of a stage in seconds, and what takes it: compute, memory or link."""

    seconds: float
    by: str


def bound(work: Work, limits: Limits) -> Bound:
    """Where arithmetic and traffic overlap perfectly."""
    times = {
        "compute": work.flops / limits.flops,
        "memory": work.moved / limits.bandwidth,
        "link": work.sent / limits.link,
    }
    by = max(times, key=lambda name: times[name])
    return Bound(times[by], by)


def utilisation(work: Work, seconds: float, peak: float) -> float:
    """Share of the peak FLOP/s that a measured time means (MFU)."""
    return work.flops / seconds / peak
