"""Random draws that are a pure function of (seed, batch number, sample index).

Neither the number of processes, nor the order in which samples meet, nor an interruption changes what a
sample gets, and nothing has to be stored in a checkpoint. Draws are made on the CPU, so every device gets the
same numbers.
"""

import hashlib
from collections.abc import Sequence

import torch


def stream(*key: int | str) -> int:
    """A 63-bit seed from any key; different keys give unrelated streams."""
    text = "/".join(str(part) for part in key).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class Draws:
    """One generator per sample of a batch.

    Args:
        seed: of the run.
        batch: number of this batch since the start of the training (per process).
        index: [B] global positions of the samples, as the data module gives them.
    """

    def __init__(self, seed: int, batch: int, index: torch.Tensor | Sequence[int]) -> None:
        self.generators = [
            torch.Generator().manual_seed(stream(seed, batch, int(position))) for position in index
        ]

    def __len__(self) -> int:
        return len(self.generators)

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        """Gaussian noise [B,...] fp32; `shape` is one sample's."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self.generators])

    def uniform(self) -> torch.Tensor:
        """[B] fp32, uniform in [0, 1)."""
        return torch.cat([torch.rand(1, generator=g) for g in self.generators])

    def chance(self, probability: float) -> torch.Tensor:
        """[B] bool, true with `probability`; always consumes one draw, so that a changed probability shifts nothing."""
        return self.uniform() < probability
