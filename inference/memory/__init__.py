"""Offloading and weight storage: which weights are on the GPU in which format, and which stay between stages.

`Stages` brings a stage's modules to the device and takes them away; `prepare_transformer` gives the network its
device (resident, or streamed layer by layer) and its storage (bf16, fp8, int4); `CachedText` keeps prompts' features
on disk. `python -m magihuman.zoo plan` computes what each choice needs.
"""

from inference.memory.offload import LayerStream, Resident, Stages, check_memory, prepare_transformer
from inference.memory.quantization import store_weights
from inference.memory.text_cache import CachedText, encoder_identity

__all__ = [
    "CachedText",
    "LayerStream",
    "Resident",
    "Stages",
    "check_memory",
    "encoder_identity",
    "prepare_transformer",
    "store_weights",
]
