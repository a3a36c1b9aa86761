"""Peak rates and memory of graphics processors, from their makers' data sheets; no torch."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from magihuman.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Gpu:
    """Limits of a device.

    Attributes:
        bf16, fp8: dense FLOP/s of matrix products that are summed in fp32; fp8 is None where there is no such unit.
        bandwidth: bytes per second of the device's memory; memory: its bytes.
        link: bytes per second to the host in one direction.
        units: multiprocessors.
    """

    name: str
    bf16: float
    fp8: float | None
    bandwidth: float
    memory: float
    link: float
    units: int


_GEN4, _GEN5 = 32e9, 64e9

GPUS = {
    "h100": Gpu("H100 SXM", 989e12, 1979e12, 3.35e12, 80e9, _GEN5, 132),
    "h100-pcie": Gpu("H100 PCIe", 756e12, 1513e12, 2.0e12, 80e9, _GEN5, 114),
    "h100-nvl": Gpu("H100 NVL", 835e12, 1671e12, 3.9e12, 94e9, _GEN5, 132),
    "h200": Gpu("H200 SXM", 989e12, 1979e12, 4.8e12, 141e9, _GEN5, 132),
    "b200": Gpu("B200 SXM", 2250e12, 4500e12, 8.0e12, 180e9, _GEN5, 148),
    "a100": Gpu("A100 SXM 80 GB", 312e12, None, 2.04e12, 80e9, _GEN4, 108),
    "l40s": Gpu("L40S", 362e12, 733e12, 0.864e12, 48e9, _GEN4, 142),
    "4090": Gpu("RTX 4090", 165e12, 330e12, 1.008e12, 24e9, _GEN4, 128),
    "5090": Gpu("RTX 5090", 210e12, 419e12, 1.792e12, 32e9, _GEN5, 170),
}


# Words in the names that torch gives to devices which do not make it another one, and sizes of memory.
_PLAIN = re.compile(r"nvidia|geforce|rtx|sxm\d*|pcie|hbm\w+")


def gpu(name: str, setting: str = "device") -> Gpu:
    """The device called `name`, the value of a setting.

    Raises:
        UserError: an unknown one, listing the choices.
    """
    if name not in GPUS:
        raise UserError(f"{setting}={name} is unknown; choose one of {', '.join(GPUS)}")
    return GPUS[name]


def recognise(device_name: str) -> Gpu | None:
    """The device that torch gives this name, or None; also None for its laptop, MIG and other variants of less power."""
    words = set(re.split(r"[\s-]+", device_name.lower().replace("h800", "h100")))
    for key in sorted(GPUS, key=len, reverse=True):  # "h100-pcie" before "h100"
        own, memory = set(key.split("-")), f"{GPUS[key].memory / 1e9:.0f}gb"
        if own <= words and all(_PLAIN.fullmatch(word) for word in words - own - {memory}):
            return GPUS[key]
    return None


def peak_flops(device: "torch.device") -> float | None:
    """bf16 peak of a known GPU, in FLOP/s; None for other devices."""
    if device.type != "cuda":
        return None
    import torch

    known = recognise(torch.cuda.get_device_name(device))
    return None if known is None else known.bf16
