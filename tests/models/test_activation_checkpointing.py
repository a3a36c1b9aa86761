"""Activation checkpointing: the same gradients to the bit, attention run once or twice, memory in between."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_dit import CONFIG, SIZE, adapted, gradients, inputs, loss, make
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from magihuman.errors import UserError
from magihuman.models.config import Checkpointing
from magihuman.models.denoiser import Denoiser
from magihuman.training import parallel
from magihuman.zoo import footprint
from magihuman.zoo.footprint import TokenCounts
from magihuman.zoo.memory_tracker import Allocations

MODES: tuple[Checkpointing, ...] = (False, True, "attention")
FORWARD = "aten::_scaled_dot_product_flash_attention_for_cpu"


class Operators(TorchDispatchMode):
    """Counts the operators that run inside the block, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else nothing would be compiled inside the block

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def fused(denoiser: Denoiser, mode: Checkpointing) -> Denoiser:
    """The network with torch's fused attention in all layers."""
    denoiser.model.attention_backend = "sdpa"
    denoiser.model.frame_receptive_field = -1
    denoiser.model.gradient_checkpointing = mode
    return denoiser


def trained(denoiser: Denoiser, text: list[int], lora: str | None = None) -> tuple[dict[str, Tensor], Counter]:
    """Gradients by name, and the operators of the forward and the backward pass."""
    denoiser.zero_grad()
    with Operators() as run:
        loss(denoiser(*inputs(text), lora=lora)).backward()
    return {key: p.grad for key, p in denoiser.named_parameters() if p.grad is not None}, run.counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, "student"])
@pytest.mark.parametrize("text", [[4, 4], [4, 2]])
def test_gradients_to_the_bit_and_attention_once(text: list[int], lora: str | None, dtype: torch.dtype) -> None:
    kernels = CONFIG.num_layers * len(set(text))  # one for each length of a sample
    results, products = {}, {}
    for mode in MODES:
        network = fused(make(dtype=dtype) if lora is None else adapted(dtype, SIZE), mode)
        results[mode], counts = trained(network, text, lora)
        assert counts[FORWARD] == kernels * {False: 1, True: 2, "attention": 1}[mode], mode
        assert counts[f"{FORWARD}_backward"] == kernels
        products[mode] = counts["aten::mm"]
    assert products["attention"] == products[True] > products[False]  # nothing but attention is kept
    assert len(results[False]) > 40
    for mode in (True, "attention"):
        assert results[mode].keys() == results[False].keys()
        assert all(torch.equal(results[mode][key], gradient) for key, gradient in results[False].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_memory_is_that_of_the_formula(dtype: torch.dtype) -> None:
    """After the forward pass: all inputs of blocks; with "attention" its results and log-sum-exps, too."""
    config = replace(CONFIG, hidden_size=64, num_layers=6, mm_layers=(0, 5))
    video, audio, text = inputs([40], audio=60)
    tokens = TokenCounts(12, 60, 40)
    kept = {}
    for mode in MODES:
        network = fused(make(config, dtype), mode)
        layout = network.layout_for(video.shape, 60, [40])
        with Allocations().ignore(*network.parameters(), layout.rotary, video, audio, *text) as counted:
            velocities = network(video, audio, text, layout)
        kept[mode] = counted.live
        del velocities
    more, less = (footprint.kept_bytes(config, tokens, dtype.itemsize, m) for m in ("attention", True))
    assert kept["attention"] - kept[True] == 6 * (more - less) == 6 * tokens.total * (dtype.itemsize * 64 + 4 * 4)
    assert 6 * less < kept[True] < kept["attention"] < 0.5 * kept[False]


@pytest.mark.parametrize("text", [[4, 4], pytest.param([4, 2], marks=pytest.mark.slow)])
def test_attention_runs_once_in_compiled_blocks(text: list[int]) -> None:
    """What lies inside of a compiled graph no policy sees: with "attention" there is no attention in any."""
    # In bf16: torch 2.11 compiles the activations of a block to a zero gradient in fp32, checkpointed or not.
    plain, _ = trained(fused(make(dtype=torch.bfloat16), False), text)
    for mode in MODES:
        torch._dynamo.reset()
        attending: list[bool] = []

        def record(graph: torch.fx.GraphModule, _: Any, seen: list[bool] = attending) -> Any:
            seen.append("scaled_dot_product_attention" in graph.code)
            return graph.forward

        network = fused(make(dtype=torch.bfloat16), mode)
        for layer in network.model.block.layers:
            layer.compile(backend=record)
        gradients, counts = trained(network, text)
        kernels = CONFIG.num_layers * len(set(text))
        assert counts[FORWARD] == kernels * {False: 1, True: 2, "attention": 1}[mode], mode
        assert counts[f"{FORWARD}_backward"] == kernels
        assert len(attending) >= 3  # three kinds of block
        assert any(attending) == (mode != "attention" and len(set(text)) == 1)
        for key, gradient in plain.items():
            torch.testing.assert_close(gradients[key], gradient, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks_have_the_same_gradients(dtype: torch.dtype) -> None:
    """torch 2.11 traces fp32 blocks to graphs that lose gradients, whatever compiles them; they are refused there."""
    if dtype == torch.float32 and TorchVersion(torch.__version__) < parallel.FP32_COMPILES_SINCE:
        pytest.skip(f"torch {torch.__version__} is refused")
    torch._dynamo.reset()
    denoiser, batch = make(dtype=dtype), inputs([4, 4])
    wanted = gradients(denoiser, batch)
    for block in parallel.blocks(denoiser):
        block.compile(backend="aot_eager")
    found = gradients(denoiser, batch)
    torch._dynamo.reset()
    for (name, _), a, b in zip(denoiser.named_parameters(), wanted, found, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm(), name


def test_a_torch_that_compiles_wrong_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with pytest.raises(UserError, match=r"precision=fp32 gives wrong gradients with torch 2\.11\.0\+cu130; use"):
        parallel.compile_blocks(make(dtype=torch.float32))
    parallel.compile_blocks(make(dtype=torch.bfloat16))
    torch._dynamo.reset()
