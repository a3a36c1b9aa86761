"""Computed tokens, FLOPs and bytes of a clip, and the time that no device can go below; without torch.

`cases` defines the clips, `work` counts them and divides by a device's limits, `predict` by the rates that kernels
reach. `python -m inference.benchmark.roofline` prints all of it.
"""
