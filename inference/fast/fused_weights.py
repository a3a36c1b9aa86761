"""A block's weights in the form that a tier multiplies with, made once when the network is prepared."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.fast import fp8
from inference.fast.tiers import Options
from magihuman.errors import UserError
from magihuman.models.config import DiTConfig
from magihuman.models.dit import Block
from magihuman.models.layers import ExpertLinear, RMSNorm

FP8_ALIGNMENT = 16
"""Rows and columns of an 8-bit product are multiples of this."""


class MatrixTensors(NamedTuple):
    """One product's weights: [experts, rows, columns]; in 8 bits with fp32 [experts, rows] and [experts, 2]."""

    weight: Tensor
    row_scales: Tensor | None
    scales: Tensor | None


class LayerTensors(NamedTuple):
    """All tensors of a layer, as arguments of the compiled functions. Norms are 1 + w, one row per expert."""

    attention_norm: Tensor
    qk_norm: Tensor
    mlp_norm: Tensor
    attention_post_norm: Tensor | None
    mlp_post_norm: Tensor | None
    qkv: MatrixTensors
    proj: MatrixTensors
    up: MatrixTensors
    down: MatrixTensors
    attention_scales: Tensor | None


class BlockKind(NamedTuple):
    """Properties of a layer that a compiled function depends on, in addition to its tensors."""

    experts: int
    heads: int
    shared: int
    dim: int
    gated: bool
    gelu: bool
    planes: bool
    dtype: torch.dtype
    eight_bit_attention: bool


class Matrix(nn.Module):
    """The weights of one product.

    Args:
        weight: [experts, rows, columns] in the compute dtype.
        bounds: with 8-bit products the largest entry of each expert's input; else None.
    """

    weight: Tensor
    row_scales: Tensor | None
    scales: Tensor | None

    def __init__(self, weight: Tensor, bounds: list[float] | None = None) -> None:
        super().__init__()
        row_scales = scales = None
        if bounds is not None:
            codes, rows = zip(*map(fp8.quantise_rows, weight), strict=True)
            weight, row_scales = torch.stack(codes), torch.stack(rows)
            steps = [[bound / fp8.LARGEST, 1.0] for bound in bounds]
            scales = torch.tensor(steps, device=weight.device)
        self.register_buffer("weight", weight)
        self.register_buffer("row_scales", row_scales)
        self.register_buffer("scales", scales)

    def tensors(self) -> MatrixTensors:
        """As they are now: memory management may have moved them."""
        return MatrixTensors(self.weight, self.row_scales, self.scales)


class FastLayer(nn.Module):
    """A `Block` prepared. Matrices whose form does not change share their memory with it.

    Args:
        layer: its number.
        dtype: of the products.

    Raises:
        UserError: the weights are stored in another form already, or are too narrow for 8-bit products.
    """

    attention_norm: Tensor
    qk_norm: Tensor
    mlp_norm: Tensor
    attention_scales: Tensor | None

    def __init__(self, block: Block, config: DiTConfig, layer: int, options: Options, dtype: torch.dtype) -> None:
        super().__init__()
        experts = config.experts(layer)
        eight = options.fp8 == "all" or (options.fp8 == "shared" and experts == 1)
        if eight and config.hidden_size % FP8_ALIGNMENT:
            raise UserError(
                f"8-bit products need a hidden size that is a multiple of {FP8_ALIGNMENT}, not "
                f"{config.hidden_size}; use tier=fast"
            )
        eight_attention = options.attention in ("fp8", "fp8_emulated")
        heads, shared, dim = config.num_heads, config.num_query_groups, config.head_dim
        self.local = block.local
        self.kind = BlockKind(
            experts=experts,
            heads=heads,
            shared=shared,
            dim=dim,
            gated=config.enable_attn_gating,
            gelu=block.mlp.gelu,
            planes=options.planes or options.pad,
            dtype=dtype,
            eight_bit_attention=eight_attention,
        )
        attention, mlp = block.attention, block.mlp
        pairs = zip(attention.q_norm.slices(), attention.k_norm.slices(), strict=True)
        qk = [torch.cat([q.expand(heads, dim), k.expand(shared, dim)]) for q, k in pairs]
        self.register_buffer("attention_norm", _scale(attention.pre_norm))
        self.register_buffer("qk_norm", 1 + torch.stack(qk).detach().float())
        self.register_buffer("mlp_norm", _scale(mlp.pre_norm))
        for own, norm in (("attention_post_norm", block.attn_post_norm), ("mlp_post_norm", block.mlp_post_norm)):
            self.register_buffer(own, None if norm is None else _scale(norm))

        qkv = _stacked(attention.linear_qkv, dtype)
        values = self._value_bounds(qkv) if eight or eight_attention else None
        self.register_buffer("attention_scales", self._attention_scales(values) if eight_attention else None)
        up, down = _padded_mlp(mlp.up_gate_proj, mlp.down_proj, self.kind, dtype, options.pad or eight)
        bounds: dict[str, list[float] | None] = dict.fromkeys(("qkv", "proj", "up", "down"))
        if eight:
            assert values is not None
            clamp = fp8.GELU_BOUND if self.kind.gelu else fp8.SWIGLU_BOUND
            bounds = {
                "qkv": [fp8.norm_bound(row) for row in self.attention_norm],
                # Attention mixes the values of all experts.
                "proj": [float(values.max())] * experts,
                "up": [fp8.norm_bound(row) for row in self.mlp_norm],
                "down": [clamp] * experts,
            }
            qkv = _with_rows(qkv, -(-qkv.shape[1] // FP8_ALIGNMENT) * FP8_ALIGNMENT)
        self.qkv = Matrix(qkv, bounds["qkv"])
        self.proj = Matrix(_stacked(attention.linear_proj, dtype), bounds["proj"])
        self.up = Matrix(up, bounds["up"])
        self.down = Matrix(down, bounds["down"])

    def tensors(self) -> LayerTensors:
        """All tensors as they are now."""

        def now(name: str) -> Any:
            part = getattr(self, name)
            return part.tensors() if isinstance(part, Matrix) else part

        return LayerTensors(*map(now, LayerTensors._fields))

    def _value_bounds(self, qkv: Tensor) -> Tensor:
        """Largest value of each key head over all experts, fp32 [Hkv]."""
        start = (self.kind.heads + self.kind.shared) * self.kind.dim
        rows = slice(start, start + self.kind.shared * self.kind.dim)
        pairs = zip(qkv, self.attention_norm, strict=True)
        each = torch.stack([fp8.value_bounds(weight[rows], norm) for weight, norm in pairs])
        return each.amax(dim=0).unflatten(0, (self.kind.shared, -1)).amax(dim=1)

    def _attention_scales(self, values: Tensor | None) -> Tensor:
        """Values of one 8-bit unit of q, k and v, fp32 [3,Hkv]; rotation keeps a head's length."""
        assert values is not None
        heads = self.kind.heads
        bounds = [fp8.norm_bound(part) for part in (self.qk_norm[:, :heads], self.qk_norm[:, heads:])]
        return torch.stack([values.new_tensor(b).expand_as(values) for b in bounds] + [values]).div(fp8.LARGEST)


def padded_width(width: int) -> int:
    """The next multiple of 128, the tiles' width, where that adds at most 1 %; else the next multiple of 16.

    13652, the release's, becomes 13696 (+0.3 %). It is no multiple of 8, so the rows of its matrices start where no
    tensor-core kernel of Hopper can load them.
    """
    tiles = -(-width // 128) * 128
    return tiles if tiles <= 1.01 * width else -(-width // 16) * 16


def _padded_mlp(
    up: ExpertLinear, down: ExpertLinear, kind: BlockKind, dtype: torch.dtype, pad: bool
) -> tuple[Tensor, Tensor]:
    """Both matrices of a feed-forward half; zeros beyond the width come out of the activations as zeros."""
    first, second = _stacked(up, dtype), _stacked(down, dtype)
    width = second.shape[2]
    wanted = padded_width(width) if pad else width
    if kind.gelu:
        first = _with_rows(first, wanted)
    elif kind.planes:
        # [experts, 2 width, H], gate and linear alternating -> one block each
        blocks = first.unflatten(1, (-1, 2)).transpose(1, 2)
        first = F.pad(blocks, (0, 0, 0, wanted - width)).flatten(1, 2)
    if wanted != width:
        second = F.pad(second, (0, wanted - width))
    return first, second


def _stacked(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    if not isinstance(linear, ExpertLinear):
        raise UserError(
            "a faster tier needs matrices in bf16 or fp32, these are stored in fewer bits; leave out weights="
        )
    return linear.weight.detach().to(dtype).unflatten(0, (linear.experts, -1))


def _with_rows(weight: Tensor, rows: int) -> Tensor:
    return weight if weight.shape[1] == rows else F.pad(weight, (0, 0, 0, rows - weight.shape[1]))


def _scale(norm: RMSNorm) -> Tensor:
    return 1 + norm.weight.detach().float().unflatten(0, (norm.experts, -1))
