"""Memory of the transformer in inference and training, by formulas from its config; no torch, so that a plan is quick.

The formulas follow the code line by line: they count the tensors that are alive at the worst moment. Tests count the
same on the "meta" device. Workspaces of kernels are not included. Codecs are in `magihuman.codecs.costs`.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from magihuman.models.config import Checkpointing, DiTConfig
from magihuman.models.flops import BF16, FP32, lora_sides

Form = Literal["bf16", "fp8", "int4"]
FORMS: tuple[Form, ...] = get_args(Form)
"""Storage of the block matrices."""

FP8_SCALE = 4  # bytes per row
INT4_GROUP, INT4_SCALE = 64, 2
ROPE_SHARE = 3 / 4  # of a head, times one fp32 number each for the table
ADAM = 16
"""Bytes per trained number: fp32 master, fp32 gradient, two fp32 moments."""
MOMENT_BLOCKS = range(256, 4097)
"""Numbers that may share a scale in the moments of `optim=adamw8bit`."""


def moment_block(shape: tuple[int, ...]) -> int | None:
    """Numbers that share a scale in the 8-bit moments of a weight of this shape; None where its moments are fp32.

    The smallest part of a row that divides it, so that every row is whole blocks: 256 for most matrices, 3413 for the
    13652 columns of the released down projections (the paper's blocks are of 2048).
    """
    if len(shape) < 2 or prod(shape) < 4096:
        return None
    return next((size for size in MOMENT_BLOCKS if prod(shape[1:]) % size == 0), None)


def moment_bytes(shape: tuple[int, ...], optim: str = "adamw") -> int:
    """Both moments of one weight, for `optim` adamw or adamw8bit."""
    one = FP32 * prod(shape)
    if optim == "adamw8bit" and (block := moment_block(shape)) is not None:
        one = prod(shape) + FP32 * prod(shape) // block
    return 2 * one


@dataclass(frozen=True)
class TokenCounts:
    """Packed tokens of a batch: all samples' video, audio and text."""

    video: int
    audio: int
    text: int

    @property
    def total(self) -> int:
        return self.video + self.audio + self.text

    def times(self, samples: int) -> "TokenCounts":
        """Of that many equal samples."""
        return TokenCounts(self.video * samples, self.audio * samples, self.text * samples)

    def share(self, processes: int) -> "TokenCounts":
        """The largest share of one of these processes (`magihuman.context_parallel`)."""
        return TokenCounts(*(-(-count // processes) for count in (self.video, self.audio, self.text)))


# -- weights -------------------------------------------------------------------------------------------------------


def stored_bytes(shape: tuple[int, ...], is_matrix: bool, form: str) -> int:
    """One entry of the state dict in memory; only block matrices change with the form (fp32, bf16, fp8, int4)."""
    if not is_matrix or form == "fp32":
        return FP32 * prod(shape)
    if form == "bf16":
        return BF16 * prod(shape)
    rows, columns = shape
    if form == "fp8":
        return rows * (columns + FP8_SCALE)
    groups = -(-columns // INT4_GROUP)
    return rows * groups * (INT4_GROUP // 2 + INT4_SCALE)


def weight_bytes(config: DiTConfig, form: str) -> int:
    """The whole network."""
    return sum(stored_bytes(shape, is_matrix, form) for _, shape, is_matrix in config.tensors())


def layer_bytes(config: DiTConfig, form: str) -> list[int]:
    """Each block."""
    sizes = [0] * config.num_layers
    for key, shape, is_matrix in config.tensors():
        if key.startswith("block.layers."):
            sizes[int(key.split(".")[2])] += stored_bytes(shape, is_matrix, form)
    return sizes


def half_counts(config: DiTConfig) -> list[int]:
    """Numbers in the matrices of each half of a block: attention, MLP, of every layer."""
    counts = [0] * (2 * config.num_layers)
    for key, shape, is_matrix in config.tensors():
        if is_matrix:
            counts[2 * int(key.split(".")[2]) + (".mlp." in key)] += prod(shape)
    return counts


def streamed_bytes(config: DiTConfig, form: str) -> int:
    """With streamed layers: embedders, heads, and one slot each for the even and the odd layers."""
    layers = layer_bytes(config, form)
    return weight_bytes(config, form) - sum(layers) + max(layers[0::2]) + max(layers[1::2], default=0)


def restored_bytes(config: DiTConfig, form: str, compute: int) -> int:
    """The largest matrix that is alive in the compute dtype beside its stored form; one expert's where possible."""
    if form == ("bf16" if compute == BF16 else "fp32"):
        return 0
    widest = 0
    for i in range(config.num_layers):
        hidden, inner, experts = config.hidden_size, config.intermediate_size(i), config.experts(i)
        for rows, columns in ((config.qkv_width, hidden), (config.up_width(i), hidden), (hidden, inner)):
            if form == "fp8":
                size = rows * columns * compute
            elif form == "int4":  # in whole groups; beside it the unpacked codes, one byte each
                size = rows * -(-columns // INT4_GROUP) * INT4_GROUP * (compute + 1)
            else:
                size = rows * columns * experts * compute
            widest = max(widest, size)
    return widest


def lora_count(config: DiTConfig, rank: int) -> int:
    """Parameters of a LoRA on every block matrix, each expert its own."""
    return rank * sum(config.experts(i) * lora_sides(config, i) for i in range(config.num_layers))


# -- activations of the transformer ----------------------------------------------------------------------------------


def forward_bytes(config: DiTConfig, tokens: TokenCounts, compute: int) -> int:
    """Peak of one forward pass without gradients: in the MLP of the widest layer.

    Alive are the embedded input, the block's input and middle (fp32 residuals), the attention's result and the
    normalised input (compute dtype), and the activation's temporaries: the product y, fp32 copies of it, the result.
    Experts run one after another, video first; results of earlier ones are fp32.

    Args:
        compute: bytes of the compute dtype.
    """
    hidden, copy = config.hidden_size, compute if compute < FP32 else 0
    worst = 0
    for i in range(config.num_layers):
        inner = config.intermediate_size(i)
        if i in config.gelu7_layers:
            activation = (compute + 2 * FP32 + copy) * inner
        else:
            activation = (2 * compute + 3 * FP32 + copy) * inner
        residuals = 3 if i else 2
        base = (residuals * FP32 + compute) * hidden * tokens.total
        done = 0
        groups = (tokens.video, tokens.audio, tokens.text) if config.experts(i) > 1 else (tokens.total,)
        for rows in groups:
            worst = max(worst, base + FP32 * hidden * done + (compute * hidden + activation) * rows)
            done += rows
    return worst + _table_bytes(config, tokens)


def saved_bytes(config: DiTConfig, layer: int, tokens: TokenCounts, compute: int) -> int:
    """What a block keeps for its backward pass."""
    hidden, dim = config.hidden_size, config.head_dim
    rotated = (config.num_heads + config.num_query_groups) * dim
    # Residuals before both norms; normalised inputs; attention's result before and after the gate.
    per_token = 2 * FP32 * hidden + 4 * compute * hidden
    # qkv product (the values are a view of it), its fp32 copy for the norm, rotated queries and keys.
    per_token += compute * config.qkv_width + (FP32 * rotated if compute < FP32 else 0) + compute * rotated
    # Log-sum-exp and gates; inverse norms of heads and tokens.
    per_token += 2 * FP32 * config.num_heads + FP32 * (config.num_heads + config.num_query_groups + 2)
    per_token += compute * (config.up_width(layer) + config.intermediate_size(layer))
    return per_token * tokens.total


def backward_bytes(config: DiTConfig, tokens: TokenCounts, compute: int) -> int:
    """Temporaries of a block's backward pass beyond what it saved: the activation's fp32 gradients."""
    half = compute < FP32
    factors = {True: 18 if half else 10, False: 29 if half else 17}  # numbers of bytes per inner channel
    widest = max(factors[i in config.gelu7_layers] * config.intermediate_size(i) for i in range(config.num_layers))
    return (FP32 * config.hidden_size + widest) * tokens.total


def exchange_bytes(config: DiTConfig, tokens: TokenCounts, compute: int) -> int:
    """Copies of queries, keys and values while a block exchanges tokens for heads: packed, received and sorted.

    Args:
        tokens: of one process (`magihuman.context_parallel`).
    """
    return 3 * compute * (config.num_heads + 2 * config.num_query_groups) * config.head_dim * tokens.total


def kept_bytes(config: DiTConfig, tokens: TokenCounts, compute: int, checkpointing: Checkpointing) -> int:
    """What one block keeps until it is recomputed: its fp32 input, and with "attention" also attention's result in the
    compute dtype and the fp32 log-sum-exp of every query head."""
    attention = compute * config.hidden_size + FP32 * config.num_heads if checkpointing == "attention" else 0
    return (FP32 * config.hidden_size + attention) * tokens.total


def training_bytes(config: DiTConfig, tokens: TokenCounts, compute: int, checkpointing: Checkpointing) -> int:
    """Peak of activations in a training step, without weights and gradients.

    Args:
        checkpointing: what of the blocks is recomputed in the backward pass, one block at a time; False keeps all.
    """
    hidden, layers = config.hidden_size, range(config.num_layers)
    saved = [saved_bytes(config, i, tokens, compute) for i in layers]
    kept = sum(saved)
    if checkpointing:
        kept = (config.num_layers - 1) * kept_bytes(config, tokens, compute, checkpointing) + max(saved)
    heads = 2 * FP32 * hidden * tokens.total
    return kept + heads + backward_bytes(config, tokens, compute) + _table_bytes(config, tokens)


def cast_bytes(config: DiTConfig, compute: int, checkpointing: Checkpointing) -> int:
    """Copies of fp32 master matrices in the compute dtype that wait for the backward pass."""
    if compute == FP32:
        return 0
    layers = [size // FP32 * compute for size in layer_bytes(config, "fp32")]
    return max(layers) if checkpointing else sum(layers)


def _table_bytes(config: DiTConfig, tokens: TokenCounts) -> int:
    """Rotary table and coordinates."""
    return int(tokens.total * FP32 * (ROPE_SHARE * config.head_dim + 9))


def clip_bytes(frames: int, height: int, width: int, copies: int) -> int:
    """Decoded pixels in fp32, that many copies of the clip."""
    return copies * FP32 * 3 * frames * height * width
