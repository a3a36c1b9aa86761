"""Optimisers, schedules, clipping and the weight average, against closed forms and torch's own."""

import copy
import math

import pytest
import torch
from torch import nn

from magihuman.config import OptimSettings
from magihuman.models.config import DiTConfig
from magihuman.models.dit import SingleStreamDiT
from magihuman.training.optim import (
    EMA,
    Muon,
    build_optimizer,
    build_schedule,
    clip_gradients,
    decay_at,
    ema_update,
    experts_by_name,
    fill_state,
    orthogonalise,
    schedule_factor,
)

CONFIG = DiTConfig(2, 16, 8, 1, 12, 4, 5, mm_layers=(0,), gelu7_layers=(0,))
MUON = OptimSettings(algorithm="muon", lr=0.02, adamw_lr=0.003, weight_decay=0.1)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 16, 48), (3, 40, 16), (2, 20, 30)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape) -> None:
    values = torch.linalg.svdvals(orthogonalise(draw(*shape), steps=5).float())
    assert values.min() > 0.5
    assert values.max() < 1.4
    u, _, v = torch.linalg.svd(draw(*shape), full_matrices=False)
    cosine = nn.functional.cosine_similarity(orthogonalise(draw(*shape), 5).float().flatten(1), (u @ v).flatten(1))
    assert cosine.min() > 0.95


def test_stacked_experts_get_the_step_of_separate_matrices() -> None:
    stacked = nn.Parameter(draw(3 * 10, 16))
    parts = [nn.Parameter(p.clone()) for p in stacked.detach().chunk(3)]
    together = Muon([{"params": [stacked], "experts": 3}], MUON)
    apart = Muon([{"params": parts, "experts": 1}], MUON)
    for step in range(4):
        gradient = draw(30, 16, seed=step + 1) * torch.tensor([1.0, 10.0, 0.1]).repeat_interleave(10)[:, None]
        stacked.grad = gradient.clone()
        for part, g in zip(parts, gradient.chunk(3), strict=True):
            part.grad = g.clone()
        together.step()
        apart.step()
    assert torch.equal(stacked, torch.cat([p.detach() for p in parts]))


def test_muon_is_torchs_on_single_matrices() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    for shape in ((24, 16), (16, 24)):
        mine, theirs = (nn.Parameter(draw(*shape)) for _ in range(2))
        ours = Muon([{"params": [mine], "experts": 1}], MUON)
        reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95)
        for step in range(5):
            mine.grad = draw(*shape, seed=step + 1)
            theirs.grad = mine.grad.clone()
            ours.step()
            reference.step()
        # Equal up to bf16 rounding of the iteration: a step has entries of about lr / sqrt(16).
        assert (mine - theirs).abs().max() < 5 * 0.02 * 0.004


def test_the_rest_gets_torchs_adamw() -> None:
    mine, theirs = (nn.Parameter(draw(7)) for _ in range(2))
    ours = Muon([{"params": [mine], "experts": 0, "lr": 0.01}], MUON)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=MUON.betas, eps=MUON.eps, weight_decay=0.1)
    for step in range(6):
        mine.grad = draw(7, seed=step + 1)
        theirs.grad = mine.grad.clone()
        ours.step()
        reference.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_matrices_of_the_blocks_go_to_muon_and_all_else_to_adamw() -> None:
    model = SingleStreamDiT(CONFIG)
    optimizer = build_optimizer(model, CONFIG, MUON)
    by_experts = {g["experts"]: g for g in optimizer.param_groups}
    assert {n: len(g["params"]) for n, g in by_experts.items()} == {0: len(list(model.parameters())) - 8, 1: 4, 3: 4}
    assert by_experts[0]["lr"] == 0.003
    assert by_experts[0]["weight_decay"] == 0
    assert all(p.ndim == 2 for n in (1, 3) for p in by_experts[n]["params"])
    assert experts_by_name(CONFIG)["block.layers.0.mlp.down_proj.weight"] == 3
    adamw = build_optimizer(nn.ModuleDict({"x": model}), CONFIG, OptimSettings(weight_decay=0.1))
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.1, 0.0]
    assert sum(len(g["params"]) for g in adamw.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_an_optimiser_continues_from_its_state(algorithm) -> None:
    settings = OptimSettings(algorithm=algorithm, lr=0.01, adamw_lr=0.01)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            for i, p in enumerate(model.parameters()):
                p.grad = draw(*p.shape, seed=100 * number + i)
            optimizer.step()

    through = SingleStreamDiT(CONFIG)
    through.init_weights(0)
    again = SingleStreamDiT(CONFIG)
    first = build_optimizer(through, CONFIG, settings)
    steps(through, first, range(3))
    again.load_state_dict(through.state_dict())
    second = build_optimizer(again, CONFIG, settings)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(through, first, range(3, 6))
    steps(again, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.1, 9: 1.0, 10: 1.0, 99: 1.0}),
        ("cosine", {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("linear", {4: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("wsd", {4: 0.5, 10: 1.0, 79: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
    ],
)
def test_schedules(schedule, expected) -> None:
    settings = OptimSettings(lr=2.0, schedule=schedule, warmup=10, final=0.1, decay=0.2)
    for step, factor in expected.items():
        assert schedule_factor(settings, step, 100) == pytest.approx(factor)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.3})
    scheduler = build_schedule(optimizer, settings, 100, constant=1)
    for step in range(20):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * schedule_factor(settings, step, 100))
        assert optimizer.param_groups[1]["lr"] == 0.3
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_a_state_that_is_there_from_the_start_changes_nothing(algorithm) -> None:
    optim = OptimSettings(algorithm=algorithm, lr=0.02, adamw_lr=0.003, weight_decay=0.1)
    weights, states = [], []
    for filled in (False, True):
        model = SingleStreamDiT(CONFIG)
        model.init_weights(seed=0)
        optimizer = build_optimizer(model, CONFIG, optim)
        if filled:
            fill_state(optimizer)
            assert len(optimizer.state) == len(list(model.parameters()))
        for step in range(3):
            for place, weight in enumerate(model.parameters()):
                if step or place % 2:  # some have no gradient at first
                    weight.grad = draw(*weight.shape, seed=step)
            optimizer.step()
        weights.append([w.detach() for w in model.parameters()])
        states.append([optimizer.state[w] for w in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    for lazy, ready in zip(*states, strict=True):
        assert lazy.keys() == ready.keys()
        assert all(torch.equal(lazy[k], ready[k]) and lazy[k].dtype == ready[k].dtype for k in lazy)


def test_clipping_scales_to_the_norm_and_reports_the_norm_before() -> None:
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients(weights, 1.0) == pytest.approx(5.0)
    assert weights[0].grad.tolist() == pytest.approx([0.6, 0.0])
    assert clip_gradients(weights, None) == pytest.approx(1.0)
    assert weights[1].grad.tolist() == pytest.approx([0.8])
    weights[0].grad[0] = math.nan
    assert math.isnan(clip_gradients(weights, 1.0))
    assert all(w.grad is None for w in weights)


def test_the_average_follows_its_closed_form() -> None:
    model, decay = nn.Linear(1, 1, bias=False), 0.8
    with torch.no_grad():
        model.weight.fill_(5.0)
    ema = EMA(model, decay)
    expected = 5.0
    for n in range(60):
        with torch.no_grad():
            model.weight.fill_(float(n))
        d = min(decay, (1 + n) / (10 + n))
        assert decay_at(ema.updates, decay) == pytest.approx(d)
        ema.update(model)
        expected = d * expected + (1 - d) * n
    assert float(ema.module.weight) == pytest.approx(expected, rel=1e-5)
    # Late, for weights that grow by one a step, it lags by d / (1 - d).
    assert expected == pytest.approx(59 - decay / (1 - decay), abs=0.05)
    assert not any(p.requires_grad for p in ema.parameters())
    ema.train()
    assert not ema.module.training


def test_the_average_of_a_lora_keeps_the_share_of_its_decay() -> None:
    average, weights = [torch.tensor([2.0]), torch.tensor([0.0])], [torch.tensor([10.0]), torch.tensor([4.0])]
    ema_update(average, weights, 0.75)
    assert [float(t) for t in average] == [4.0, 1.0]
    assert [float(t) for t in weights] == [10.0, 4.0]


def test_the_average_is_fp32_and_copies_buffers() -> None:
    model = nn.BatchNorm1d(2).bfloat16()
    ema = EMA(model, 0.5)
    model.running_mean.fill_(3)
    with torch.no_grad():
        model.weight.fill_(1.0078125)
    ema.update(model)
    assert ema.module.weight.dtype == torch.float32
    assert ema.module.running_mean.tolist() == [3, 3]
    assert float(ema.module.weight[0]) == pytest.approx(0.1 * 1.0 + 0.9 * 1.0078125)
