"""Averages between two log lines, kept on the device so that no step waits for them."""

from collections.abc import Sequence
from itertools import pairwise

import torch


class Meter:
    """Named weighted means: `add` during steps, `flush` at a log line.

    Every process must add the same names in the same order: `flush` sums over processes.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, name: str, values: torch.Tensor | float, weights: torch.Tensor | None = None) -> None:
        """Count values [N] (or one number) with weights [N] (default 1; 0 leaves an entry out)."""
        values = torch.as_tensor(values, dtype=torch.float32).detach().reshape(-1)
        weights = torch.ones_like(values) if weights is None else weights.float().reshape(-1)
        pair = torch.stack([(values * weights).sum(), weights.sum()])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    @torch.no_grad()
    def add_bands(
        self,
        name: str,
        values: torch.Tensor,
        position: torch.Tensor,
        edges: Sequence[float],
        weights: torch.Tensor,
    ) -> None:
        """Count values [N] in bands of `position` [N]: one mean per interval between edges, the last closed."""
        for low, high in pairwise(edges):
            inside = (position >= low) & ((position < high) | ((high == edges[-1]) & (position <= high)))
            self.add(f"{name}/sigma_{low:.1f}_{high:.1f}", values, weights * inside)

    def flush(self, device: torch.device | str = "cpu") -> dict[str, float]:
        """Means since the last flush, over all processes; names that nothing was counted for are left out.

        Args:
            device: where processes exchange sums.
        """
        if not self._sums:
            return {}
        names = list(self._sums)
        table = torch.stack([self._sums[n].to(device) for n in names])  # [names, 2]
        self._sums = {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(table)
        return {
            name: total / count
            for name, (total, count) in zip(names, table.cpu().tolist(), strict=True)
            if count > 0
        }
