"""AdamW with moments in 8 bits against AdamW in fp32: its steps, its memory, what it leaves alone, and its checkpoints."""

import io
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import training_stub
from processes import Launcher, assert_same, exported, final_state, seen
from torch import nn

from magihuman.config import OptimSettings
from magihuman.errors import UserError
from magihuman.models.config import DiTConfig
from magihuman.models.dit import SingleStreamDiT
from magihuman.training.adam8bit import require_torchao
from magihuman.training.checkpoint_check import check
from magihuman.training.optim import build_optimizer, fill_state
from magihuman.training.parallel import _Copies
from magihuman.zoo.footprint import moment_block, moment_bytes

installed = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
CONFIG = DiTConfig(2, 256, 64, 2, 12, 4, 5, mm_layers=(0,), gelu7_layers=(0,))
WIDE = ["model.dit.hidden_size=256", "model.dit.head_dim=64", "model.dit.num_query_groups=2", "model.dit.num_layers=1"]


def optimizer(weights: dict[str, nn.Parameter] | nn.Module, algorithm: str = "adamw8bit", lr: float = 0.01):
    return build_optimizer(weights, None, OptimSettings(algorithm=algorithm, lr=lr))


def is_8bit(moment: torch.Tensor) -> bool:
    return type(moment).__name__ == "OptimState8bit"


@installed
def test_it_solves_a_quadratic_as_adamw_in_fp32_does() -> None:
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(16, 512, generator=draw)
    curvature = torch.logspace(-2, 2, 16)[:, None]  # of the loss sum(curvature * (w - target)^2) / 2
    losses, weights = {}, {}
    for algorithm in ("adamw", "adamw8bit"):
        weight = nn.Parameter(torch.zeros(16, 512))
        made = optimizer({"w": weight}, algorithm, lr=0.05)
        for _ in range(60):
            weight.grad = curvature * (weight.detach() - target)
            made.step()
        losses[algorithm] = float((curvature * (weight.detach() - target) ** 2).sum() / 2)
        weights[algorithm] = weight.detach()
    start = float((curvature * target**2).sum() / 2)
    assert losses["adamw"] < 0.01 * start
    assert losses["adamw8bit"] < 0.01 * start
    assert (weights["adamw"] - weights["adamw8bit"]).norm() < 0.03 * target.norm()


@installed
def test_moments_take_two_bytes_per_weight_and_what_is_small_keeps_fp32() -> None:
    model = SingleStreamDiT(CONFIG)
    made = build_optimizer(model, CONFIG, OptimSettings(algorithm="adamw8bit"))
    fill_state(made)
    names = {weight: name for name, weight in model.named_parameters()}
    for weight, state in made.state.items():
        shape = tuple(weight.shape)
        moments = [state["exp_avg"], state["exp_avg_sq"]]
        assert [is_8bit(moment) for moment in moments] == 2 * [moment_block(shape) is not None], names[weight]
        sizes = [
            sum(getattr(m, part).nbytes for part in ("codes", "scale")) if is_8bit(m) else m.nbytes for m in moments
        ]
        assert sum(sizes) == moment_bytes(shape, "adamw8bit"), names[weight]
    large = {name for weight, name in names.items() if moment_block(tuple(weight.shape)) is not None}
    assert "block.layers.0.mlp.down_proj.weight" in large
    assert not any("norm" in name for name in large)
    assert moment_bytes((1024, 1024), "adamw8bit") == 2.03125 * 1024**2
    assert moment_bytes((5120,), "adamw8bit") == 8 * 5120
    assert (moment_block((64, 128)), moment_block((64, 256)), moment_block((5120, 13652))) == (None, 256, 3413)
    assert moment_block((8, 3, 3, 256)) == 256


@installed
def test_small_weights_get_the_steps_of_torchs_adamw() -> None:
    mine, theirs = nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(7))
    pair = optimizer({"w": mine}), optimizer({"w": theirs}, "adamw")
    for step in range(5):
        mine.grad = torch.linspace(-1, 1, 7) * (step + 1)
        theirs.grad = mine.grad.clone()
        for each in pair:
            each.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    assert pair[0].param_groups[0]["lr"] == 0.01  # a number, which schedules and logs expect


@installed
def test_a_state_that_is_there_from_the_start_changes_nothing() -> None:
    results = []
    for filled in (False, True):
        weight = nn.Parameter(torch.ones(16, 256))
        made = optimizer({"w": weight})
        if filled:
            fill_state(made)
        for step in range(3):
            weight.grad = torch.full_like(weight, step - 0.5) * torch.linspace(0, 1, 256)
            made.step()
        results.append((weight.detach(), made.state[weight]["exp_avg"].codes, made.state[weight]["step"]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@installed
def test_a_stopped_training_continues_bit_by_bit(shards, tmp_path) -> None:
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    settings = ["+recipe=pretrain", *WIDE, "optim=adamw8bit", "optim.schedule=constant", "trainer.precision=fp32"]
    training_stub.train_here(through, shards, settings)
    training_stub.train_here(stopped, shards, [*settings, "trainer.max_steps=2"])
    training_stub.train_here(stopped, shards, settings)
    mine, theirs = final_state(stopped), final_state(through)
    moments = [m for s in mine["optimizer_states"][0]["state"].values() for m in s.values() if is_8bit(m)]
    assert len(moments) > 4
    assert all(m.codes.count_nonzero() for m in moments)
    for a, b in zip(*(state["optimizer_states"][0]["state"].values() for state in (mine, theirs)), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            parts = [[m.codes, m.scale] if is_8bit(m) else m for m in (a[name], b[name])]
            assert_same(*parts, name)
    assert_same(mine["state_dict"], theirs["state_dict"])


@installed
def test_its_checkpoints_pass_the_check_before_torchao_is_imported(tmp_path) -> None:
    require_torchao()
    weight = nn.Parameter(torch.ones(16, 256))
    made = optimizer({"w": weight})
    fill_state(made)
    file = tmp_path / "step-00000001.ckpt"
    torch.save(made.state_dict(), file)
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        check(file)
    finally:
        torch.serialization.add_safe_globals(before)
    loaded = torch.load(io.BytesIO(file.read_bytes()), weights_only=True)
    assert is_8bit(loaded["state"][0]["exp_avg"])


def test_without_torchao_it_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("magihuman.training.adam8bit.find_spec", lambda name: None)
    with pytest.raises(UserError, match="optim=adamw8bit needs torchao; install it with pip install"):
        require_torchao()


@installed
def test_an_asynchronous_checkpoint_takes_a_copy_of_the_moments() -> None:
    weight = nn.Parameter(torch.ones(16, 256))
    made = optimizer({"w": weight})
    weight.grad = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    made.step()
    moment = made.state[weight]["exp_avg"]
    staged = _Copies().stage({"state": [made.state[weight]], "name": "w"})["state"][0]
    before = moment.codes.clone()
    weight.grad = -weight.grad
    made.step()
    assert is_8bit(staged["exp_avg"])
    assert torch.equal(staged["exp_avg"].codes, before)
    assert not torch.equal(moment.codes, before)
    assert (float(staged["step"]), float(made.state[weight]["step"])) == (1, 2)


@installed
@pytest.mark.slow
def test_sharded_moments_continue_on_two_processes_exactly_and_on_three(shards, tmp_path) -> None:
    wide = [
        *WIDE,
        "optim=adamw8bit",
        "optim.schedule=constant",
        "data.module.batch_size=6",
        "trainer.precision=fp32",
        "recipe.motion_floor=1",
    ]
    world = Launcher(shards)
    through, stopped, three = tmp_path / "through", tmp_path / "stopped", tmp_path / "three"
    assert world.run(through, "fsdp2", 2, *wide) == [0, 0]
    # Written while the training goes on, or would: the copies of 8-bit moments are ours.
    assert world.run(stopped, "fsdp2", 2, *wide, "trainer.max_steps=3", "checkpoint.asynchronous=true") == [0, 0]
    shutil.copytree(stopped, three, symlinks=True)
    assert world.run(stopped, "fsdp2", 2, *wide) == [0, 0]
    assert world.run(three, "fsdp2", 3, *wide) == [0, 0, 0]
    assert sorted(p for rank in seen(three).values() for p in rank) == list(range(18, 30))
    whole, resumed, other = exported(through), exported(stopped), exported(three)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    for key, weight in whole.items():
        apart = (weight.float() - other[key].float()).norm()
        assert apart <= 0.01 * weight.float().norm() + 1e-4, key
    assert Path(three / "export").exists()
