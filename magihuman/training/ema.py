"""An exponential moving average of a network's weights, fp32, sharded like the network."""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def _local(network: nn.Module) -> list[torch.Tensor]:
    for module in network.modules():
        if isinstance(module, FSDPModule):  # a forward pass may have left gathered weights in their place
            module.reshard()
    return [t.to_local() if isinstance(t, DTensor) else t for t in network.parameters()]


def decay_at(updates: int, final: float) -> float:
    """min(final, (1 + n) / (10 + n)) at update n = 0, 1, ..."""
    return min(final, (1 + updates) / (10 + updates))


@torch.no_grad()
def ema_update(average: Iterable[torch.Tensor], weights: Iterable[torch.Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights, in place; for tensors such as LoRA parameters.

    ema_update(average.values(), student.values(), decay_at(updates, 0.99))
    """
    torch._foreach_lerp_(list(average), list(weights), 1.0 - decay)


class EMA(nn.Module):
    """shadow <- d * shadow + (1 - d) * weights, d = min(decay, (1 + n) / (10 + n)) at update n = 0, 1, ...

    The growing decay lets a short run forget its random start. The shadow is a network of its own (`module`),
    so it can be sampled from, exported and saved like any other; its tensors are never trained.

    Args:
        model: network to follow; copied.
        decay: final decay in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        for parameter in self.module.parameters():
            parameter.data = parameter.data.float()
            parameter.grad = None
        self.final_decay = decay
        self.updates = 0

    def train(self, mode: bool = True) -> "EMA":
        """The shadow stays in evaluation mode whatever the recipe is in."""
        return self

    @property
    def decay(self) -> float:
        """Decay of the next update."""
        return decay_at(self.updates, self.final_decay)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Follow `model` (same architecture, same sharding) by one step; buffers are copied."""
        shadow = _local(self.module)
        weights = [w.to(s.dtype) for s, w in zip(shadow, _local(model), strict=True)]
        torch._foreach_lerp_(shadow, weights, 1.0 - self.decay)
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
        self.updates += 1

    @torch.no_grad()
    def reset(self, model: nn.Module) -> None:
        """Start again from `model`'s weights."""
        for shadow, weight in zip(_local(self.module), _local(model), strict=True):
            shadow.copy_(weight)
        self.updates = 0
