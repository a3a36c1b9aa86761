"""Counts what would make the host wait for a GPU: reading a tensor's values, and shapes that depend on them."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READING = {
    "item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "argwhere", "unique", "equal", "allclose",
    "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__", "is_nonzero",
}  # fmt: skip
OPERATORS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
    "unique_consecutive", "bincount",
}  # fmt: skip


class HostSyncs:
    """While active, `found` gets the name of everything that waits. It sees calls and what they lead to.

    Args:
        device_type: only tensors of this device count where copies between devices are concerned.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        self.found: list[str] = []
        self._modes = (_Functions(self.found), _Operators(self.found, device_type))

    def __enter__(self) -> "HostSyncs":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Functions(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READING or (name == "where" and len(args) == 1):
            self.found.append(name)
        if name in ("__getitem__", "__setitem__") and _holds_mask(args[1]):
            self.found.append(f"{name} with a mask")
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str], device_type: str) -> None:
        super().__init__()
        self.found, self.device_type = found, device_type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in OPERATORS:
            self.found.append(f"aten::{name}")
        if name in ("index", "index_put", "index_put_") and _holds_mask(args[1]):
            self.found.append(f"aten::{name} with a mask")
        if name in ("_to_copy", "copy_") and isinstance(result, torch.Tensor):
            devices = {x.device.type for x in (*args, result) if isinstance(x, torch.Tensor)}
            if len(devices) > 1 and self.device_type in devices:
                self.found.append(f"aten::{name} between devices")
        return result


def _holds_mask(index: Any) -> bool:
    entries = index if isinstance(index, tuple | list) else [index]
    return any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in entries)
