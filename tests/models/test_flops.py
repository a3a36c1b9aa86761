"""FLOPs of a forward pass against torch's own counter, with and without windows of frames."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from magihuman import zoo
from magihuman.errors import UserError
from magihuman.models.attention import local_mask
from magihuman.models.config import DiTConfig, PackConfig
from magihuman.models.flops import attention_pairs, forward_flops
from magihuman.models.gpu_specs import GPUS, gpu, recognise


def _counted(config: DiTConfig, backend: str, window: int) -> int:
    denoiser = zoo.build(config, PackConfig(frame_receptive_field=window), compute_dtype=torch.float32, seed=0)
    denoiser.model.attention_backend = backend
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser(torch.zeros(1, 3, 5, 4, 4), torch.zeros(1, 9, 4), [torch.zeros(6, 5)])
    return counter.get_total_flops()


def test_windows_are_counted_as_torch_counts_them() -> None:
    layers = {"mm_layers": (0, 2), "gelu7_layers": (0,)}
    local = DiTConfig(3, 32, 8, 2, 12, 4, 5, **layers, local_attn_layers=(0, 1, 2))
    for window in (0, 1, 2, 7):
        computed = forward_flops(local, 20, 9, 6, frames=5, window=window)
        assert computed.total == _counted(local, "windowed", window)
    wide, full = (forward_flops(local, 20, 9, 6, frames=5, window=w) for w in (1, None))
    assert wide.attention < full.attention
    assert wide.products == full.products


def test_pairs_are_those_of_the_mask() -> None:
    for window in (0, 1, 3, 20):
        assert attention_pairs(24, 7, 6, window) == int(local_mask(24, 7, 6, window).sum())
    assert attention_pairs(24, 7) == 31**2


def test_devices_by_name() -> None:
    assert recognise("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert recognise("NVIDIA H100 PCIe") is GPUS["h100-pcie"]
    assert recognise("NVIDIA H200") is GPUS["h200"]
    assert recognise("NVIDIA H800") is GPUS["h100"]
    assert recognise("NVIDIA H100 NVL") is GPUS["h100-nvl"]
    assert recognise("NVIDIA B200") is GPUS["b200"]
    assert recognise("NVIDIA L40S") is GPUS["l40s"]
    assert recognise("NVIDIA GeForce RTX 4090") is GPUS["4090"]
    assert {recognise("NVIDIA A100-SXM4-80GB"), recognise("NVIDIA A100 80GB PCIe")} == {GPUS["a100"]}


@pytest.mark.parametrize(
    "name",
    [
        *("Tesla T4", "NVIDIA RTX A1000", "NVIDIA RTX A1000 Laptop GPU", "NVIDIA A10", "NVIDIA L40", "NVIDIA H20"),
        *("NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA H200 NVL", "NVIDIA A100-SXM4-40GB"),
        *("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 5090 D"),
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ],
)
def test_other_devices_of_similar_names_are_unknown(name: str) -> None:
    assert recognise(name) is None


def test_devices_by_key() -> None:
    assert gpu("h200").bandwidth > gpu("h100").bandwidth
    with pytest.raises(UserError, match="choose one of h100"):
        gpu("h101")
