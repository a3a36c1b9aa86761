"""Optimisers, learning-rate schedules, gradient clipping, ramps of settings, and the weight average (EMA).

Muon: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), as in `torch.optim.Muon`, with two
additions. A weight that stacks several experts is orthogonalised per expert, because a joint step would
couple their singular values; and one optimiser object serves the matrices (Muon) and everything else (AdamW),
because Lightning's automatic optimisation and its checkpoints count on one.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from magihuman.config import OptimSettings
from magihuman.errors import UserError
from magihuman.models.config import DiTConfig
from magihuman.training.adam8bit import adamw8bit

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration."""

ENDS = ("conv_in", "conv_out")
"""Names of a decoder's first and last layer, which see latents and pixels instead of features."""


def orthogonalise(matrices: torch.Tensor, steps: int, eps: float = 1e-7) -> torch.Tensor:
    """Replace the singular values of every matrix [E,n,m] by about 1 (Newton-Schulz); same shape.

    In bf16 on a GPU; in fp32 on a CPU, many of which emulate bf16.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices, AdamW for the rest, in one object.

    Groups hold `experts` (0: AdamW; n >= 1: Muon on a weight [n*rows, columns] of n stacked experts) beside
    the usual settings. The Muon step is scaled by sqrt(max(1, rows / columns)) of one expert. Sharded weights
    (DTensor) are gathered for the orthogonalisation, matrix by matrix, and every process does the whole of it:
    exact, and costlier with more processes only in communication.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], settings: OptimSettings) -> None:
        defaults = {
            "lr": settings.lr,
            "experts": 0,
            "betas": settings.betas,
            "eps": settings.eps,
            "weight_decay": settings.weight_decay,
            "momentum": settings.momentum,
            "steps": settings.newton_schulz_steps,
        }
        super().__init__(list(groups), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon if group["experts"] else self._adamw
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    update(weight, group)
        return loss

    def _muon(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[weight], weight.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        average = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(average, group["momentum"])  # Nesterov
        whole = direction.full_tensor() if isinstance(direction, DTensor) else direction
        # A convolution is a matrix from all that its kernel sees to its output channels.
        matrices = whole.flatten(1).unflatten(0, (group["experts"], -1))  # [experts, rows, columns]
        update = orthogonalise(matrices, group["steps"]).flatten(0, 1).to(weight.dtype).view(whole.shape)
        if isinstance(direction, DTensor):
            # No source rank: every process holds the same matrix and keeps its own part of it.
            update = distribute_tensor(update, direction.device_mesh, direction.placements, src_data_rank=None)
        rows, columns = matrices.shape[-2:]
        weight.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))

    def _adamw(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[weight], weight.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        n = state["step"].item()
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (state["square"] / (1 - beta2**n)).sqrt_().add_(group["eps"])
        weight.addcdiv_(state["mean"], scale, value=-group["lr"] / (1 - beta1**n))


def experts_by_name(config: DiTConfig) -> dict[str, int]:
    """State-dict key -> stacked experts, for the matrices of the blocks (what Muon orthogonalises)."""
    return {
        name: config.experts(int(name.split(".")[2]))
        for name, shape, _ in config.tensors()
        if name.startswith("block.layers.") and len(shape) == 2
    }


def build_optimizer(
    model: nn.Module | Mapping[str, nn.Parameter], config: DiTConfig | None, settings: OptimSettings
) -> torch.optim.Optimizer:
    """The optimiser of `settings` over `model`'s trainable weights.

    Args:
        model: the `SingleStreamDiT`, a module that holds one (keys are matched by their ends), or weights by name.
        config: its shape, which says where experts are stacked; None for other networks, in which Muon takes every
            matrix and convolution but the first and last (`ENDS`).
    """
    groups: list[dict[str, Any]]
    weights = model.named_parameters() if isinstance(model, nn.Module) else model.items()
    named = [(name, weight) for name, weight in weights if weight.requires_grad]
    if settings.algorithm != "muon":
        decayed = [w for _, w in named if w.ndim > 1]
        plain = [w for _, w in named if w.ndim <= 1]  # norms and biases are not pulled to zero
        groups = [g for g in ({"params": decayed}, {"params": plain, "weight_decay": 0.0}) if g["params"]]
        if settings.algorithm == "adamw8bit":
            return adamw8bit(groups, settings)
        return torch.optim.AdamW(
            groups,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            foreach=True,
        )
    experts = {} if config is None else experts_by_name(config)
    matrices: dict[int, list[torch.Tensor]] = {}
    rest: list[torch.Tensor] = []
    for name, weight in named:
        if config is None:
            inner = weight.ndim > 1 and weight[0].numel() > 1 and not any(end in name for end in ENDS)
            count = 1 if inner else None
        else:
            start = name.find("block.layers.")
            count = experts.get(name[start:]) if start >= 0 else None
        (rest if count is None else matrices.setdefault(count, [])).append(weight)
    groups = [{"params": weights, "experts": n} for n, weights in sorted(matrices.items())]
    groups.append({"params": rest, "lr": settings.adamw_lr, "weight_decay": 0.0})
    return Muon([g for g in groups if g["params"]], settings)


def fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every weight of an optimiser from `build_optimizer` the state that its first step would make: zeros.

    A sharded checkpoint is read by the names of all weights, so the state of one without a gradient so far must not be
    missing; and for an optimiser that stands still, saving would make the state by a step that is counted.
    """
    for group in optimizer.param_groups:
        names = ["exp_avg", "exp_avg_sq"]
        if isinstance(optimizer, Muon):
            names = ["momentum"] if group["experts"] else ["mean", "square"]
        for weight in group["params"]:
            if hasattr(optimizer, "moments"):
                state = optimizer.moments(weight)
            else:
                state = {name: torch.zeros_like(weight, requires_grad=False) for name in names}
            optimizer.state[weight] = state if "momentum" in state else {"step": torch.zeros(()), **state}


def schedule_factor(settings: OptimSettings, step: int, max_steps: int) -> float:
    """Share of the peak learning rate at optimiser step `step` = 0, 1, ... of `max_steps`."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    after = max_steps - settings.warmup
    progress = min(1.0, (step - settings.warmup) / max(1, after))
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "cosine":
        fall = 0.5 * (1 + math.cos(math.pi * progress))
    elif settings.schedule == "linear":
        fall = 1 - progress
    else:  # wsd: stable, then linear over the last share of all steps
        start = max_steps * (1 - settings.decay)
        fall = min(1.0, max(0.0, (max_steps - step) / max(1.0, max_steps - start)))
    return settings.final + (1 - settings.final) * fall


def build_schedule(
    optimizer: torch.optim.Optimizer, settings: OptimSettings, max_steps: int, constant: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """`schedule_factor` as a scheduler; its state is the step number alone.

    Args:
        constant: so many of the optimiser's last groups keep their learning rate.
    """

    def factor(step: int) -> float:
        return schedule_factor(settings, step, max_steps)

    scheduled = len(optimizer.param_groups) - constant
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [factor] * scheduled + [lambda _: 1.0] * constant)


def clip_gradients(weights: list[nn.Parameter], max_norm: float | None) -> float:
    """Scale gradients down to `max_norm` and return their norm before that, over all shards.

    A norm that is not finite drops the gradients altogether, so that the step changes nothing.
    """
    gradients = [w.grad for w in weights if w.grad is not None]
    norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
    value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not math.isfinite(value):
        for weight in weights:
            weight.grad = None
    elif max_norm is not None and value > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / (value + 1e-6))
    return value


@dataclass(frozen=True)
class Ramp:
    """`start` until the share `begin` of the training is done, then linearly to `end`, reached at share
    `finish`.

    Raises:
        UserError: unless 0 <= begin <= finish <= 1.
    """

    start: float
    end: float
    begin: float = 0.0
    finish: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.finish <= 1:
            raise UserError(f"a ramp needs 0 <= begin <= finish <= 1, not begin={self.begin}, finish={self.finish}")

    def at(self, progress: float) -> float:
        """Value at `progress` in [0, 1] of the training."""
        if progress >= self.finish:
            return self.end
        share = max(0.0, progress - self.begin) / (self.finish - self.begin)
        return self.start + (self.end - self.start) * share


def value_at(setting: float | Ramp, progress: float) -> float:
    """A constant, or the ramp's value."""
    return setting.at(progress) if isinstance(setting, Ramp) else float(setting)


def require_shares(**settings: float | Ramp) -> None:
    """Raises UserError for a setting of a recipe, by name, that is a probability or share and leaves [0, 1]."""
    for name, setting in settings.items():
        if not all(0 <= value_at(setting, progress) <= 1 for progress in (0.0, 1.0)):
            raise UserError(f"recipe.{name}={setting} should be in [0, 1]")


def require_weights(**settings: float) -> None:
    """Raises UserError for the weight of a loss, by the name of its setting, that is negative."""
    for name, setting in settings.items():
        if setting < 0:
            raise UserError(f"recipe.{name}={setting} should not be negative")


def _local(network: nn.Module) -> list[torch.Tensor]:
    for module in network.modules():
        if isinstance(module, FSDPModule):  # a forward pass may have left gathered weights in their place
            module.reshard()
    return [t.to_local() if isinstance(t, DTensor) else t for t in network.parameters()]


def decay_at(updates: int, final: float) -> float:
    """Decay of an EMA at update n = 0, 1, ...: min(final, (1 + n) / (10 + n))."""
    return min(final, (1 + updates) / (10 + updates))


@torch.no_grad()
def ema_update(average: Iterable[torch.Tensor], weights: Iterable[torch.Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights, in place; for tensors such as LoRA parameters.

    ema_update(average.values(), student.values(), decay_at(updates, 0.99))
    """
    torch._foreach_lerp_(list(average), list(weights), 1.0 - decay)


class EMA(nn.Module):
    """Exponential moving average of a network's weights, fp32, sharded like the network.

    shadow <- d * shadow + (1 - d) * weights, d = min(decay, (1 + n) / (10 + n)) at update n = 0, 1, ...

    The growing decay lets a short run forget its random start. The shadow is a network of its own (`module`),
    so it can be sampled from, exported and saved like any other; its tensors are never trained.

    Args:
        model: network to average; copied.
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
        """The shadow stays in evaluation mode in whatever mode the recipe is."""
        return self

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One EMA update with the weights of `model` (same architecture, same sharding); buffers are copied."""
        shadow = _local(self.module)
        weights = [w.to(s.dtype) for s, w in zip(shadow, _local(model), strict=True)]
        torch._foreach_lerp_(shadow, weights, 1.0 - decay_at(self.updates, self.final_decay))
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
        self.updates += 1
