"""Tiers fp8 and fp8_attention: scales that cannot saturate, rounding as in hardware, measured errors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from fast_networks import DEEP, error, inputs, network, velocities

from inference.fast import fp8, prepare
from inference.fast.fused_blocks import activation, before, norm
from inference.fast.kernels import variants
from magihuman import zoo
from magihuman.errors import UserError

SANDWICH = replace(DEEP, num_layers=6, mm_layers=(0, 5), gelu7_layers=(0,))


def test_products_round_where_the_hardware_does() -> None:
    """e4m3 inputs and weights, fp32 sums, bf16 result, then the rows' scales."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 32, generator=generator)
    weight = torch.randn(48, 32, generator=generator) * torch.logspace(-3, 3, 48).unsqueeze(1)
    codes, rows = fp8.quantise_rows(weight)
    scales = torch.tensor([4 / 448, 1.0])
    ours = fp8.multiply(x, codes, rows, scales)
    rounded = (x * (448 / 4)).to(torch.float8_e4m3fn).float() * scales[0]
    wanted = (rounded @ codes.float().t()).bfloat16().float() * rows
    assert (ours - wanted).abs().max() <= 2**-8 * wanted.abs().max()
    assert error(ours / rows, wanted / rows) < 1e-3
    # Three bits of mantissa on either side: a sixteenth at most, a thirtieth or so on average.
    assert 0.01 < error(ours / rows, x @ (weight / rows.unsqueeze(1)).t()) < 0.05
    assert fp8.multiply(x[:0], codes, rows, scales).shape == (0, 48)


def test_rows_of_zeros_and_of_any_size_come_back() -> None:
    weight = torch.tensor([[0.0] * 16, [1e-4] * 16, [1e4] * 15 + [1.0]])
    codes, scales = fp8.quantise_rows(weight)
    back = codes.float() * scales.unsqueeze(1)
    assert torch.equal(back[0], weight[0])
    assert ((back - weight).abs() <= weight.abs() / 16 + scales.unsqueeze(1) / 1024).all()


def test_no_input_can_saturate() -> None:
    """Rows that are as bad as they can be: all of a row's length in one channel, or along a row of the weights."""
    fast: Any = prepare(network(SANDWICH), "fp8_attention", fp8="all")
    layout = fast.layout_for((1, 3, 3, 4, 4), 5, [4])
    tokens, hidden = fast.model.plan(layout).packed, SANDWICH.hidden_size
    for layer in fast.model.layers:
        w, kind = layer.tensors(), layer.kind
        start = (kind.heads + kind.shared) * kind.dim
        values = w.qkv.weight[:, start : start + kind.shared * kind.dim].float().flatten(0, 1)
        spikes = torch.eye(hidden) * 1e3
        worst = torch.cat([spikes, -spikes, values * w.attention_norm[0], -values])
        for scales, rows in ((w.qkv.scales, w.attention_norm), (w.up.scales, w.mlp_norm)):
            assert scales is not None
            for expert, scale in enumerate(rows):
                peak = norm(worst, scale).abs().max() / scales[expert, 0]
                assert peak <= 449
        x = torch.zeros(layout.length, hidden)
        repeated = worst.repeat(1 + len(x) // len(worst), 1)
        x[:] = repeated[: len(x)]
        for part in before(x, tokens, w, kind)[:3]:
            assert part.dtype == torch.float8_e4m3fn
            assert part.float().isfinite().all()
        extremes = torch.tensor([[1e6, 1e6], [-1e6, 1e6], [1e6, -1e6], [0.5, 1e6]]).repeat(1, 8)
        extremes = extremes if kind.gelu else torch.cat([extremes[:, ::2], extremes[:, 1::2]], dim=1)
        assert w.down.scales is not None
        inner = activation(extremes, kind).abs().max() / w.down.scales[0, 0]
        assert 440 < inner <= 449


def test_the_loudest_expert_sets_the_scale_of_the_values_that_attention_mixes() -> None:
    loud = network(SANDWICH)
    attention: Any = loud.model.block.layers[0].attention
    weight, norm_row = attention.linear_qkv.weight.chunk(3)[2], 1 + attention.pre_norm.weight.chunk(3)[2]  # of text
    with torch.no_grad():
        weight.mul_(8)
        dim, heads, shared = SANDWICH.head_dim, SANDWICH.num_heads, SANDWICH.num_query_groups
        values = weight[(heads + shared) * dim : (heads + 2 * shared) * dim]
        bounds = fp8.value_bounds(values, norm_row).unflatten(0, (shared, dim)).amax(dim=1)
        prepared: Any = prepare(loud, "fp8_attention", fp8="all")
    w = prepared.model.layers[0].tensors()
    torch.testing.assert_close(w.attention_scales[2] * fp8.LARGEST, bounds)
    torch.testing.assert_close(w.proj.scales[:, 0] * fp8.LARGEST, bounds.max().expand(3))


def test_attention_s_averages_stay_within_the_bound_of_values() -> None:
    fast: Any = prepare(network(SANDWICH), "fp8", fp8="all")
    seen: list[tuple[float, float]] = []
    multiply = fp8.multiply

    def watched(x: Any, codes: Any, rows: Any, scales: Any) -> Any:
        if len(x):
            seen.append((float(x.abs().max()), float(scales[0]) * fp8.LARGEST))
        return multiply(x, codes, rows, scales)

    patch = pytest.MonkeyPatch()
    patch.setattr(fp8, "multiply", watched)
    try:
        out = velocities(fast, inputs([4]))
    finally:
        patch.undo()
    assert len(seen) == 6 * 4 + 2 * (3 + 3 + 3 + 3 - 4) - 3  # the last layer leaves out text after attention
    assert all(value <= bound for value, bound in seen)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("tier", "switches", "bound"),
    [
        ("fp8", {}, 0.06),
        ("fp8", {"fp8": "all"}, 0.08),
        ("fast", {"attention": "fp8_emulated"}, 0.12),
        ("fp8_attention", {}, 0.14),
    ],
    ids=["linears", "experts, too", "attention", "linears and attention"],
)
def test_the_shipped_checkpoint(tier: str, switches: dict[str, Any], bound: float) -> None:
    """Velocities of a trained network: measured 0.026, 0.044, 0.074 and 0.079 at most; held at these bounds."""
    reference = zoo.load("tiny/base").denoiser
    generator = torch.Generator().manual_seed(3)
    batch = (
        torch.randn(1, 12, 3, 16, 16, generator=generator),
        torch.randn(1, 9, 64, generator=generator),
        [torch.randn(9, 128, generator=generator)],
    )
    wanted = velocities(reference, batch)
    assert 0.003 < error(velocities(prepare(reference, tier, **switches), batch), wanted) < bound


def test_the_emulation_of_attention_rounds_probabilities_too() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 24, heads, 16, generator=generator) for heads in (4, 2, 2))
    (plain,), (emulated,) = variants("plain"), variants("fp8_emulated")
    scales = torch.tensor([[0.01, 0.01], [0.02, 0.02], [0.01, 0.03]])
    given = [
        fp8.quantise(x, step.repeat_interleave(x.shape[2] // 2).unsqueeze(-1))
        for x, step in zip((q, k, v), scales, strict=True)
    ]
    out, lse = emulated.run(*given, True, scales)
    wanted, wanted_lse = plain.run(q, k, v, True, None)
    assert lse is not None
    assert wanted_lse is not None
    assert 0.01 < error(out.float(), wanted) < 0.06
    assert (lse - wanted_lse).abs().max() < 0.1
    # Equal values come out as they are, whatever rounding did to the weights of their average.
    flat, _ = emulated.run(given[0], given[1], torch.ones_like(v).to(torch.float8_e4m3fn), False, scales)
    assert (flat.float() / torch.tensor([0.01, 0.01, 0.03, 0.03]).unsqueeze(-1) - 1).abs().max() < 0.04


def test_what_eight_bits_need() -> None:
    reference = network(replace(SANDWICH, hidden_size=56, head_dim=8, num_query_groups=1))
    with pytest.raises(UserError, match="a hidden size that is a multiple of 16, not 56; use tier=fast"):
        prepare(reference, "fp8")
    with pytest.raises(UserError, match="attention=fp8 cannot run here: it needs an NVIDIA GPU"):
        prepare(network(SANDWICH), "fp8_attention", attention="fp8")
