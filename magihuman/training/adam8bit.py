"""AdamW with moments in 8 bits (torchao), for `optim.algorithm=adamw8bit`.

A moment is stored as one byte per number and an fp32 scale per block, of 256 numbers where the row of the matrix allows it
(Dettmers et al. 2021, arXiv 2110.02861): both moments take 2.03 bytes per weight instead of 8. Norms, biases and matrices
that are small (under 4096 numbers) or narrow keep fp32 moments (`magihuman.zoo.footprint.moment_block`). Rows are whole
blocks, so the blocks do not depend on the number of processes, and a sharded checkpoint loads on another number of them.
The weights stay fp32, and the update is computed in fp32.

The update is compiled on a GPU, once per shape of a weight, at the first step; on a CPU it runs without a compiler.
"""

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from magihuman.config import OptimSettings
from magihuman.errors import UserError
from magihuman.zoo.footprint import moment_block


def require_torchao() -> None:
    """Import torchao, whose tensors are then accepted in checkpoints.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("torchao") is None:
        raise UserError(
            "optim=adamw8bit needs torchao; install it with pip install -e '.[adam8bit]', or choose optim=adamw"
        )
    for name in ("torchao", "torch.utils._pytree"):  # they warn of kernels that nothing here uses
        logging.getLogger(name).setLevel(logging.ERROR)
    import torchao.optim  # noqa: F401


def adamw8bit(groups: Iterable[dict[str, Any]], settings: OptimSettings) -> torch.optim.Optimizer:
    """The optimiser over parameter groups.

    Raises:
        UserError: torchao is not installed.
    """
    return _optimizer_class()(
        list(groups), lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )


@cache
def _optimizer_class() -> Any:
    require_torchao()
    from torchao.optim import AdamW8bit as Base

    class AdamW8bit(Base):
        """torchao's optimiser with our choice of weights, and learning rates that stay numbers."""

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            rate = param_group.get("lr", self.defaults["lr"])
            super().add_param_group(param_group)
            self.param_groups[-1]["lr"] = rate

        def _new_buffer(self, p: torch.Tensor, signed: bool) -> torch.Tensor:
            local = p.to_local() if isinstance(p, DTensor) else p
            block = moment_block(tuple(p.shape))
            if block is None or not local.numel():
                return torch.zeros_like(p, requires_grad=False)
            moment = self._subclass_zeros(local.detach(), signed, block)
            if isinstance(p, DTensor):
                moment = DTensor.from_local(
                    moment, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
                )
            return moment.to(p.device)  # from_local moves offloaded shards to the GPU

        def moments(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
            """The state of a weight before its first step, without the number of steps."""
            return {"exp_avg": self._new_buffer(weight, True), "exp_avg_sq": self._new_buffer(weight, False)}

        def step(self, closure: Any = None) -> Any:
            rates = [group["lr"] for group in self.param_groups]
            on_cpu = all(weight.device.type == "cpu" for group in self.param_groups for weight in group["params"])
            try:
                for group in self.param_groups:  # torchao takes tensors, which do not compile anew when they change
                    group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
                with torch.compiler.set_stance("force_eager") if on_cpu else nullcontext():
                    return super().step(closure)
            finally:
                for group, rate in zip(self.param_groups, rates, strict=True):
                    group["lr"] = rate

    return AdamW8bit
