"""A sharded checkpoint is continued by another number of processes: the same samples in the same order, the same losses."""

import csv
import json
import signal
from pathlib import Path

import pytest
import torch
from processes import Launcher, exported, seen

MORE = [
    "+recipe=pretrain", "optim=adamw", "+optim.eps=1e-4", "optim.ema_decay=0.9", "trainer.precision=fp32",
    "trainer.log_every=1", "trainer.max_steps=5", "checkpoint.every_steps=3", "data.module.batch_size=6",
    "callbacks.validation=null", "trainer.devices=%d", "strategy=%s", "+callbacks.spy={_target_: training_stub.Spy}",
    "+callbacks.sizes={_target_: training_stub.ShardSizes}",
]  # fmt: skip
DIE = "+callbacks.die={_target_: training_stub.DieAt, batch: 4}"
LOSS = 1e-5
"""Relative tolerance of losses and gradient norms: sums in fp32 over another division of the batch."""


@pytest.fixture(scope="module")
def world(shards) -> Launcher:
    return Launcher(shards, MORE)


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    assert world.run(folder, "fsdp2", 1) == [0]
    return folder


def table(folder: Path) -> torch.Tensor:
    """[steps, losses and gradient norm]."""
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]
    return torch.tensor([[float(row[name]) for name in ("loss", "loss/video", "grad_norm")] for row in rows])


@pytest.mark.parametrize(
    ("before", "after", "replicas"),
    [
        (1, 2, 1),
        pytest.param(2, 1, 1, marks=pytest.mark.slow),
        pytest.param(2, 3, 1, marks=pytest.mark.slow),
        pytest.param(2, 3, 2, marks=pytest.mark.slow),
    ],
    ids=["1-2", "2-1", "2-3", "2_replicas-3"],
)
def test_another_number_of_processes_continues(world, unbroken, tmp_path, before, after, replicas) -> None:
    folder = tmp_path / "run"
    assert world.run(folder, "fsdp2", before, DIE, f"strategy.replicas={replicas}")[0] == -signal.SIGKILL
    held = [json.loads(file.read_text()) for file in sorted(folder.glob("sizes-*.json"))]
    assert world.run(folder, "fsdp2", after) == [0] * after
    orders = seen(folder)
    assert sorted(position for rank in orders.values() for position in rank) == list(range(18, 30))
    for rank, positions in orders.items():  # each batch of 6 in parts, by rank
        part = 6 // after
        assert positions == [b * 6 + rank * part + i for b in (3, 4) for i in range(part)]
    torch.testing.assert_close(table(folder), table(unbroken), rtol=LOSS, atol=0)
    one, two = exported(unbroken), exported(folder)
    for key, weight in one.items():
        assert (weight.float() - two[key].float()).norm() <= 1e-5 * weight.float().norm() + 1e-7, key

    # Weights, average and moments of a process are its share of a replica.
    now = [json.loads((folder / f"sizes-{rank}.json").read_text()) for rank in range(after)]
    for sizes, shards in ((held, before // replicas), (now, after)):
        whole = sizes[0]["whole"]
        assert sum(size["weights"] for size in sizes) == whole * len(sizes) // shards
        assert all(size["average"] == size["weights"] for size in sizes)
        assert max(size["weights"] for size in sizes) <= 1.05 * whole / shards
    assert all(size["moments"] == 2 * size["weights"] for size in now)
