"""Tier fast: the same mathematics in another order, within a stated bound of the fp32 reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from fast_networks import DEEP, error, inputs, network, velocities

from inference.fast import options_for, prepare
from inference.fast.attention_kernels import choose, probe, refusal
from inference.fast.fused_blocks import CompiledBlocks
from inference.fast.fused_weights import padded_width
from inference.fast.kernels import _runs, merge, variants, windowed
from magihuman import zoo
from magihuman.errors import UserError
from magihuman.models.attention import attention
from magihuman.models.config import PackConfig
from magihuman.models.tokens import Layout

FP32 = 2e-5
"""Relative L2 distance after 40 layers in fp32; what the reference itself is allowed on the released vectors."""

MIXED = replace(
    DEEP, num_layers=6, mm_layers=(0, 4, 5), gelu7_layers=(0, 2), local_attn_layers=(1, 4), post_norm_layers=(3,)
)
SWITCHES = [
    {"pad": True},
    {"sort": True, "attention": "auto"},
    {"attention": "plain"},
    {"attention": "sdpa"},
    {"planes": False},
    {"pad": True, "grouped": True, "sort": True, "attention": "sdpa"},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_switch_alone(switches: dict[str, Any]) -> None:
    reference = network(MIXED)
    fast = prepare(reference, "exact", **switches)
    for text, frames in (([4], 5), ([4, 1, 2], 5), ([3, 3], 2)):
        batch = inputs(text, frames=frames)
        assert error(velocities(fast, batch), velocities(reference, batch)) < 2e-6, text


def test_forty_layers_in_fp32() -> None:
    reference = network(DEEP)
    batch = inputs([4, 2])
    for tier, switches in (("fast", {}), ("fast", SWITCHES[-1])):
        assert error(velocities(prepare(reference, tier, **switches), batch), velocities(reference, batch)) < FP32


@pytest.mark.parametrize("switches", [{}, SWITCHES[-1]], ids=["cpu", "as on a gpu"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_forty_layers_in_bf16_err_no_more_than_the_reference(switches: dict[str, Any], seed: int) -> None:
    """E1's bound: at most a quarter further from fp32 than the reference in bf16 is."""
    batch = inputs([4, 2], seed=seed)
    exact = velocities(network(DEEP, seed=seed), batch)
    reference = network(DEEP, torch.bfloat16, seed=seed)
    own = error(velocities(reference, batch), exact)
    assert 1e-3 < own < 0.1
    assert error(velocities(prepare(reference, "fast", **switches), batch), exact) < 1.25 * own


def test_the_release_s_widths() -> None:
    config = zoo.arch("15b")
    assert config.intermediate_size(10) == 13652
    assert padded_width(13652) == 13696 == 107 * 128
    assert padded_width(20480) == 20480
    assert (padded_width(596), padded_width(168)) == (608, 176)
    layer: Any = prepare(network(MIXED), "fast", pad=True).model.layers
    assert [each.down.weight.shape[2] for each in layer] == [256, 176, 256, 176, 176, 176]
    assert torch.equal(layer[1].down.weight[:, :, 168:], torch.zeros(1, 64, 8))


# ------------------------------------------------------------------------------------------------ windows of frames


@pytest.mark.parametrize(("frames", "reach"), [(1, 1), (5, 1), (5, 2), (5, 3), (4, 3), (7, 11), (6, 0)])
@pytest.mark.parametrize("others", [(3, 4), (0, 2)])
@pytest.mark.parametrize("name", ["plain", "sdpa"])
def test_windows_are_the_masked_attention(frames: int, reach: int, others: tuple[int, int], name: str) -> None:
    layout = Layout.build((frames, 2, 2), others[0], [others[1]])
    generator = torch.Generator().manual_seed(frames)
    q, k, v = (torch.randn(layout.length, heads, 16, generator=generator) for heads in (6, 2, 2))
    (kernel,) = variants(name)
    ours = windowed(kernel, q[None], k[None], v[None], layout.video_len, frames, reach)[0]
    assert (ours - attention(q, k, v, layout, "reference", reach)).abs().max() < 2e-6


def test_only_windows_off_both_ends_are_merged() -> None:
    """The 1080p stage: 32 frames, 11 to each side. Eight of its windows need a second call."""
    calls: list[tuple[int, bool]] = []

    def run(q: Any, k: Any, v: Any, lse: bool, scales: Any = None) -> Any:
        calls.append((k.shape[1], lse))
        return q, q[..., 0] if lse else None

    kernel = variants("plain")[0]._replace(run=run)
    x = torch.zeros(1, 32 * 2 + 5, 1, 8)
    assert windowed(kernel, x, x, x, 64, 32, 11).shape == x.shape
    assert len([keys for keys, lse in calls if lse and keys == 5]) == 8
    assert [keys for keys, lse in calls if not lse] == [5 + 2 * n for n in (*range(12, 24), *range(23, 11, -1))] + [69]
    assert len(_runs(32, 11)) == 32
    assert _runs(5, 3) == [(0, 1, 0, 4), (1, 4, 0, 5), (4, 5, 1, 5)]


def test_merging_is_attention_over_the_union() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 8, generator=generator) for n in (3, 9, 9))
    (kernel,) = variants("plain")
    (a, a_lse), (b, b_lse) = (kernel.run(q, k[:, part], v[:, part], True, None) for part in (slice(4), slice(4, 9)))
    assert a_lse is not None
    assert b_lse is not None
    whole, lse = kernel.run(q, k, v, True, None)
    assert (merge(a, a_lse, b, b_lse) - whole).abs().max() < 1e-6
    assert lse is not None
    assert (torch.logaddexp(a_lse, b_lse) - lse).abs().max() < 1e-6


# ----------------------------------------------------------------------------------------------- kernels by name


def test_kernels_that_cannot_run_say_why() -> None:
    cpu = torch.device("cpu")
    for name in ("cudnn", "flash2", "fa3", "fp8"):
        with pytest.raises(UserError, match=f"attention={name} cannot run here: it needs an NVIDIA GPU, this is cpu"):
            choose(name, cpu, torch.bfloat16, 4, 2, 16)
    assert refusal("sdpa", cpu, torch.float32) is None
    with pytest.raises(UserError, match="attention=fa4 is unknown; choose one of reference, auto"):
        options_for("fast", "cuda", attention="fa4")


def test_kernels_of_a_gpu_that_lacks_something(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    major = 9
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert "computes in bfloat16, not torch.float32" in str(refusal("cudnn", gpu, torch.float32))
    reason = "FlashAttention-3 is not installed; build flash-attention/hopper (package flash_attn_interface), or use"
    assert refusal("fa3", gpu, torch.bfloat16) == f"{reason} attention=cudnn"
    assert refusal("fp8", gpu, torch.bfloat16) == f"{reason} tier=fp8"
    major = 8
    assert "needs a Hopper GPU (compute capability 9), this has 8" in str(refusal("fp8", gpu, torch.bfloat16))
    major = 7
    assert "needs compute capability 8, this has 7" in str(refusal("flash2", gpu, torch.bfloat16))


def test_a_kernel_that_computes_something_else_is_not_used() -> None:
    (plain,) = variants("plain")

    def wrong(q: Any, k: Any, v: Any, lse: bool, scales: Any = None) -> Any:
        return plain.run(q, k.flip(2), v, lse, scales)  # the wrong key head

    def broken(*_: Any) -> Any:
        raise RuntimeError("no kernel for this\nsecond line")

    cpu = torch.device("cpu")
    assert probe(plain, cpu, torch.bfloat16, 4, 2, 16) is None
    assert "its trial with 193 queries and 331 keys was off by" in str(
        probe(plain._replace(run=wrong), cpu, torch.bfloat16, 4, 2, 16)
    )
    said = probe(plain._replace(run=broken), cpu, torch.bfloat16, 4, 2, 16)
    assert said == "its trial with 193 queries and 331 keys failed (no kernel for this)"


# -------------------------------------------------------------------------------------------------- compilation


def test_regions_trace_whole_and_once_per_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced without a C++ compiler: no breaks, the same numbers, and a third geometry compiles nothing."""
    traced: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        traced.append(graph)
        return graph.forward

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: plain(f, **given, backend=backend))
    reference = network(replace(MIXED, local_attn_layers=()), torch.bfloat16)
    plain_fast = prepare(reference, "fast", grouped=True)
    counts = []
    try:
        fast = prepare(reference, "fast", compile="auto", grouped=True)
        for text, frames in (([4], 2), ([6], 3), ([5], 4)):
            batch = inputs(text, frames=frames, audio=4 * frames - 3)
            assert torch.equal(velocities(fast, batch), velocities(plain_fast, batch))
            counts.append(len(traced))
    finally:
        torch._dynamo.reset()
    assert counts[0] == 7  # the first norm, five kinds of neighbours, the end
    assert counts[2] == counts[1]


@pytest.mark.slow
def test_a_compiled_layer(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Inductor: the fused code of a layer computes what the plain operations do."""
    import shutil

    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler for Inductor")
    config = replace(DEEP, num_layers=2, hidden_size=32, num_query_groups=1, mm_layers=(), gelu7_layers=())
    reference = network(config, pack=PackConfig(2, "v2", -1))
    try:
        fast = prepare(reference, "fast", compile="static", pad=True)
        batch = inputs([4], frames=2)
        assert error(velocities(fast, batch), velocities(reference, batch)) < 2e-6
    finally:
        torch._dynamo.reset()


def test_the_limit_of_recompilations_is_raised_only_when_compiling() -> None:
    import torch._dynamo.config as dynamo

    before = dynamo.recompile_limit
    CompiledBlocks("off")
    assert dynamo.recompile_limit == before
    CompiledBlocks("static")
    assert dynamo.recompile_limit >= 64
