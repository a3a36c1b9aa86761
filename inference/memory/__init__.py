"""Offloading and weight storage: which weights are on the GPU in which format, and which stay between stages.

`offload.Stages` brings a stage's modules to the device and takes them away; `offload.prepare_transformer` gives the
network its device (resident, or streamed layer by layer) and its storage (bf16, fp8, int4); `text_cache.CachedText` keeps
prompts' features on disk. `python -m magihuman.zoo plan` computes what each choice needs.
"""
