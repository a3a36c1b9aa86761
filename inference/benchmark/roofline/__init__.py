"""What a clip costs in tokens, FLOPs and bytes, and the time that no device can go below; computed, without torch.

`cases` says what is made, `work` counts it, `bounds` divides it by a device's limits, `predict` by rates that kernels
reach, `totals` adds up clips beside what is published and what is to be reached. `python -m inference.benchmark.roofline` prints
all of it.
"""
