"""Peak memory of tensors while code runs, counted on any device, also on "meta" without computation."""

import weakref
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Context manager that counts `live` and `peak` bytes of storages created inside it; not those within kernels.

    with Allocations() as memory:
        network(x)
    memory.peak
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()
        self._before: list[weakref.ref[Any]] = []

    def ignore(self, *tensors: torch.Tensor) -> "Allocations":
        """Exclude existing storages, so that views of them are not counted."""
        self._known |= {id(t.untyped_storage()) for t in tensors}
        self._kept = tensors
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self._known:
                self._known.add(id(tensor.untyped_storage()))
                weakref.finalize(tensor.untyped_storage(), self._known.discard, id(tensor.untyped_storage()))
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._known:
            return
        key, size = id(storage), storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self._known.discard(key)
            self.live -= size

        weakref.finalize(storage, gone)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
