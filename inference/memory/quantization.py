"""Weight-only storage of the block matrices in fewer bits; products run in the compute dtype as before.

Embedders, norms, rotary bands and heads stay fp32. A stored matrix is restored when it is used, one expert at a time,
so that the extra memory is a single expert's matrix.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.fast.fp8 import quantise_rows
from magihuman.errors import UserError
from magihuman.models.dit import SingleStreamDiT
from magihuman.models.layers import ExpertLinear
from magihuman.zoo.footprint import INT4_GROUP

INT4_LARGEST = 7


class Fp8Linear(nn.Module):
    """An `ExpertLinear` in e4m3 with one fp32 scale per row.

    With s = max|row| / 448 a weight w comes back within max(|w| / 16, s / 1024): three bits of mantissa, and the
    half step of the subnormals.

    Args:
        weight: [experts * rows, columns].
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, experts: int) -> None:
        super().__init__()
        self.experts = experts
        codes, scales = zip(*map(quantise_rows, weight.chunk(experts)), strict=True)
        self.register_buffer("codes", torch.cat(codes))
        self.register_buffer("scales", torch.cat(scales).unsqueeze(1))  # [experts * rows, 1]

    def slices(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """One matrix [rows, columns] per expert in `dtype`, restored when it is asked for."""
        for codes, scales in _by_expert(self.experts, self.codes, self.scales):
            yield codes.to(dtype).mul_(scales)


class Int4Linear(nn.Module):
    """An `ExpertLinear` in whole numbers -7 to 7, two to a byte, with one bf16 scale per 64 columns of a row.

    With s the stored scale, about max|group| / 7, a weight comes back within s / 2 in fp32.

    Args:
        weight: [experts * rows, columns]; columns are padded with zeros to whole groups.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.columns = weight.shape[1]
        packed, scales = zip(*map(_to_int4, weight.chunk(experts)), strict=True)
        self.register_buffer("codes", torch.cat(packed))  # uint8 [experts * rows, groups, 32]
        self.register_buffer("scales", torch.cat(scales))  # bf16 [experts * rows, groups, 1]

    def slices(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """One matrix [rows, columns] per expert in `dtype`, restored when it is asked for."""
        for codes, scales in _by_expert(self.experts, self.codes, self.scales):
            yield _from_int4(codes, scales, dtype)[:, : self.columns]


_STORED: dict[str, Callable[[Tensor, int], nn.Module]] = {"fp8": Fp8Linear, "int4": Int4Linear}


@torch.no_grad()
def store_weights(
    model: SingleStreamDiT, form: str, convert_on: torch.device | str, keep_on: torch.device | str
) -> None:
    """Change the storage of every block matrix in place, one at a time.

    Args:
        form: one of `magihuman.zoo.footprint.FORMS`.
        convert_on: device of the conversion, much faster on a GPU; keep_on: device of the result.

    Raises:
        UserError: weights that are already in a smaller form, or not finite.
    """
    found = [
        (parent, name, child)
        for parent in model.block.modules()
        for name, child in parent.named_children()
        if isinstance(child, ExpertLinear)
    ]
    if not found:
        raise UserError("the weights are already stored in fewer bits; load the checkpoint again")
    for parent, name, linear in found:
        weight = linear.weight.detach().to(convert_on)
        if form == "bf16":
            linear.weight.data = weight.to(keep_on, torch.bfloat16)
        else:
            if not weight.isfinite().all():
                raise UserError(f"a weight of {name} is not finite, so it cannot be stored as {form}")
            setattr(parent, name, _STORED[form](weight, linear.experts).to(keep_on))


def _by_expert(experts: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.chunk(experts) for tensor in tensors), strict=True)


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = F.pad(weight, (0, -weight.shape[1] % INT4_GROUP)).float().unflatten(1, (-1, INT4_GROUP))
    largest = groups.abs().amax(dim=-1, keepdim=True)
    scales = torch.where(largest > 0, largest / INT4_LARGEST, 1.0).to(torch.bfloat16)
    # Rounded against the stored scale. It may lie 1/256 below the exact one, which moves the largest weight of a group
    # by 7/256 of a step beyond 7: still within half a step.
    whole = (groups / scales.float()).round_().clamp_(-INT4_LARGEST, INT4_LARGEST).add_(INT4_LARGEST)
    pairs = whole.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4), scales


def _from_int4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    pairs = torch.stack([codes & 15, codes >> 4], dim=-1)  # [rows, groups, 32, 2]
    return pairs.flatten(-2).to(dtype).sub_(INT4_LARGEST).mul_(scales).flatten(1)
