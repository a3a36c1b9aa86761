"""A GPU that is not there: tensors on "cuda" without memory or values, so that its code runs at full size anywhere."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from magihuman.flow.solvers import FlowUniPC, Solver
from magihuman.models.tokens import Layout


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "_Event") -> float:
        return 2.0


class _Stream:
    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: "_Stream") -> None:
        pass


class _Graph:
    replayed = 0

    def replay(self) -> None:
        _Graph.replayed += 1


class _Generator:
    real = torch.Generator

    def __new__(cls, device: Any = "cpu") -> Any:
        return cls.real()


class _Mode(FakeTensorMode):
    avoid_device_init = True  # asks torch.cuda.is_available otherwise, which says yes here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # every number that is read is one
            return args[0].dtype == torch.bool or (1.0 if args[0].is_floating_point() else 1)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _apply(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """As torch's, which cannot change fake parameters in place."""
    for module in self.modules() if recurse else (self,):
        for name, tensor in module._parameters.items():
            if tensor is not None:
                module._parameters[name] = nn.Parameter(function(tensor), tensor.requires_grad)
        for name, tensor in module._buffers.items():
            module._buffers[name] = None if tensor is None else function(tensor)
    return self


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch, major: int = 9) -> Iterator[FakeTensorMode]:
    """Every tensor made inside is fake; operators check shapes, dtypes, layouts and devices, and compute nothing."""
    properties = SimpleNamespace(name="NVIDIA FAKE", total_memory=80 << 30, major=major, minor=0)
    plain = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: _Stream(),
        "get_device_capability": lambda device=None: (major, 0),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
        "reset_peak_memory_stats": lambda device=None: None,
        "max_memory_allocated": lambda device=None: 40 << 30,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
        "Event": _Event,
        "CUDAGraph": _Graph,
        "graph": nullcontext,
        "Stream": _Stream,
        "stream": nullcontext,
    }
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch, "Generator", _Generator)
    # A kernel's trial compares numbers.
    monkeypatch.setattr("inference.fast.attention_kernels.probe", lambda *_: None)
    monkeypatch.setattr(nn.Module, "_apply", _apply)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    for name, value in plain.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
    mode = _Mode(allow_non_fake_inputs=True)
    assemble = Layout._assemble.__func__

    def assembled(cls: type[Layout], video: int, audio: int, text: Any, frames: int, coords: Tensor) -> Layout:
        """Lengths are read from small tensors on the host, so those have to be real."""
        with unset_fake_temporarily():
            layout = assemble(cls, video, audio, text, frames, torch.zeros(coords.shape))
        found = {f.name: getattr(layout, f.name) for f in fields(layout)}
        there = {k: mode.from_tensor(v).to(coords.device) for k, v in found.items() if isinstance(v, Tensor)}
        return replace(layout, **{**there, "coords": coords})

    def solver(self: Solver, *arguments: Any, **named: Any) -> None:
        with unset_fake_temporarily():
            begin(self, *arguments, **named)

    begin = FlowUniPC.__init__
    monkeypatch.setattr(FlowUniPC, "__init__", solver)
    monkeypatch.setattr(Layout, "_assemble", classmethod(assembled))
    with mode:
        yield mode
