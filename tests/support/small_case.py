"""A small case of the benchmark."""

from dataclasses import replace

from inference.benchmark.roofline.cases import ClipCase, DenoisingStage
from magihuman.models.config import DiTConfig, PackConfig


def small_case() -> ClipCase:
    """Two stages as at 1080p: the second has local layers."""
    config = DiTConfig(4, 32, 8, 2, 12, 4, 5, mm_layers=(0, 3), gelu7_layers=(0,))
    base = DenoisingStage("base", config, PackConfig(), 5, 4, 4, 9, 6, 2)
    local = replace(config, local_attn_layers=(0, 1, 3))
    sr = DenoisingStage("sr", local, PackConfig(coords_style="v1", frame_receptive_field=1), 5, 8, 8, 9, 6, 2)
    return ClipCase("tiny", "small", False, 1.0, (base, sr), (4, 4, 4))
