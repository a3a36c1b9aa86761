"""Low-rank adapters: several, by name, in one network that stays what it is (Hu et al. 2021, arXiv 2106.09685).

    add_adapter(model, "critic", LoraConfig(rank=64), seed=1)
    denoiser(video, audio, text)                      # the base, bit for bit as without adapters
    denoiser(video, audio, text, adapter="critic")    # at first the same velocities

Which adapter computes is an argument of the call, so a teacher, a critic and a student share one set of frozen weights,
and neither activation checkpointing nor sharding can meet the wrong one. Every product of a block becomes
x W' + alpha / r (x A') B' per expert (`magihuman.models.layers.product`): the change is added to the products, because
W + B A rounded to bf16 loses small changes. With `heads` an adapter also owns copies of the embedders, final norms
and final linears and trains them whole.

Keys of an adapter NAME; those of the base stay as they are:
    block.layers.0.attention.linear_qkv.lora.NAME.A      fp32 [E r, columns]
    block.layers.0.attention.linear_qkv.lora.NAME.B      fp32 [E rows, r]
    lora.NAME.adapter.video_embedder.weight              and what else `dit.Ends` holds, after `lora.NAME.`

Add adapters before the network is sharded or compiled, and load the base's weights before that.

Why not peft: it replaces modules that are *called*, and switches adapters by mutating them. Here the weights are
stacks of experts, of which slices are used and nothing is called; and the switch has to be an argument, see above.
peft's file format is kept where it can say what an adapter is, see `magihuman.zoo.adapters`.
"""

from collections.abc import Iterator, Mapping
from zlib import crc32

import torch
from torch import Tensor, nn

from magihuman.errors import UserError
from magihuman.models.config import LoraConfig
from magihuman.models.dit import Ends, SingleStreamDiT
from magihuman.models.layers import ExpertLinear, LowRank, projection_std

__all__ = [
    "LoraConfig",
    "adapter_parameters",
    "adapter_state",
    "add_adapter",
    "base_state",
    "copy_adapter",
    "merge",
    "merged",
    "remove_adapters",
]


def add_adapter(model: SingleStreamDiT, name: str, config: LoraConfig, seed: int = 0) -> None:
    """Put an adapter into a network; it computes what the base computes until it is trained.

    Its parameters are fp32, on the base's device, and require gradients; the base's are left alone (freeze them with
    `model.requires_grad_(False)` before, where only adapters are to be trained).

    Args:
        name: an identifier, not in use.
        seed: of A, drawn on the CPU for each matrix by its name, so that every machine draws the same; nothing is
            drawn on the meta device.

    Raises:
        UserError: a name that cannot be used.
        ValueError: the block matrices are not plain ones (stored in fewer bits).
    """
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise UserError(f"an adapter cannot be called {name!r}; take a plain word, such as student")
    if name in model.adapters:
        raise UserError(f"the network has an adapter {name!r} already; choose another name")
    linears = dict(_linears(model))
    if not linears:
        raise ValueError("adapters need the network's plain block matrices; add them before store_weights")
    for key, linear in linears.items():
        rows, columns = linear.weight.shape[0] // linear.experts, linear.weight.shape[1]
        with torch.device(linear.weight.device):
            low = LowRank(columns, rows, linear.experts, config.rank, config.scale)
        if not low.A.is_meta:
            generator = torch.Generator().manual_seed(crc32(f"{seed} {name} {key}".encode()))
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
    model.adapters[name] = config


def remove_adapters(model: SingleStreamDiT, *names: str) -> None:
    """Take adapters out, all of them where no name is given.

    Raises:
        KeyError: no adapter of that name.
    """
    for name in names or tuple(model.adapters):
        del model.adapters[name]
        for _, linear in _linears(model):
            del linear.lora[name]
        if name in model.lora:
            del model.lora[name]


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Key -> parameter of one adapter, in the network's order.

    Args:
        model: the network, or a module that holds it (keys then start with its place).

    Raises:
        KeyError: no adapter of that name.
    """
    found = {key: weight for key, weight in model.named_parameters() if adapter_of(key) == name}
    if not found:
        raise KeyError(name)
    return found


@torch.no_grad()
def copy_adapter(model: SingleStreamDiT, source: str, target: str) -> None:
    """Overwrite one adapter's weights with another's of the same config.

    Raises:
        KeyError: no adapter of that name. ValueError: their configs differ.
    """
    if model.adapters[source] != model.adapters[target]:
        raise ValueError(f"{source} is {model.adapters[source]}, {target} is {model.adapters[target]}")
    sources = adapter_parameters(model, source).values()
    for mine, theirs in zip(adapter_parameters(model, target).values(), sources, strict=True):
        mine.copy_(theirs)


def adapter_of(key: str) -> str | None:
    """Name of the adapter that a key belongs to; None for the base's."""
    parts = key.split(".")
    return parts[parts.index("lora") + 1] if "lora" in parts[:-1] else None


def base_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's state dict without its adapters: the released keys."""
    return {key: tensor for key, tensor in state.items() if adapter_of(key) is None}


def adapter_state(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """One adapter's part of a state dict, under keys without its name: `....lora.A`, `lora.adapter....`."""
    return {
        key.replace(f"lora.{name}.", "lora.", 1): tensor
        for key, tensor in state.items()
        if adapter_of(key) == name
    }


@torch.no_grad()
def merge(
    base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], config: LoraConfig
) -> Iterator[tuple[str, Tensor]]:
    """The released keys with an adapter's change added, one tensor after the other.

    Args:
        base: state dict under the released keys, see `base_state`.
        adapter: see `adapter_state`.

    Yields:
        key and tensor; what changes is summed and returned in fp32, the rest is as in `base`.

    Raises:
        ValueError: the adapter has keys that do not belong to this base.
    """
    left = set(adapter)
    for key, tensor in base.items():
        place = key.removesuffix("weight")
        if f"lora.{key}" in left:
            left.remove(f"lora.{key}")
            yield key, adapter[f"lora.{key}"].float()
        elif f"{place}lora.A" in left:
            left -= {f"{place}lora.A", f"{place}lora.B"}
            down = adapter[f"{place}lora.A"].float().unflatten(0, (-1, config.rank))  # [E, r, columns]
            up = adapter[f"{place}lora.B"].float().unflatten(0, (len(down), -1))  # [E, rows, r]
            yield key, tensor.float().add((up @ down).flatten(0, 1), alpha=config.scale)
        else:
            yield key, tensor
    if left:
        raise ValueError(f"{sorted(left)[0]} belongs to no matrix of this network")


def merged(model: SingleStreamDiT, name: str) -> dict[str, Tensor]:
    """State dict of a plain network that computes what this one does with an adapter; changed matrices in fp32.

    Raises:
        KeyError: no adapter of that name.
    """
    config, state = model.adapters[name], model.state_dict()
    return dict(merge(base_state(state), adapter_state(state, name), config))


def _linears(model: SingleStreamDiT) -> Iterator[tuple[str, ExpertLinear]]:
    for key, module in model.named_modules():
        if isinstance(module, ExpertLinear):
            yield key, module
