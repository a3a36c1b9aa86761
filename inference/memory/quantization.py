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


class StoredLinear(nn.Module):
    """An `ExpertLinear` in fewer bits.

        fp8    e4m3 with one fp32 scale per row. With s = max|row| / 448 a weight w comes back within
               max(|w| / 16, s / 1024): three bits of mantissa, and the half step of the subnormals
        int4   whole numbers -7 to 7, two to a byte, with one bf16 scale per 64 columns of a row. With s the stored scale,
               about max|group| / 7, a weight comes back within s / 2 in fp32

    Args:
        weight: [experts * rows, columns].
        form: fp8 or int4.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, experts: int, form: str) -> None:
        super().__init__()
        self.experts, self.columns = experts, weight.shape[1]
        store, self._restore = _FORMS[form]
        codes, scales = zip(*map(store, weight.chunk(experts)), strict=True)
        self.register_buffer("codes", torch.cat(codes))
        self.register_buffer("scales", torch.cat(scales))

    def slices(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """One matrix [rows, columns] per expert in `dtype`, restored when it is asked for."""
        for codes, scales in zip(self.codes.chunk(self.experts), self.scales.chunk(self.experts), strict=True):
            yield self._restore(codes, scales, dtype)[:, : self.columns]


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
            setattr(parent, name, StoredLinear(weight, linear.experts, form).to(keep_on))


def _from_fp8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype).mul_(scales.unsqueeze(1))


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [rows, groups, 32] and bf16 [rows, groups, 1]; columns are padded with zeros to whole groups."""
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


_FORMS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]] = {
    "fp8": (quantise_rows, _from_fp8),
    "int4": (_to_int4, _from_int4),
}
