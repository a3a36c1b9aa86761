"""Layers that live in CPU memory and visit the device one after another, the next one under way meanwhile."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_ALIGNMENT = 256  # bytes; what kernels expect of a tensor's start
SLOTS = 2


class LayerStream:
    """Streams the weights of equal-rank layers through two slots of device memory.

    Every layer's tensors are packed into one run of (pinned) CPU memory, and point for good into the slot that the
    layer uses: the even layers into one, the odd ones into the other. Before a layer runs its slot has been filled;
    while it runs the next layer's is being filled, on a stream of its own. On the CPU the same copies happen in place.

    Between `enter` and `leave` the layers can run; outside they have no weights. For inference: their tensors are
    overwritten, so nothing may keep them for a backward pass.

    Args:
        layers: called in this order, over and over.
        device: where they run.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.layers = list(layers)
        pinned = self.device.type == "cuda"
        self._entries: list[list[_Entry]] = []
        self._host: list[Tensor] = []
        for layer in self.layers:
            entries, total = _plan(layer)
            host = torch.empty(total, dtype=torch.uint8, pin_memory=pinned)
            for entry in entries:
                entry.view(host).copy_(entry.tensor())
                entry.bind(torch.empty(0, dtype=entry.dtype))
            self._entries.append(entries)
            self._host.append(host)
        self._slots: list[Tensor] = []
        self._held: list[int | None] = [None] * SLOTS
        self._side = torch.cuda.Stream(self.device) if pinned else None
        self._filled = [torch.cuda.Event() for _ in range(SLOTS)] if pinned else []
        self._unused = [torch.cuda.Event() for _ in range(SLOTS)] if pinned else []
        for i, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(lambda *_, i=i: self._before(i))
            layer.register_forward_hook(lambda *_, i=i: self._after(i), always_call=True)

    @property
    def host_bytes(self) -> int:
        """CPU memory that the layers take."""
        return sum(len(host) for host in self._host)

    @property
    def device_bytes(self) -> int:
        """Device memory between `enter` and `leave`: for each slot its largest layer."""
        return sum(self._slot_bytes(slot) for slot in range(SLOTS))

    def _slot_bytes(self, slot: int) -> int:
        return max((len(host) for host in self._host[slot::SLOTS]), default=0)

    def enter(self) -> None:
        """Take the slots and start to fill the first; nothing where they are taken already."""
        if self._slots:
            return
        self._slots = [
            torch.empty(self._slot_bytes(slot), dtype=torch.uint8, device=self.device)
            for slot in range(SLOTS)
        ]
        for i, entries in enumerate(self._entries):
            for entry in entries:
                entry.bind(entry.view(self._slots[i % SLOTS]))
        self._fill(0)

    def leave(self) -> None:
        """Give the slots back."""
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        for entries in self._entries:
            for entry in entries:
                entry.bind(torch.empty(0, dtype=entry.dtype))
        self._slots = []
        self._held = [None] * SLOTS

    def _fill(self, i: int) -> None:
        slot, host = i % SLOTS, self._host[i]
        target = self._slots[slot][: len(host)]
        if self._side is None:
            target.copy_(host)
        else:
            if all(held is None for held in self._held):
                # Fresh memory may still be in use by earlier work of the stream that allocated it.
                self._side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._side):
                self._side.wait_event(self._unused[slot])
                target.copy_(host, non_blocking=True)
                self._filled[slot].record(self._side)
        self._held[slot] = i

    def _before(self, i: int) -> None:
        if not self._slots:
            raise RuntimeError("a streamed layer was called outside enter() and leave()")
        if torch.is_grad_enabled():
            raise RuntimeError("streamed layers are for inference: call the network under torch.no_grad()")
        slot, following = i % SLOTS, (i + 1) % len(self.layers)
        if self._held[slot] != i:
            self._fill(i)
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_event(self._filled[slot])
        if following % SLOTS != slot and self._held[following % SLOTS] != following:
            self._fill(following)

    def _after(self, i: int) -> None:
        slot, following = i % SLOTS, (i + 1) % len(self.layers)
        if self._side is not None:
            self._unused[slot].record(torch.cuda.current_stream(self.device))
        # From the last of an odd number of layers to the first: both use this slot.
        if following % SLOTS == slot and self._held[slot] != following:
            self._fill(following)


class _Entry:
    """One tensor of a layer: whose it is and where in the layer's bytes it lies."""

    def __init__(self, module: nn.Module, name: str, tensor: Tensor, start: int) -> None:
        self.module, self.name, self.start = module, name, start
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.stop = start + tensor.numel() * tensor.element_size()

    def tensor(self) -> Tensor:
        return getattr(self.module, self.name).detach()

    def view(self, packed: Tensor) -> Tensor:
        return packed[self.start : self.stop].view(self.dtype).view(self.shape)

    def bind(self, tensor: Tensor) -> None:
        own: Any = getattr(self.module, self.name)
        if isinstance(own, nn.Parameter):
            own.data = tensor
        else:
            setattr(self.module, self.name, tensor)


def _plan(layer: nn.Module) -> tuple[list[_Entry], int]:
    entries: list[_Entry] = []
    start = 0
    for module in layer.modules():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in own:
            entries.append(_Entry(module, name, tensor, start))
            start = -(-entries[-1].stop // _ALIGNMENT) * _ALIGNMENT
    return entries, start
