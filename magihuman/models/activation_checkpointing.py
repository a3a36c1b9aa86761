"""Activation checkpointing of a block: which activations the backward pass recomputes.

    False        none: all activations are kept
    True         all of the block: only its input is kept (Chen et al. 2016, arXiv 1604.06174)
    "attention"  all but attention: the attention kernel's output and log-sum-exp are kept as well; queries, keys and
                 values are recomputed. Selective checkpointing after Korthikanti et al. 2022 (arXiv 2205.05198), who
                 recompute attention because it stored all scores; fused kernels store none.

"attention" covers the fused kernels of `scaled_dot_product_attention` and flash-attn. Other back ends
(`magihuman.models.attention`) are recomputed with the rest of the block: plain products, whose scores would have to be
kept, and FlexAttention, which is compiled separately and hides its kernel from the policy.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from magihuman.models.config import Checkpointing

FUSED_ATTENTION = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
    }
)
"""Operators whose results are kept, by qualified name, since some exist on some machines only."""


def recomputed(block: Callable[..., Tensor], *inputs: Any, mode: Checkpointing) -> Tensor:
    """`block(*inputs)` without keeping its activations; result and gradients are equal bit for bit.

    Args:
        block: without random numbers.
        mode: True or "attention". The latter recognises dispatched operators, so a compiled block has to leave
            attention outside of its graph.
    """
    contexts = _ALL_BUT_ATTENTION if mode == "attention" else noop_context_fn
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator.name() in FUSED_ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


_ALL_BUT_ATTENTION = partial(create_selective_checkpoint_contexts, _policy)
