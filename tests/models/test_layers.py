"""Hand-written gradients against what autograd derives from the plain formulas of SPEC 1."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from magihuman.models.layers import ExpertLinear, RMSNorm, gelu7, linear_fp32, rms_norm, swiglu7, swiglu7_projection
from magihuman.models.rotary import apply_rotary, rotary_bands, rotary_table


def plain_rms(x: Tensor, offset: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + offset)


def plain_gelu7(y: Tensor) -> Tensor:
    u = torch.minimum(y, torch.tensor(7.0))
    return u * torch.sigmoid(1.702 * u)


def plain_swiglu7(gate: Tensor, linear: Tensor) -> Tensor:
    return plain_gelu7(gate) * (linear.clamp(-7, 7) + 1)


def plain_rotary(x: Tensor, table: Tensor) -> Tensor:
    half = table.shape[-1] // 2
    sin, cos = table[:, None, :half], table[:, None, half:]
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)


def spread(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]] = {
    "rms": (rms_norm, plain_rms, [spread(5, 8), spread(8)]),
    "rms per head": (rms_norm, plain_rms, [spread(5, 3, 8), spread(3, 8)]),
    "rms shared by heads": (rms_norm, plain_rms, [spread(5, 3, 8), spread(8)]),
    "gelu7": (gelu7, plain_gelu7, [spread(40, 6, scale=6)]),
    "swiglu7": (swiglu7, plain_swiglu7, [spread(40, 6, scale=6), spread(41, 6, scale=6)[:40]]),
    "rotary": (lambda x: apply_rotary(x, spread(5, 12)), lambda x: plain_rotary(x, spread(5, 12)), [spread(5, 3, 16)]),
}


@pytest.mark.parametrize("name", CASES)
def test_value_gradient_and_second_gradient(name: str) -> None:
    ours, plain, values = CASES[name]

    def derivatives(function: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [v.clone().requires_grad_() for v in values]
        out = function(*inputs)
        first = torch.autograd.grad((out * spread(*out.shape)).sum(), inputs, create_graph=True)
        penalty = torch.stack([g.square().sum() for g in first]).sum()
        if not penalty.requires_grad:  # a linear function
            return [out, *first]
        return [out, *first, *torch.autograd.grad(penalty, inputs)]

    for mine, theirs in zip(derivatives(ours), derivatives(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)


def test_gradient_at_the_limits_is_that_of_clamp() -> None:
    for value in (7.0, -7.0):
        ours, plain = torch.tensor([value], requires_grad=True), torch.tensor([value], requires_grad=True)
        gate = torch.tensor([1.0])
        swiglu7(gate, ours).sum().backward()
        plain_swiglu7(gate, plain).sum().backward()
        assert ours.grad is not None
        assert ours.grad.item() == pytest.approx(plain.grad.item(), rel=1e-6)  # type: ignore[union-attr]
        assert ours.grad.item() != 0


def test_activations_saturate_at_seven() -> None:
    assert gelu7(torch.tensor([50.0])).item() == pytest.approx(7.0, abs=1e-4)
    assert swiglu7(torch.tensor([50.0]), torch.tensor([50.0])).item() == pytest.approx(56.0, abs=1e-3)
    assert swiglu7(torch.tensor([50.0]), torch.tensor([-50.0])).item() == pytest.approx(-42.0, abs=1e-3)
    assert gelu7(torch.tensor([-50.0])).item() == pytest.approx(0.0, abs=1e-6)  # no lower clamp


def test_bf16_goes_through_fp32() -> None:
    y = spread(64, 16, scale=3).bfloat16()
    exact = plain_swiglu7(y[:, 0::2].float(), y[:, 1::2].float()).bfloat16()
    ours = swiglu7(y[:, 0::2], y[:, 1::2])
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, exact)
    assert torch.equal(rms_norm(y, torch.zeros(16)), plain_rms(y.float(), torch.zeros(16)).bfloat16())


def test_projection_pairs_even_rows_with_odd_rows() -> None:
    x, weight = spread(9, 4), spread(12, 4)
    y = x @ weight.T
    torch.testing.assert_close(swiglu7_projection(x, weight), plain_swiglu7(y[:, 0::2], y[:, 1::2]))


@pytest.mark.parametrize("bias", [True, False])
def test_embedders_and_heads_compute_in_fp32_also_where_they_are_stored_in_bf16(bias: bool) -> None:
    layer = torch.nn.Linear(6, 4, bias, dtype=torch.bfloat16)
    x = spread(5, 6)
    out = linear_fp32(layer, x.bfloat16())
    exact = x.bfloat16().float() @ layer.weight.float().T + (layer.bias.float() if bias else 0.0)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, exact)


def test_experts_are_slices_in_order() -> None:
    linear = ExpertLinear(4, 5, 3, torch.float32)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(15.0)[:, None].expand(15, 4))
    parts = linear.slices(torch.bfloat16)
    assert [part[0, 0].item() for part in parts] == [0, 5, 10]
    assert parts[0].dtype == torch.bfloat16
    norm = RMSNorm(4, 3)
    assert [len(s) for s in norm.slices()] == [4, 4, 4]


def test_rotary_leaves_the_last_quarter_and_keeps_length() -> None:
    x = spread(6, 2, 16)
    coords = torch.tensor([[t, 1, 2, 6, 3, 4, 6, 3, 4] for t in range(6)], dtype=torch.float32)
    out = apply_rotary(x, rotary_table(coords, rotary_bands(16)))
    assert torch.equal(out[..., 12:], x[..., 12:])
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(out[3], x[3])
