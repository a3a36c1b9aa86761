"""Stages load, run and leave in order: which modules are on the device while one of them runs.

fast      everything stays on the device
balanced  one stage at a time; the others wait in CPU memory
low       as balanced, and the transformer's layers are streamed one by one
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from inference.memory.storage import FORMS, store_weights
from inference.memory.streaming import LayerStream
from magihuman.denoiser import Denoiser
from magihuman.errors import UserError

MODES = ("fast", "balanced", "low")
DEEP = 8  # layers from which a network is worth streaming


def check_memory(memory: str, weights: str | None) -> None:
    """Raises UserError for an unknown memory= or weights=, listing the choices."""
    if memory not in MODES:
        raise UserError(f"memory={memory} is unknown; choose one of {', '.join(MODES)}")
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

    def __init__(
        self, module: nn.Module, device: torch.device | str, skip: tuple[nn.Module, ...] = ()
    ) -> None:
        self.device = torch.device(device)
        skipped = {id(inner) for outer in skip for inner in outer.modules()}
        self._owners: list[tuple[nn.Module, str, Tensor]] = []
        kept: dict[int, Tensor] = {}  # shared tensors are moved once and stay shared
        for inner in module.modules():
            if id(inner) in skipped:
                continue
            for name, tensor in (
                *inner.named_parameters(recurse=False),
                *inner.named_buffers(recurse=False),
            ):
                if id(tensor) not in kept:
                    kept[id(tensor)] = _pinned(tensor.detach().cpu(), self.device)
                self._owners.append((inner, name, kept[id(tensor)]))
        self.leave()

    @property
    def bytes(self) -> int:
        """Of all tensors, shared ones once."""
        return sum(t.numel() * t.element_size() for t in {id(t): t for *_, t in self._owners}.values())

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
    """Give a loaded network its storage and its place; done once, before the first call.

    Args:
        denoiser: on the CPU, or on the device where memory is "fast".
        memory: one of MODES.
        weights: one of `FORMS`, or None to keep the storage it was loaded in.

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
        memory: one of MODES.
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
                    self._parts[id(member)] = self._part(member)
                parts.append(self._parts[id(member)])
            elif hasattr(member, "enter"):
                parts.append(member)

    def _part(self, module: nn.Module) -> Part:
        layers = _long_list(module) if self.memory == "low" else None
        return Resident(module, self.device) if layers is None else Streamed(module, layers, self.device)

    @property
    def present(self) -> list[str]:
        """Stages whose parts are all on the device now, in "balanced" and "low"."""
        return [
            name for name, parts in self._stages.items() if parts and all(p in self._present for p in parts)
        ]

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
