"""LoRA: the base is unchanged, the update is B A per expert, and only the argument decides which one computes."""

import copy
from dataclasses import replace
from math import prod

import pytest
import torch
from small_dit import LOCAL, SIZE, adapted, inputs, loss, make, merged
from torch import Tensor

from magihuman import zoo
from magihuman.errors import UserError
from magihuman.models import lora
from magihuman.models.config import LoraConfig
from magihuman.models.denoiser import WithLora
from magihuman.models.layers import Update, product, swiglu7, swiglu7_projection


def differ(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_untouched_and_an_adapter_starts_as_the_base(dtype) -> None:
    denoiser, batch = adapted(dtype), inputs([4, 2])
    before = make(LOCAL, dtype)(*batch)
    assert differ(before, denoiser(*batch)) == 0
    assert differ(before, denoiser(*batch, lora="critic")) == 0
    assert differ(before, denoiser(*batch, lora="student")) > 0.1
    student = WithLora(denoiser, "student")
    assert differ(denoiser(*batch, lora="student"), student(*batch)) == 0
    assert differ(before, student(*batch, lora="critic")) == 0  # the call's name comes first


def test_training_one_adapter_touches_neither_the_base_nor_the_other() -> None:
    denoiser, batch = adapted(), inputs([4, 2])
    before = copy.deepcopy(denoiser.state_dict())
    critic = lora.lora_parameters(denoiser.model, "critic")
    optimizer = torch.optim.Adam(critic.values(), lr=1e-2)
    base, other = denoiser(*batch), denoiser(*batch, lora="student")
    for _ in range(3):
        optimizer.zero_grad()
        loss(denoiser(*batch, lora="critic")).backward()
        optimizer.step()
    trained = {key for key, p in denoiser.named_parameters() if p.grad is not None}
    assert trained == {f"model.{key}" for key in critic}
    after = denoiser.state_dict()
    changed = {key.removeprefix("model.") for key in after if not torch.equal(after[key], before[key])}
    assert changed == set(critic)
    assert differ(base, denoiser(*batch)) == 0
    assert differ(other, denoiser(*batch, lora="student")) == 0


@pytest.mark.parametrize("heads", [True, False])
def test_merged_weights_compute_what_the_adapter_computes(heads) -> None:
    denoiser, batch = adapted(config=replace(SIZE, heads=heads)), inputs([5, 1])
    state = merged(denoiser, "student")
    plain = make(LOCAL)
    plain.model.load_state_dict(state)
    torch.testing.assert_close(plain(*batch), denoiser(*batch, lora="student"), rtol=1e-4, atol=1e-4)
    base = denoiser.model.state_dict()
    key, experts = "block.layers.0.mlp.down_proj", 3
    low = denoiser.model.get_submodule(f"{key}.lora.student")
    for i in range(experts):  # by hand: 4.5 / 3 B A of each expert
        change = 1.5 * low.B.chunk(experts)[i] @ low.A.chunk(experts)[i]
        mine = (state[f"{key}.weight"] - base[f"{key}.weight"]).chunk(experts)[i]
        torch.testing.assert_close(mine, change, rtol=1e-3, atol=1e-6)
    own = base.get("lora.student.final_linear_audio.weight", base["final_linear_audio.weight"])
    assert torch.equal(state["final_linear_audio.weight"], own)


def test_features_are_the_streams_of_the_lora_after_each_tap() -> None:
    denoiser, batch = adapted(), inputs([5, 1])
    student, plain = WithLora(denoiser, "student"), make(LOCAL)
    plain.model.load_state_dict(merged(denoiser, "student"))
    found, wanted = (network.features(*batch, taps=[0, 2, 3]) for network in (student, plain))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    # After the last layer come the heads.
    velocity = plain.model.final_linear_audio(plain.model.final_norm_audio(wanted[-1][1].flatten(0, 1)))
    torch.testing.assert_close(velocity, plain(*batch)[1].flatten(0, 1), rtol=1e-4, atol=1e-4)
    shorter = make(replace(LOCAL, num_layers=3, mm_layers=(0,), post_norm_layers=(2,)))
    state = plain.model.state_dict()
    shorter.model.load_state_dict({k: v for k, v in state.items() if not k.startswith("block.layers.3.")})
    torch.testing.assert_close(shorter.features(*batch, taps=[2])[0], wanted[1], rtol=1e-4, atol=1e-4)


def test_checkpointing_recomputes_the_same_adapter_whatever_was_called_in_between() -> None:
    results = []
    for recompute in (False, True):
        denoiser, batch = adapted(), inputs([4, 2])
        denoiser.model.gradient_checkpointing = recompute
        value = loss(denoiser(*batch, lora="student"))
        with torch.no_grad():
            denoiser(*batch)
        (value + loss(denoiser(*batch, lora="critic"))).backward()
        results.append({k: p.grad for k, p in denoiser.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    assert len(results[0]) == 2 * len(lora.lora_parameters(denoiser.model, "critic"))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_a_change_too_small_for_bf16_weights_is_kept() -> None:
    """Regression of the output's change on the true one: 1 where all of it arrives."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=draw).bfloat16()
    weight = (torch.randn(96, 64, generator=draw) / 8).bfloat16()
    update = Update(
        (torch.randn(4, 64, generator=draw) / 8).bfloat16(), torch.randn(96, 4, generator=draw).bfloat16(), 1e-4
    )
    true = update.scale * x.float() @ update.down.float().T @ update.up.float().T

    def arrived(y: Tensor) -> float:
        change = y.float() - product(x, weight).float()
        return float((change * true).sum() / true.square().sum())

    rounded = (weight.float() + update.scale * update.up.float() @ update.down.float()).bfloat16()
    assert arrived(product(x, weight, update)) == pytest.approx(1, abs=0.01)
    assert arrived(product(x, rounded)) < 0.5


def test_the_swiglu_product_keeps_its_rows_in_place() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 8, generator=draw), torch.randn(12, 8, generator=draw)
    update = Update(torch.randn(2, 8, generator=draw), torch.randn(12, 2, generator=draw), 0.5)
    y = x @ (weight + 0.5 * update.up @ update.down).T
    torch.testing.assert_close(swiglu7_projection(x, weight, update), swiglu7(y[:, 0::2], y[:, 1::2]))


@pytest.mark.parametrize(("rank", "matrices"), [(64, 264_373_248), (128, 528_746_496)])
def test_sizes_on_the_15b_network(rank, matrices) -> None:
    """`distill.md` 5.6 counts the block matrices alone: 264 M and 529 M. The heads' copies are 21 M more."""
    config = zoo.arch("15b")
    model = zoo.build(config, zoo.pack("15b"), compute_dtype=torch.bfloat16, device="meta").model
    lora.add_lora(model, "student", LoraConfig(rank))
    parameters = lora.lora_parameters(model, "student")
    inside = sum(p.numel() for key, p in parameters.items() if key.startswith("block."))
    ends = sum(prod(s) for key, s, _ in config.tensors() if not key.startswith("block.")) - config.head_dim // 8
    assert inside == matrices
    assert sum(p.numel() for p in parameters.values()) - inside == ends == 20_997_120
    assert sum(p.numel() for p in model.parameters()) == config.parameter_count() + inside + ends


def test_draws_depend_on_seed_and_name_only() -> None:
    def first(name: str, seed: int, layer: int = 1) -> Tensor:
        model = make().model
        lora.add_lora(model, name, SIZE, seed)
        return model.get_parameter(f"block.layers.{layer}.mlp.down_proj.lora.{name}.A")

    a = first("student", 0)
    assert torch.equal(a, first("student", 0))
    assert not torch.equal(a, first("student", 0, layer=2))
    assert not torch.equal(a, first("student", 1))
    assert not torch.equal(a, first("critic", 0))
    assert float(a.detach().std()) == pytest.approx(a.shape[1] ** -0.5, rel=0.15)


def test_copies_and_mistakes() -> None:
    denoiser, batch = adapted(), inputs([2])
    model = denoiser.model
    lora.copy_lora(model, "student", "critic")
    assert differ(denoiser(*batch, lora="student"), denoiser(*batch, lora="critic")) == 0
    with pytest.raises(ValueError, match=r"no LoRA 'teacher'.*\['critic', 'student'\]"):
        denoiser(*batch, lora="teacher")
    with pytest.raises(UserError, match="has a LoRA 'critic' already"):
        lora.add_lora(model, "critic", SIZE)
    for name in ("a.b", "keys", ""):
        with pytest.raises(UserError, match="cannot be called"):
            lora.add_lora(model, name, SIZE)
    with pytest.raises(UserError, match="positive whole number"):
        LoraConfig(0)
    with pytest.raises(KeyError):
        lora.lora_parameters(model, "teacher")
    lora.add_lora(model, "louder", replace(SIZE, alpha=9.0))  # of the same shapes, with another scale
    with pytest.raises(ValueError, match=r"student is LoraConfig\(rank=3, alpha=4.5.*louder is"):
        lora.copy_lora(model, "student", "louder")
    with pytest.raises(ValueError, match="belongs to no matrix"):
        dict(lora.merge(lora.base_state(model.state_dict()), {"block.layers.9.x.lora.A": batch[0]}, SIZE))
