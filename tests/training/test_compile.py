"""trainer.compile: compiled blocks train what eager ones train, in every recipe and strategy that allows them."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from processes import Launcher, exported
from torch import Tensor
from toy_dmd2 import make_context

pytestmark = [
    pytest.mark.slow,  # inductor compiles with the machine's C++ compiler
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler"),
]

COMMON = [
    "trainer.precision=fp32",
    "trainer.log_every=1",
    "trainer.devices=%d",
    "strategy=%s",
    "data.module.batch_size=2",
]
DMD2 = [
    "+recipe=dmd2", "trainer.max_steps=4", "recipe.fake_score.warmup=1", "recipe.fake_score.updates=1",
    "recipe.sampling.steps=2", "recipe.first_step=0", "recipe.fake_score.first_step=0", "recipe.monitor.every=0",
    "callbacks.validation=null", "+optim.eps=1e-4", "optim.lr=1e-3", "recipe.fake_score.lr=1e-3",
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "export"
    make_context(folder)
    return folder


def losses(folder: Path) -> Tensor:
    """Every loss and gradient norm of every step."""
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    names = [n for n in rows[0] if n.split("/")[0] in ("loss", "fake_score", "grad_norm", "dm") and rows[-1][n]]
    assert len(names) >= 3
    return torch.tensor([[float(row[name] or "nan") for name in names] for row in rows])


def compare(eager: Path, compiled: Path, tolerance: float) -> None:
    one, two = exported(eager), exported(compiled)
    apart = max(float((one[k].float() - two[k].float()).norm() / (one[k].float().norm() + 1e-3)) for k in one)
    print(f"{compiled.name}: weights {apart:.1e}", end=" ")
    a, b = losses(eager), losses(compiled)
    print(f"losses {float(((a - b).abs() / (a.abs() + 1e-6)).nan_to_num().max()):.1e}")
    assert apart < tolerance
    torch.testing.assert_close(b, a, rtol=100 * tolerance, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("networks", ["full", "lora_fake_score", "lora"])
def test_dmd2(shards, teacher, tmp_path, networks) -> None:
    more = [*DMD2, *COMMON, f"init={teacher}", f"recipe.networks={networks}", "recipe.lora={rank: 4, alpha: 4}"]
    world = Launcher(shards, more)
    checkpointing = "trainer.activation_checkpointing=attention"
    assert world.run(tmp_path / "eager", "single", 1) == [0]
    assert world.run(tmp_path / "compiled", "single", 1, "trainer.compile=true", checkpointing) == [0]
    compare(tmp_path / "eager", tmp_path / "compiled", 1e-4)


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("fsdp2", ["trainer.compile=true", "trainer.activation_checkpointing=attention"]),
        ("fsdp2", ["strategy.offload=true"]),
        ("fsdp2", ["strategy.offload=true", "trainer.compile=true"]),
        ("ddp", ["trainer.compile=true", "trainer.activation_checkpointing=true"]),
    ],
)
def test_two_processes(shards, tmp_path, strategy, settings) -> None:
    world = Launcher(
        shards, ["+recipe=pretrain", "optim=adamw", "+optim.eps=1e-4", "callbacks.validation=null", *COMMON]
    )
    assert world.run(tmp_path / "eager", "single", 1) == [0]
    assert world.run(tmp_path / "two", strategy, 2, *settings) == [0, 0]
    compare(tmp_path / "eager", tmp_path / "two", 1e-4)
