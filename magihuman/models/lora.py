"""LoRA: several sets of low-rank weight updates, by name, in one network (Hu et al. 2021, arXiv 2106.09685).

    add_lora(model, "student", LoraConfig(rank=64), seed=1)
    denoiser(video, audio, text)                   # the base, bit for bit as without LoRA
    denoiser(video, audio, text, lora="student")   # at first the same velocities

Which LoRA computes is an argument of the call, so teacher, student and fake score share one set of frozen weights, and
activation checkpointing recomputes with the right one. Every product of a block becomes
x W' + alpha / r (x A') B' per expert (`magihuman.models.layers.product`): the update is added to the products, because
W + B A rounded to bf16 loses small changes. With `LoraConfig.heads` a LoRA also owns trainable copies of the embedders,
final norms and final linears.

State-dict keys of a LoRA called NAME (those of the base do not change):
    block.layers.0.attention.linear_qkv.lora.NAME.A      fp32 [E r, columns]
    block.layers.0.attention.linear_qkv.lora.NAME.B      fp32 [E rows, r]
    lora.NAME.adapter.video_embedder.weight              and the other parameters of `dit.Ends`

Load the base's weights first, add LoRAs next, and only then shard or compile the network.

Why not peft: it replaces modules that are *called* and selects an adapter by changing their state. Here the weights are
stacks of experts that are sliced, not called, and the choice has to be an argument of the call. Files are in peft's
format, see `magihuman.zoo.lora_files`.
"""

from collections.abc import Iterator, Mapping
from zlib import crc32

import torch
from torch import Tensor, nn

from magihuman.errors import UserError
from magihuman.models.config import LoraConfig
from magihuman.models.dit import Ends, SingleStreamDiT
from magihuman.models.layers import ExpertLinear, LowRank, projection_std


def add_lora(model: SingleStreamDiT, name: str, config: LoraConfig, seed: int = 0, rng_name: str | None = None) -> None:
    """Add a LoRA to a network; with B = 0 at the start it computes the same as the base.

    Its parameters are fp32, on the base's device, and require gradients; the base's are left alone (freeze them with
    `model.requires_grad_(False)` before, where only LoRAs are trained).

    Args:
        name: an identifier, not in use.
        seed: of the random A, drawn on the CPU per matrix from (seed, name, key): equal on every machine. Nothing is
            drawn on the meta device.
        rng_name: takes the place of `name` there.

    Raises:
        UserError: a name that cannot be used.
        ValueError: the block matrices are quantised.
    """
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise UserError(f"a LoRA cannot be called {name!r}; take a plain word, such as student")
    if name in model.lora_configs:
        raise UserError(f"the network has a LoRA {name!r} already; choose another name")
    linears = dict(_linears(model))
    if not linears:
        raise ValueError("LoRA needs unquantised block matrices; add it before store_weights")
    for key, linear in linears.items():
        rows, columns = linear.weight.shape[0] // linear.experts, linear.weight.shape[1]
        with torch.device(linear.weight.device):
            low = LowRank(columns, rows, linear.experts, config.rank, config.scale)
        if not low.A.is_meta:
            generator = torch.Generator().manual_seed(crc32(f"{seed} {rng_name or name} {key}".encode()))
            drawn = torch.randn(low.A.shape, generator=generator).mul_(projection_std(columns))
            low.A.data.copy_(drawn)
        linear.lora[name] = low
    if config.heads:
        with torch.device(model.final_linear_video.weight.device):
            ends = Ends(model.config)
        with torch.no_grad():
            for key, own in ends.named_parameters():
                own.copy_(model.get_parameter(key))
        model.lora[name] = ends
    model.lora_configs[name] = config


def lora_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Key -> parameter of one LoRA, in the network's order.

    Args:
        model: the network, or a module that contains it (keys then start with its path).

    Raises:
        KeyError: no LoRA of that name.
    """
    found = {key: weight for key, weight in model.named_parameters() if lora_of(key) == name}
    if not found:
        raise KeyError(name)
    return found


@torch.no_grad()
def copy_lora(model: SingleStreamDiT, source: str, target: str) -> None:
    """Copy one LoRA's weights into another of the same config.

    Raises:
        KeyError: no LoRA of that name. ValueError: their configs differ.
    """
    if model.lora_configs[source] != model.lora_configs[target]:
        raise ValueError(f"{source} is {model.lora_configs[source]}, {target} is {model.lora_configs[target]}")
    sources = lora_parameters(model, source).values()
    for mine, theirs in zip(lora_parameters(model, target).values(), sources, strict=True):
        mine.copy_(theirs)


def lora_of(key: str) -> str | None:
    """Name of the LoRA that a state-dict key belongs to; None for the base's."""
    parts = key.split(".")
    return parts[parts.index("lora") + 1] if "lora" in parts[:-1] else None


def base_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's state dict without LoRAs: the released keys."""
    return {key: tensor for key, tensor in state.items() if lora_of(key) is None}


def without_base(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A state dict without the weights below `prefix` that belong to no LoRA: what a checkpoint on a frozen base saves."""
    return {key: tensor for key, tensor in state.items() if not key.startswith(prefix) or lora_of(key) is not None}


def lora_state(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """One LoRA's part of a state dict, under keys without its name: `....lora.A`, `lora.adapter....`."""
    return {key.replace(f"lora.{name}.", "lora.", 1): tensor for key, tensor in state.items() if lora_of(key) == name}


@torch.no_grad()
def merge(base: Mapping[str, Tensor], lora: Mapping[str, Tensor], config: LoraConfig) -> Iterator[tuple[str, Tensor]]:
    """A base's weights with a LoRA merged into them, one tensor after the other.

    Args:
        base: state dict under the released keys, see `base_state`.
        lora: see `lora_state`.

    Yields:
        key and tensor; changed ones are summed and returned in fp32, the others as in `base`.

    Raises:
        ValueError: the LoRA has keys that do not belong to this base.
    """
    left = set(lora)
    for key, tensor in base.items():
        module = key.removesuffix("weight")
        if f"lora.{key}" in left:
            left.remove(f"lora.{key}")
            yield key, lora[f"lora.{key}"].float()
        elif f"{module}lora.A" in left:
            left -= {f"{module}lora.A", f"{module}lora.B"}
            down = lora[f"{module}lora.A"].float().unflatten(0, (-1, config.rank))  # [E, r, columns]
            up = lora[f"{module}lora.B"].float().unflatten(0, (len(down), -1))  # [E, rows, r]
            yield key, tensor.float().add((up @ down).flatten(0, 1), alpha=config.scale)
        else:
            yield key, tensor
    if left:
        raise ValueError(f"{sorted(left)[0]} belongs to no matrix of this network")


def _linears(model: SingleStreamDiT) -> Iterator[tuple[str, ExpertLinear]]:
    for key, module in model.named_modules():
        if isinstance(module, ExpertLinear):
            yield key, module
