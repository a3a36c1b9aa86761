"""Stages load, run and leave in order: which modules are on the device while one of them runs.

fast      everything stays on the device
balanced  one stage at a time; the others wait in CPU memory
low       as balanced, and the transformer's layers are streamed one by one

Layers that live in CPU memory and visit the device one after another, the next one under way meanwhile.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from inference.memory.quantization import store_weights
from magihuman.errors import UserError
from magihuman.models.denoiser import Denoiser
from magihuman.zoo.footprint import FORMS
from magihuman.zoo.memory_plan import MEMORY

DEEP = 8  # layers from which a network is worth streaming


def check_memory(memory: str, weights: str | None) -> None:
    """Raises UserError for an unknown memory= or weights=, listing the choices."""
    if memory not in MEMORY:
        raise UserError(f"memory={memory} is unknown; choose one of {', '.join(MEMORY)}")
    if weights is not None and weights not in FORMS:
        raise UserError(f"weights={weights} is unknown; choose one of {', '.join(FORMS)}")


class Part(Protocol):
    """Something that can be on the device or away."""

    def enter(self) -> None:
        """Come to the device; nothing if already there."""
        ...

    def leave(self) -> None:
        """Free the device memory."""
        ...


class Resident:
    """A module that comes as a whole and leaves by being forgotten: the CPU keeps its tensors all the time.

    Inference changes no weights, so nothing is copied back.

    Args:
        module: on the CPU, or already on the device.
        skip: modules inside it whose tensors someone else looks after.
    """

    def __init__(self, module: nn.Module, device: torch.device | str, skip: tuple[nn.Module, ...] = ()) -> None:
        self.device = torch.device(device)
        skipped = {id(inner) for outer in skip for inner in outer.modules()}
        self._owners: list[tuple[nn.Module, str, Tensor]] = []
        kept: dict[int, Tensor] = {}  # shared tensors are moved once and stay shared
        for inner in module.modules():
            if id(inner) in skipped:
                continue
            for name, tensor in (*inner.named_parameters(recurse=False), *inner.named_buffers(recurse=False)):
                if id(tensor) not in kept:
                    kept[id(tensor)] = _pinned(tensor.detach().cpu(), self.device)
                self._owners.append((inner, name, kept[id(tensor)]))
        self.leave()

    def enter(self) -> None:
        """Copy every tensor to the device; nothing where they are there."""
        arrived: dict[int, Tensor] = {}
        for module, name, host in self._owners:
            if id(host) not in arrived:
                arrived[id(host)] = host.to(self.device, non_blocking=True)
            _bind(module, name, arrived[id(host)])

    def leave(self) -> None:
        """Point every tensor at its CPU copy."""
        for module, name, host in self._owners:
            _bind(module, name, host)


class Streamed:
    """A network of which two layers, and what is not in layers, are on the device.

    Args:
        layers: the list inside `module` whose members run in this order.
    """

    def __init__(self, module: nn.Module, layers: nn.ModuleList, device: torch.device | str) -> None:
        self._rest = Resident(module, device, skip=(layers,))
        self.stream = LayerStream(list(layers), device)

    def enter(self) -> None:
        """Bring what is not in layers and start the first layer's copy."""
        self._rest.enter()
        self.stream.enter()

    def leave(self) -> None:
        """Free all of it."""
        self._rest.leave()
        self.stream.leave()


def prepare_transformer(
    denoiser: Denoiser, memory: str, weights: str | None, device: torch.device | str
) -> Part | None:
    """Apply weight storage and offloading to a loaded network; once, before the first call.

    Args:
        denoiser: on the CPU, or on the device where memory is "fast".
        memory: one of MEMORY.
        weights: one of FORMS, or None to keep the storage it was loaded in.

    Returns:
        what `Stages.add` takes: the part to bring and take away; None in "fast", where it is on the device for good.

    Raises:
        UserError: an unknown mode or form.
    """
    check_memory(memory, weights)
    if weights is not None:
        store_weights(denoiser.model, weights, device, device if memory == "fast" else "cpu")
    if memory == "fast":
        denoiser.to(device)
        return None
    if memory == "low":
        return Streamed(denoiser, denoiser.model.block.layers, device)
    return Resident(denoiser, device)


class Stages:
    """Who is on the device. Every stage names its parts once; entering a stage sends away all other parts.

    Args:
        memory: one of MEMORY.
        device: where stages run.
    """

    def __init__(self, memory: str, device: torch.device | str) -> None:
        check_memory(memory, None)
        self.memory = memory
        self.device = torch.device(device)
        self._stages: dict[str, list[Part]] = {}
        self._parts: dict[int, Part] = {}
        self._present: list[Part] = []

    def add(self, stage: str, *members: Any) -> None:
        """Say what a stage needs.

        Args:
            members: modules, or parts from `prepare_transformer`; what has no tensors (a byte encoder, None) needs
                no place. A module may serve several stages.
        """
        parts = self._stages.setdefault(stage, [])
        for member in members:
            if isinstance(member, nn.Module):
                if self.memory == "fast":
                    member.to(self.device)
                    continue
                if id(member) not in self._parts:
                    layers = _long_list(member) if self.memory == "low" else None
                    part = Streamed(member, layers, self.device) if layers else Resident(member, self.device)
                    self._parts[id(member)] = part
                parts.append(self._parts[id(member)])
            elif hasattr(member, "enter"):
                parts.append(member)

    def enter(self, stage: str) -> None:
        """Bring the stage's parts to the device, after all others have left it.

        They stay until another stage is entered, so a stage that is repeated loads once.

        Raises:
            KeyError: the stage was never added.
        """
        needed = self._stages[stage]
        for part in self._present:
            if part not in needed:
                part.leave()
        self._present = [part for part in self._present if part in needed]
        for part in needed:
            if part not in self._present:
                part.enter()
                self._present.append(part)

    def clear(self) -> None:
        """Send everything away."""
        for part in self._present:
            part.leave()
        self._present = []


def _long_list(module: nn.Module) -> nn.ModuleList | None:
    """The layers of a deep transformer such as the text encoder: the longest list of one kind of module.

    Codecs have short lists of unlike blocks, which they run once per latent frame: too often to be streamed.
    """
    lists = [inner for inner in module.modules() if isinstance(inner, nn.ModuleList)]
    deep = [inner for inner in lists if len(inner) >= DEEP and len({type(layer) for layer in inner}) == 1]
    return max(deep, key=len, default=None)


def _bind(module: nn.Module, name: str, tensor: Tensor) -> None:
    own = getattr(module, name)
    if isinstance(own, nn.Parameter):
        own.data = tensor
    else:
        setattr(module, name, tensor)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """In page-locked memory where that speeds up copies and the system grants it."""
    if device.type != "cuda":
        return tensor
    try:
        return tensor.pin_memory()
    except RuntimeError:
        return tensor


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

    def enter(self) -> None:
        """Take the slots and start to fill the first; nothing where they are taken already."""
        if self._slots:
            return
        largest = [max(map(len, self._host[slot::SLOTS]), default=0) for slot in range(SLOTS)]
        self._slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in largest]
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
        _bind(self.module, self.name, tensor)


def _plan(layer: nn.Module) -> tuple[list[_Entry], int]:
    entries: list[_Entry] = []
    start = 0
    for module in layer.modules():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in own:
            entries.append(_Entry(module, name, tensor, start))
            start = -(-entries[-1].stop // _ALIGNMENT) * _ALIGNMENT
    return entries, start
