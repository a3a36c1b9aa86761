"""Random numbers as a pure function of (seed, batch number, sample index).

A sample's numbers do not depend on the number of processes, on the other samples of its batch or on interruptions,
and no generator state has to be stored in a checkpoint. They are drawn on the CPU, so every device gets the same
ones.
"""

import hashlib
from collections.abc import Sequence

import torch


def stream(*key: int | str) -> int:
    """A 63-bit seed from any key; different keys give unrelated streams."""
    text = "/".join(str(part) for part in key).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class BatchRng:
    """Random number generators of a batch, one per sample.

        rng = BatchRng(seed=0, batch=7, index=[3, 5])
        noise = rng.normal((48, 4, 8, 8))  # [2,48,4,8,8]

    Args:
        seed: of the run.
        batch: number of this batch since the start of the training (per process).
        index: [B] global positions of the samples, as the data module gives them.
    """

    def __init__(self, seed: int, batch: int, index: torch.Tensor | Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(stream(seed, batch, int(position))) for position in index]

    def __len__(self) -> int:
        return len(self.generators)

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        """Gaussian noise [B,...] fp32; `shape` is one sample's."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self.generators])

    def uniform(self) -> torch.Tensor:
        """[B] fp32, uniform in [0, 1)."""
        return torch.cat([torch.rand(1, generator=g) for g in self.generators])

    def chance(self, probability: float) -> torch.Tensor:
        """[B] bool, true with `probability`; uses one number whatever the probability is, so that changing it changes no
        other number of the sample."""
        return self.uniform() < probability
